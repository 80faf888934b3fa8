"""A job's float network with the channels of its activations equalized, for the stages that solve and publish it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from nestquant.engines.images import Preprocessing
from nestquant.equalization import channel_gains, channel_sizes, equalize, find_sites
from nestquant.surgery import shallow_copy
from storage.manifest import Record
from storage.registry import Registry
from storage.stores.uri import open_store
from workers.forward import network_boundary
from workers.inputs.checkpoint import open_network
from workers.inputs.images import fetch_images
from workers.inputs.tensors import open_tensors
from workers.ledger import Ledger
from workers.scratch import scratch
from workers.tasks import TaskContext
from workers.threads import threads

DEPTHWISE_POWER = 1.3
"""Of a channel's size, where depthwise layers alone read it: their weights have a scale for each channel anyway."""

POWER = 0.2
"""The same where other layers read it: their weights have one grid for channels that grow apart."""

SAMPLES = 256
"""Images that sizes of channels are read from, at most."""

_TOLERANCE = 1e-3
"""Of the largest answer: float32 sums of factors other than powers of two."""


class EqualizedSite(Record):
    """One tensor whose channels were resized: what makes it, the layers that read it, and the power."""

    source: str
    readers: tuple[str, ...]
    power: float


class EqualizeTask(Record):
    """Equalize a job's network by every ``step``-th of the ``samples`` images taken of a set."""

    context: TaskContext
    data: str
    samples: int
    batch_size: int


class EqualizedRecord(Record):
    """What was resized, and the network's key in the job's store; None where nothing was."""

    network: str | None
    sites: tuple[EqualizedSite, ...]


def find_equalized(registry: Registry, job: str) -> EqualizedRecord | None:
    """Return the record of an earlier run of the job, if the network is still there."""
    ledger = Ledger(registry, job)
    record = ledger.find(ledger.equalized_key("record.json"), EqualizedRecord)
    there = record is not None and (record.network is None or registry.store.exists(record.network))
    return record if there else None


def sample_step(count: int) -> int:
    """Return which share of so many images is looked at: every n-th."""
    return -(-count // SAMPLES)


def equalized_recipe(sites: Sequence[EqualizedSite]) -> dict[str, Any]:
    """Return what the manifest's recipe says of it: nothing where nothing was resized."""
    return {"equalized": [site.model_dump(mode="json") for site in sites]} if sites else {}


@torch.no_grad()
def equalized(network: nn.Module, batches: Iterable[Tensor], name: str) -> tuple[nn.Module, tuple[EqualizedSite, ...]]:
    """Return a network that answers as ``network`` does, its activations' channels closer to one size.

    Args:
        network: in eval mode on the CPU; it is not changed, and shares what is not resized.
        batches: calibration inputs ``[N, ...]``; the first alone is read where no channel can be resized.
        name: what messages call the network.

    The network itself where no channel can be resized.

    Raises:
        ModelError: the network does not run on the inputs.
    """
    with threads(1):
        first = next(remaining := iter(batches), None)
        if first is None:
            return network, ()
        example = first[:1]
        sites = find_sites(network, example)
        if not sites:
            return network, ()
        with network_boundary(network, f"{name} cannot run on calibration images"):
            sizes = channel_sizes(network, sites, itertools.chain([first], remaining))
        copied = shallow_copy(network)
        records = []
        for site in sites:
            power = DEPTHWISE_POWER if site.depthwise else POWER
            if not bool(torch.isfinite(sizes[site.source]).all()):
                continue  # the stages behind name the layer
            equalize(copied, site, channel_gains(sizes[site.source], power))
            readers = tuple(reader.layer for reader in site.readers)
            records.append(EqualizedSite(source=site.source, readers=readers, power=power))
        before, after = network(example), copied(example)
    same = isinstance(before, Tensor) and torch.allclose(
        after, before, rtol=0, atol=_TOLERANCE * float(before.abs().max())
    )
    return (copied, tuple(records)) if same else (network, ())


def equalize_network(task: EqualizeTask) -> EqualizedRecord:
    """Store the equalized network of a job under the names of its checkpoint, then the record that says so.

    Raises:
        DataError: the image set cannot be read.
        ModelError: the network does not run on the images.
    """
    context = task.context
    network = open_network(context.network)
    preprocessing = Preprocessing.from_record(context.network.preprocessing)
    with scratch("equalize") as folder, threads(1):
        images = fetch_images(task.data, folder).sample(task.samples)
        images = images.take(range(0, len(images), sample_step(len(images))))
        pairs = images.batches(preprocessing, batch_size=task.batch_size, start=0, stop=len(images))
        resized, sites = equalized(network, (inputs for inputs, _ in pairs), context.network.title)
    registry = Registry(open_store(context.store_uri))
    ledger = Ledger(registry, context.job)
    key = ledger.equalized_key("network.safetensors") if sites else None
    if key is not None:
        own, changed, reader = network.state_dict(), resized.state_dict(), open_tensors(context.network.source)
        state = {
            name: (
                changed[name].detach().clone().contiguous()
                if name in own and own[name].data_ptr() != changed[name].data_ptr()
                else reader.read(name).clone().contiguous()
            )
            for name in reader.tensors
        }
        registry.store.put(key, save(state), mode="overwrite")
    record = EqualizedRecord(network=key, sites=sites)
    ledger.replace(ledger.equalized_key("record.json"), record)
    return record
