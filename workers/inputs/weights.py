"""Weights that a library makes: its pretrained ones, or random ones from a seed, made where the work is done.

A network of a billion weights is 4 GB in memory while it is made; the driver sees the file's name and digest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from storage.layout import blob_key
from storage.manifest import Digest, Origin, Record
from storage.registry import Registry
from storage.stores.uri import open_store
from workers.inputs import own
from workers.inputs.checkpoint import pretrained_state, random_state, save_state
from workers.inputs.tensors import TensorReader
from workers.inputs.writing import writing
from workers.scratch import scratch
from workers.tasks import Code, TensorSource

MEDIA_TYPE_CHECKPOINT = "application/vnd.safetensors"
MADE_BYTES_PER_BYTE = 2
"""Peak bytes in memory for each byte of the file: the network, and the downloaded state dict or a tensor's scratch."""


class WeightsTask(Record):
    """Make the float weights of a network.

    ``random_seed`` None stands for the library's pretrained ones. The file goes into ``folder``, which the driver sees
    too, or into the store at ``store_uri``.
    """

    library: Origin
    arch: str
    kwargs: dict[str, object]
    random_seed: int | None
    folder: str | None
    store_uri: str | None
    code: Code | None = None


class MadeWeights(Record):
    """Where the file lies, and its digest."""

    source: TensorSource
    digest: Digest


def make_weights(task: WeightsTask) -> MadeWeights:
    """Make the weights and keep them as one safetensors file; safe to run twice, also at once.

    Raises:
        ModelError: unknown name or arguments, or no pretrained weights to be had.
        CheckpointError: values that no network computes with.
        storage.StorageError: the store refused.
    """
    kwargs = dict(task.kwargs)
    if task.code is not None:
        own.use(task.code)
    with scratch("weights", parent=task.folder) as place:
        state = (
            pretrained_state(task.library, task.arch, kwargs)
            if task.random_seed is None
            else random_state(task.library, task.arch, kwargs, task.random_seed)
        )
        with writing(place):
            path = save_state(state, place / "weights.safetensors")
        del state
        what = "pretrained weights" if task.random_seed is None else f"weights of random_seed {task.random_seed}"
        reader = TensorReader(TensorSource(None, str(path), name=f"{task.library} {task.arch}, {what}"))
        digest, source = reader.checked_digest(), reader.pinned
        if task.store_uri is None:
            assert task.folder is not None
            final = path.replace(Path(task.folder) / "weights.safetensors")
            return MadeWeights(source=replace(source, key=str(final)), digest=digest)
        registry = Registry(open_store(task.store_uri))
        registry.put_file(path, digest=digest, media_type=MEDIA_TYPE_CHECKPOINT)
        stored = TensorSource(registry.store.uri, blob_key(digest), name=source.name)
        return MadeWeights(source=stored, digest=digest)
