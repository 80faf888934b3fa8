"""Where things stand in a store: the keys, and the rules for the names in them."""

from __future__ import annotations

import re

from storage.digest import digest_hex
from storage.errors import BadKey

MAX_VERSION = 99_999_999
MODEL_NAME = r"[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9])?"
_NAME = re.compile(MODEL_NAME)
_REPORT = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?")
_MANIFEST_FILE = re.compile(r"([0-9]{8})\.json")
BLOB_KEY = r"blobs/sha256/([0-9a-f]{2})/\1[0-9a-f]{62}"

# The report beside a version that its job writes: what was measured.
JOB_REPORT = "job"
# A site about the store, made from it (`nestquant catalog --publish`): overwritten, and nothing is ever read from it.
CATALOG_PREFIX = "catalog/"

CONDEMNED_KEY = "gc/condemned.json"
CLOCK_KEY = "gc/clock"
# Stands at the root of a device's cache. No key begins with a dot, so no store can hold it.
CACHE_MARKER = ".nestquant-cache"


def blob_key(digest: str) -> str:
    """Return the key of the blob with this digest."""
    hexdigits = digest_hex(digest)
    return f"blobs/sha256/{hexdigits[:2]}/{hexdigits}"


def is_blob_key(key: str) -> bool:
    """Tell whether a key is exactly that of a blob: what only looks like one is somebody else's."""
    return re.fullmatch(BLOB_KEY, key) is not None


def model_prefix(name: str) -> str:
    """Return the prefix of all that belongs to a model's name."""
    if not _NAME.fullmatch(name):
        raise BadKey(f"model name {name!r}: expected 1 to 128 of a-z 0-9 . _ -, a letter or digit at both ends")
    return f"models/{name}/"


def versions_prefix(name: str) -> str:
    """Return the prefix of a model's manifests and reports."""
    return f"{model_prefix(name)}versions/"


def tags_prefix(name: str) -> str:
    """Return the prefix of a model's tags."""
    return f"{model_prefix(name)}tags/"


def manifest_key(name: str, version: int) -> str:
    """Return the key of a version's manifest; versions count from 1."""
    if not 1 <= version <= MAX_VERSION:
        raise BadKey(f"version {version} of {name!r}: expected 1 to {MAX_VERSION}")
    return f"{versions_prefix(name)}{version:08d}.json"


def manifest_version(key: str) -> int | None:
    """Return the version whose manifest a key names, or None where it names a report or something foreign."""
    match = _MANIFEST_FILE.fullmatch(key.rpartition("/")[2])
    return int(match[1]) if match else None


def is_report_key(key: str, name: str, version: int) -> bool:
    """Tell whether a key is exactly that of a report beside this version."""
    stem = manifest_key(name, version).removesuffix("json")
    return key.startswith(stem) and key.endswith(".json") and _REPORT.fullmatch(key[len(stem) : -5]) is not None


def report_key(name: str, version: int, report: str) -> str:
    """Return the key of a report beside a version's manifest: measurements, never part of the version."""
    if not _REPORT.fullmatch(report):
        raise BadKey(f"report name {report!r}: expected 1 to 64 of a-z 0-9 _ -, a letter or digit at both ends")
    return f"{manifest_key(name, version).removesuffix('.json')}.{report}.json"


def job_prefix(digest: str) -> str:
    """Return the prefix of all that a job, or a request for one, keeps in the store."""
    return f"jobs/{digest_hex(digest)}/"


def check_tag(tag: str) -> str:
    """Return the tag, or raise `BadKey`: named like a model, and never all digits, which would read as a version."""
    if not _NAME.fullmatch(tag) or tag.isdigit():
        raise BadKey(
            f"tag {tag!r}: expected 1 to 128 of a-z 0-9 . _ -, a letter or digit at both ends, not digits alone"
        )
    return tag


def tag_key(name: str, tag: str) -> str:
    """Return the key of a tag."""
    return f"{tags_prefix(name)}{check_tag(tag)}.json"


def entries_prefix(name: str) -> str:
    """Return the prefix of the numbered entries of a model's tags: not below ``tags/``, which older releases list."""
    return f"{model_prefix(name)}entries/"


def entry_key(name: str, tag: str, number: int) -> str:
    """Return the key of a tag's entry; entries count from 1."""
    if not 1 <= number <= MAX_VERSION:
        raise BadKey(f"entry {number} of tag {tag!r} of {name!r}: expected 1 to {MAX_VERSION}")
    return f"{entries_prefix(name)}{check_tag(tag)}/{number:08d}.json"


def newest_entry_key(name: str, tag: str) -> str:
    """Return the key of the copy of a tag's newest entry: a hint where to look, overwritten by each writer."""
    return f"{entries_prefix(name)}{check_tag(tag)}/newest.json"
