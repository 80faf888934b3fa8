"""From a URI to a store: ``/path``, ``file:///path``, ``memory://name``, ``s3://bucket/prefix?endpoint_url=...``."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from storage.errors import BadStoreURI
from storage.stores.blob_store import BlobStore
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore

_SCHEMES = ("file", "memory", "s3")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# What a scheme with a slip of the pen looks like: taken for a folder, it would be an empty store that was never meant.
_SLIP = re.compile(
    r"(s3|gs|gcs|az|abfss?|wasbs?|hdfs|oci|https?|ftp|file|memory)(?::/?|;/{0,2}|//|/:|\.//)(?!/)", re.IGNORECASE
)
_SECRET = re.compile(r"secret|password|token|access_?key|credential", re.IGNORECASE)


def open_store(uri: str | Path) -> BlobStore:
    """Return the store that a URI or plain path names; nothing is contacted yet.

    S3 parameters are the fields of `storage.stores.s3.S3Options`: ``endpoint_url``, ``region``, ``addressing_style``,
    ``profile``, ``retry_mode``, ``max_attempts``, ``checksum``, ``connect_timeout_s``, ``read_timeout_s``,
    ``multipart_bytes``. Raises `BadStoreURI`.
    """
    text = str(uri)
    if "://" not in text:
        if (slip := _SLIP.match(text)) is not None:
            meant = f"{slip[1].lower()}://{text[slip.end() :]}"
            raise BadStoreURI(
                f"store {text!r}: '://' must stand behind the scheme; write {meant!r}, or ./{text} for a folder"
            )
        if not text:
            raise BadStoreURI("store '': empty; give a path, file:///path, memory://name or s3://bucket/prefix")
        return _open_folder(text, text)
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise BadStoreURI(f"store {text[:200]!r}: not a URI ({error})") from error
    if parts.username is not None or parts.password is not None:
        raise BadStoreURI(
            f"store {parts.scheme}://...@{parts.hostname or ''}: no credentials in a URI; use the environment"
        )
    if parts.fragment:
        raise BadStoreURI(f"store {text!r}: '#' is not part of a store's URI; write %23")
    if parts.scheme == "s3":
        return _open_s3(text, parts)
    if parts.query and parts.scheme in _SCHEMES:
        raise BadStoreURI(f"store {text!r}: {parts.scheme}:// takes no parameters")
    if parts.scheme == "memory":
        return MemoryStore.named(parts.netloc + parts.path)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise BadStoreURI(
                f"store {text!r}: file:// wants three slashes before an absolute path; write 'file:///{parts.netloc}{parts.path}'"
            )
        if not parts.path:
            raise BadStoreURI(
                f"store {text!r}: no path behind 'file://'; write file:///path, or . for the folder you are in"
            )
        return _open_folder(text, unquote(parts.path))
    raise BadStoreURI(f"store {text!r}: unknown scheme {parts.scheme!r}{_nearest(parts.scheme, _SCHEMES)}")


def open_existing_store(uri: str | Path) -> BlobStore:
    """Return the store that a URI names, to be read: a folder must be there, since nothing will make it.

    Raises:
        BadStoreURI: there is no such folder.
    """
    store = open_store(uri)
    if isinstance(store, LocalStore) and not store.root.is_dir():
        raise BadStoreURI(
            f"store {str(uri)!r}: no such folder ({store.root}); give the folder that a job wrote, or run "
            "'nestquant quantize' first"
        )
    return store


def _open_folder(text: str, path: str) -> LocalStore:
    try:
        folder = Path(path).expanduser()
    except RuntimeError as error:  # ~nobody
        raise BadStoreURI(f"store {text!r}: {error}") from error
    if "\0" in path:
        raise BadStoreURI(f"store {text!r}: no path may hold a zero byte")
    store = LocalStore(folder)
    # The folder may be made later, but nothing else may stand in its place, or on the way to it.
    place = next(place for place in (store.root, *store.root.parents) if os.path.lexists(place))
    if not os.path.isdir(place):
        what = "a file" if os.path.exists(place) else "a link to nothing"
        raise BadStoreURI(f"store {text!r}: {place} is {what}; expected a folder")
    return store


def _open_s3(text: str, parts: SplitResult) -> BlobStore:
    from storage.stores.s3 import S3Options, S3Store

    if not _BUCKET.fullmatch(parts.netloc):
        raise BadStoreURI(f"store {text!r}: {parts.netloc!r} is no bucket name (3 to 63 of a-z 0-9 . -)")
    hints = get_type_hints(S3Options)
    values: dict[str, Any] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in hints:
            if _SECRET.search(name):
                raise BadStoreURI(
                    f"store s3://{parts.netloc}: no credentials in a URI ({name}); use the environment or a profile"
                )
            raise BadStoreURI(f"store s3://{parts.netloc}: unknown parameter {name!r}{_nearest(name, tuple(hints))}")
        if name in values:
            raise BadStoreURI(f"store s3://{parts.netloc}: parameter {name!r} is given twice")
        values[name] = _value(parts.netloc, name, value, hints[name])
    return S3Store(parts.netloc, unquote(parts.path), S3Options(**values), uri=text)


def _value(bucket: str, name: str, value: str, hint: Any) -> str | int | float:
    where = f"store s3://{bucket}: {name}={value!r}"
    if name == "endpoint_url":
        try:
            endpoint = urlsplit(value)
        except ValueError as error:
            raise BadStoreURI(f"store s3://{bucket}: endpoint_url: not a URI ({error})") from error
        if endpoint.scheme not in ("http", "https") or not endpoint.hostname:
            raise BadStoreURI(f"{where}: expected http://host:port or https://host")
        if endpoint.username is not None:
            raise BadStoreURI(
                f"store s3://{bucket}: no credentials in endpoint_url; set the environment or name a profile"
            )
        return value
    if hint in (int, float):
        try:
            number = hint(value)
        except ValueError:
            number = 0
        if not 0 < number < 1 << 40:
            raise BadStoreURI(f"{where}: expected a number above 0")
        return number  # type: ignore[no-any-return]
    choices = tuple(choice for choice in get_args(hint) if isinstance(choice, str))
    if choices and value not in choices:
        raise BadStoreURI(f"{where}: expected one of {', '.join(choices)}{_nearest(value, choices)}")
    if not value:
        raise BadStoreURI(f"{where}: empty")
    return value


def _nearest(name: str, names: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(names)}"
