"""The code of an architecture of a team's own: brought to where workers read it, and imported here."""

from __future__ import annotations

from pathlib import Path

from jobs.spec.model import ModelSpec
from storage.digest import digest_bytes
from storage.layout import blob_key
from storage.registry import Registry
from workers.errors import ModelError
from workers.inputs import own
from workers.inputs.entry import LIBRARY, is_entry
from workers.inputs.files import fetch
from workers.inputs.writing import write_pieces
from workers.scratch import scratch
from workers.tasks import Code

MEDIA_TYPE_CODE = "application/zip"


def stage_code(spec: ModelSpec, folder: Path, registry: Registry | None) -> Code | None:
    """Return the code of the spec's factory, ready to be built here; None for a library's network.

    Args:
        spec: the section ``model``.
        folder: a scratch folder of this job.
        registry: where to put the code for workers on other machines; None where workers see this machine's files.

    Raises:
        ModelError: it cannot be imported, or there is none.
        storage.StorageError: the store refused.
    """
    if spec.library != LIBRARY:
        return None
    code = Code(entry=spec.arch, digest=own.installed_digest(spec.arch)) if spec.code is None else None
    if code is None:
        assert spec.code is not None
        data = code_of(spec.code, folder)
        digest = digest_bytes(data)
        if registry is None:
            path = folder / "code.zip"
            write_pieces([data], path)
            code = Code(entry=spec.arch, digest=digest, key=str(path))
        else:
            registry.put_blob(data, MEDIA_TYPE_CODE)
            code = Code(entry=spec.arch, digest=digest, store=registry.store.uri, key=blob_key(digest))
    own.use(code)
    return code


def trust_entry(entry: str, uri: str | None) -> None:
    """Let this process build the networks of one factory, for whoever reads a version of an architecture of their own.

    Raises:
        ModelError: it is no name of a function, or cannot be imported.
    """
    if not is_entry(entry):
        raise ModelError(f"--factory {entry}: expected package.module:function, such as my_nets:build.")
    with scratch("job") as folder:
        stage_code(ModelSpec(library=LIBRARY, arch=entry, code=uri, random_seed=0), folder, None)


def code_of(uri: str, folder: Path) -> bytes:
    """Return ``model.code`` as a zip, whatever it names: a file, a folder, or an s3:// URI of a zip.

    Raises:
        ModelError: it is no Python code.
    """
    return own.pack(fetch(uri, folder, own.CODE), uri)
