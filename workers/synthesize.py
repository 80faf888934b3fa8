"""Images for users without any, and the network fitted to them: the recipe ``data_free`` on workers.

Each chunk of images comes from a seed of its own, and so do the BatchNorm statistics that it leads to; chunks are added
in their order. Any number of workers gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from nestquant.engines.images import Preprocessing
from nestquant.norm_statistics import NormSums, NotFinite, put_statistics, take_statistics
from nestquant.synthetic import synthetic_images
from storage.digest import digest_bytes
from storage.manifest import Digest, Record
from storage.registry import Registry
from storage.stores.uri import open_store
from storage.tensor_file import load_tensors, save_tensors
from workers.errors import DataError, WorkError
from workers.forward import extents, network_boundary
from workers.inputs.checkpoint import open_network
from workers.ledger import Ledger
from workers.tasks import TaskContext
from workers.threads import threads

SAMPLES = 128
CHUNK = 32
"""Images of one chunk, each with statistics of its own: fewer would not do for the layers with few positions."""

_RECORD = "record.json"


class SynthesizeTask(Record):
    """Make one chunk of images, and take the network's BatchNorm statistics on them."""

    context: TaskContext
    samples: int
    chunk: int


class JoinTask(Record):
    """Join the chunks to one image set and one network."""

    context: TaskContext
    chunks: int


class SyntheticRecord(Record):
    """What a job made: keys in its store.

    ``network`` is the checkpoint with its BatchNorm statistics taken on the images; None where it has none to take.
    """

    images: str
    digest: Digest
    samples: int
    network: str | None
    norms: int


def find_synthetic(registry: Registry, job: str) -> SyntheticRecord | None:
    """Return the record of an earlier run of the job, if what it made is still there."""
    ledger = Ledger(registry, job)
    record = ledger.find(ledger.synthetic_key(_RECORD), SyntheticRecord)
    if record is None:
        return None
    there = [registry.store.exists(key) for key in (record.images, record.network) if key is not None]
    return record if all(there) else None


def synthesize(task: SynthesizeTask) -> int:
    """Store a chunk: its images as ``x`` uint8 ``[N, H, W, C]``, and the sums of each BatchNorm's inputs; return N.

    Raises:
        DataError: the network takes images of neither one nor three channels.
        WorkError: what goes into a BatchNorm is not finite; the message names it.
        ModelError: the network does not run on the images.
    """
    preprocessing = Preprocessing.from_record(task.context.network.preprocessing)
    network, name = open_network(task.context.network), task.context.network.title
    images, statistics = make_chunk(network, preprocessing, task.samples, task.chunk, name)
    tensors: dict[str, Any] = {"x": images.numpy()}
    for name, sums in statistics.items():
        tensors |= {
            f"count/{name}": np.array([sums.count]),
            f"value/{name}": sums.value.numpy(),
            f"square/{name}": sums.square.numpy(),
        }
    ledger = Ledger(Registry(open_store(task.context.store_uri)), task.context.job)
    ledger.registry.store.put(_chunk_key(ledger, task.chunk), save_tensors(tensors, {}), mode="overwrite")
    return task.samples


def make_chunk(
    network: nn.Module, preprocessing: Preprocessing, samples: int, chunk: int, name: str
) -> tuple[Tensor, dict[str, NormSums]]:
    """Return a chunk's images, uint8 ``[N, H, W, C]``, and by BatchNorm layer the sums of its inputs.

    ``chunk`` is the images' seed, ``name`` what messages call the network. Raises as ``synthesize`` does.
    """
    channels, height, width = preprocessing.input_shape
    if channels not in (1, 3):
        raise DataError(f"recipe 'data_free': {channels} channels; expected a network of 1 or 3.")
    # One thread: how a sum is split over threads changes its last bit.
    with threads(1):
        images = synthetic_images(
            samples, max(height, width), mean=preprocessing.mean, std=preprocessing.std, seed=chunk
        )
        top, side = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
        images = images[:, top : top + height, side : side + width].contiguous()
        inputs = normalised(images, preprocessing)
        with network_boundary(network, f"{name} cannot run on inputs of {extents(inputs)}"):
            try:
                statistics = take_statistics(network, inputs)
            except NotFinite as error:
                raise WorkError(f"{name}: {error}") from error
    return images, statistics


def join(task: JoinTask) -> SyntheticRecord:
    """Write the image set and the fitted network, then the record that says so; the chunks are deleted."""
    registry = Registry(open_store(task.context.store_uri))
    ledger = Ledger(registry, task.context.job)
    keys = [_chunk_key(ledger, chunk) for chunk in range(task.chunks)]
    chunks = [load_tensors(registry.store.get(key))[0] for key in keys]
    stream, images = io.BytesIO(), np.concatenate([np.asarray(chunk["x"]) for chunk in chunks])
    np.savez(stream, x=images)
    content = stream.getvalue()
    statistics = _merged(chunks)
    if statistics:
        network = open_network(task.context.network)
        put_statistics(network, statistics)
        state = {name: tensor.detach().contiguous().clone() for name, tensor in network.state_dict().items()}
        registry.store.put(ledger.synthetic_key("network.safetensors"), save(state), mode="overwrite")
    registry.store.put(ledger.synthetic_key("images.npz"), content, mode="overwrite")
    record = SyntheticRecord(
        images=ledger.synthetic_key("images.npz"),
        digest=digest_bytes(content),
        samples=len(images),
        network=ledger.synthetic_key("network.safetensors") if statistics else None,
        norms=len(statistics),
    )
    ledger.replace(ledger.synthetic_key(_RECORD), record)
    for key in keys:
        registry.store.delete(key)
    return record


def _merged(chunks: Sequence[Any]) -> dict[str, NormSums]:
    names = [key.removeprefix("count/") for key in chunks[0] if key.startswith("count/")]
    return {name: NormSums.merge([_sums(chunk, name) for chunk in chunks]) for name in names}


def _sums(chunk: Any, name: str) -> NormSums:
    value, square = (torch.from_numpy(chunk[f"{field}/{name}"].copy()) for field in ("value", "square"))
    return NormSums(int(chunk[f"count/{name}"][0]), value, square)


def _chunk_key(ledger: Ledger, chunk: int) -> str:
    return ledger.synthetic_key(f"chunk-{chunk:06d}.safetensors")


def normalised(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return float32 ``[N, C, H, W]``, as ``workers.inputs.images.to_input`` does for one image."""
    mean, std = (torch.tensor(values, dtype=torch.float32) for values in (preprocessing.mean, preprocessing.std))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
