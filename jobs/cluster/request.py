"""What a job asks for, as a digest, before any of it is staged.

The digest of a *request* is cheap: it names files by their content or revision and builds no network. Two requests with
the same digest are one; two that differ may still turn out to be one *job* (``JobSpec.identity``), and then share its
ledger.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jobs.spec.job import METHOD_VERSIONS, JobSpec
from jobs.stages.code import code_of
from jobs.versions import tool_versions
from storage.digest import digest_bytes, digest_file, file_version
from storage.errors import BadStoreURI
from storage.manifest import canonical_json
from storage.stores.s3 import S3Store
from storage.stores.s3_errors import boto_errors, translate
from storage.stores.uri import open_store
from workers.errors import CheckpointError
from workers.inputs.entry import LIBRARY
from workers.inputs.files import CHECKPOINT, IMAGES, LABELS, InputKind, local_path, reading
from workers.inputs.images import open_images
from workers.scratch import scratch


def request_digest(spec: JobSpec) -> str:
    """Return ``sha256:<hex>`` of everything that can change a job's result.

    That is the model and its weights, the recipe, the image sets and the method's version; neither the cluster nor the
    store counts.

    Raises:
        CheckpointError, storage.StorageError: a file that the spec names is not there.
    """
    document: dict[str, Any] = spec.model_dump(
        mode="json", exclude={"cluster": True, "store": {"uri", "single_writer"}}
    )
    document["method"] = METHOD_VERSIONS[spec.recipe]
    document["quantize"] = spec.effective_quantize.model_dump(mode="json")
    document["model"]["revision"] = revision(spec)
    document["model"].pop("checkpoint")
    code = document["model"].pop("code")
    if code is not None:  # a key of later releases, as is 'weights': requests without it keep their digest
        with scratch("job") as folder:
            document["model"]["code"] = digest_bytes(code_of(code, folder))
    if document["model"]["weights"] is None:
        document["model"].pop("weights")
    for section in ("calibration", "evaluate"):
        if document[section] is not None:
            document[section]["data"] = _images_revision(document[section]["data"])
    if document["labels"] is None:  # as above
        document.pop("labels")
    elif document["labels"]["file"] is not None:
        document["labels"]["file"] = _file_revision(document["labels"]["file"], LABELS)
    return digest_bytes(canonical_json(document))


def revision(spec: JobSpec) -> str:
    """Return which weights the spec means: a file's digest or ETag, or the library's version and the seed."""
    model = spec.model
    if model.checkpoint is not None:
        return _file_revision(model.checkpoint)
    if model.library == LIBRARY:
        return f"random_seed {model.random_seed}"
    library = f"{model.library} {tool_versions((model.library,))[model.library]}"
    return f"{library} pretrained" if model.pretrained else f"{library} random_seed {model.random_seed}"


def _file_revision(uri: str, kind: InputKind = CHECKPOINT) -> str:
    if uri.startswith("s3://"):
        return object_revision(uri)
    path = local_path(uri)
    if not path.is_file():
        raise kind.missing(uri)
    return _sha256(path.resolve(), file_version(path.stat()))


def object_revision(uri: str) -> str:
    """Return what one HEAD tells of the bytes that an s3:// URI names.

    Raises:
        storage.StorageError: it is not there, or these credentials may not read it.
    """
    store = open_store(uri)
    if not isinstance(store, S3Store) or not store.prefix:
        raise BadStoreURI(f"{uri} names a bucket; expected s3://bucket/path/to/file")
    key = store.prefix.rstrip("/")
    try:
        answer = store.client.head_object(Bucket=store.bucket, Key=key)
    except boto_errors() as error:
        raise translate(error, operation="HEAD", key=key, store=store) from error
    return f"etag {answer['ETag']} {answer['ContentLength']} bytes"


def _images_revision(uri: str) -> str:
    with reading(uri, IMAGES):
        path = local_path(uri)
        folder = path.is_dir()
    return open_images(path, uri=uri).digest() if folder else _file_revision(uri, IMAGES)


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, version: str) -> str:
    """Hash a file once, however many jobs name it; a file written again is another key."""
    digest = digest_file(path)
    if file_version(path.stat()) != version:
        raise CheckpointError(f"{path} was written to while it was read; wait for its writer and run again.")
    return digest
