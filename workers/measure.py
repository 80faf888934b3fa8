"""Accuracy of a published version, measured on what a device gets: shards pulled back from the store."""

from __future__ import annotations

import time
from pathlib import Path

from torch import nn

from nestquant.engines.images import Preprocessing
from storage.device import Device, StoreSource
from storage.manifest import Record
from storage.stores.uri import open_store
from workers import runtime
from workers.errors import DataError
from workers.evaluate import Accuracy, chance_fault, top1
from workers.inputs import own
from workers.inputs.checkpoint import open_network
from workers.inputs.images import ImageSet, fetch_images
from workers.scratch import scratch
from workers.tasks import NetworkRef


class MeasureTask(Record):
    """Measure one mode of one version.

    ``level`` None measures the float network from its source. ``cache`` is a device's folder that holds the
    version already, where the worker can see it; else the worker pulls the version itself. ``refuse_chance``: a float
    network whose answers have nothing to do with the labels is an error.
    """

    mode: str
    level: int | None
    activations: bool
    network: NetworkRef
    store_uri: str
    name: str
    version: int
    cache: str | None
    data: str
    limit: int | None
    batch_size: int
    refuse_chance: bool


class Measured(Record):
    """Right answers of one mode."""

    mode: str
    level: int | None
    activations: bool
    correct: int
    total: int
    skipped: tuple[tuple[str, str], ...]
    resident_bytes: int | None
    seconds: float

    @property
    def accuracy(self) -> Accuracy:
        """Return top-1 with its standard error."""
        return Accuracy(self.correct, self.total)


def measure(task: MeasureTask) -> Measured:
    """Measure one mode.

    Raises:
        WorkError: the images or the version cannot be read, the answers are not finite, or those of the float network
            are chance.
    """
    with scratch("measure") as folder:
        nested = None if task.level is None else _nested(task, folder)
        network = open_network(task.network) if nested is None else nested.network
        images = fetch_images(task.data, folder)
        return measure_mode(
            nested or network,
            images,
            Preprocessing.from_record(task.network.preprocessing),
            mode=task.mode,
            activations=task.activations,
            name=f"{task.network.library} {task.network.arch} ({task.mode})",
            batch_size=task.batch_size,
            limit=task.limit,
            refuse_chance=task.level is None and task.refuse_chance,
        )


def measure_mode(
    model: runtime.NestedModel | nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    mode: str,
    activations: bool,
    name: str,
    batch_size: int,
    limit: int | None,
    refuse_chance: bool = False,
) -> Measured:
    """Measure a network as it stands, a nested one at its present level; its residency is packed again afterwards.

    Args:
        model: a nested model, or a float network.
        images: labelled images; what they skip is counted anew.
        preprocessing: from an image to the network's input.
        mode: the word for it in results.
        activations: quantize activations of a nested model too.
        name: what messages call the network.
        batch_size: images in one forward pass.
        limit: use the first so many images.
        refuse_chance: answers that have nothing to do with the labels are an error.

    Raises:
        WorkError: the images cannot be read, answers are not finite, or they are chance where that is refused.
    """
    begin = time.perf_counter()
    images.skipped.clear()
    nested = model if isinstance(model, runtime.NestedModel) else None
    network = model.network if isinstance(model, runtime.NestedModel) else model
    resident: int | None = None
    if nested is not None:
        nested.quantize_activations(enabled=activations)
        resident = nested.resident_bytes()
        # Accuracy does not depend on residency (tested), and a measurement runs each layer hundreds of times.
        nested.set_residency("expanded")
    try:
        accuracy = top1(network, images, preprocessing, batch_size=batch_size, limit=limit, name=name)
    finally:
        if nested is not None:
            nested.set_residency("packed")
    if refuse_chance and accuracy.is_chance:
        raise DataError(chance_fault(accuracy, images))
    return Measured(
        mode=mode,
        level=None if nested is None else nested.level,
        activations=activations,
        correct=accuracy.correct,
        total=accuracy.total,
        skipped=tuple(images.skipped),
        resident_bytes=resident,
        seconds=time.perf_counter() - begin,
    )


def _nested(task: MeasureTask, folder: Path) -> runtime.NestedModel:
    assert task.level is not None
    if task.network.code is not None:  # the job's own word, not the manifest's
        own.use(task.network.code)
    if task.cache is not None:
        device = Device(Path(task.cache))
    else:
        device = Device(folder / "cache", StoreSource(open_store(task.store_uri)), unsigned=True)
        device.pull(task.name, str(task.version), level=task.level)
    return runtime.load(device.manifest(task.name), device.blob_path, level=task.level)
