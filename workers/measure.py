"""Accuracy of a published version, measured on what a device gets: shards pulled back from the store."""

from __future__ import annotations

import time
from pathlib import Path

from storage.device import Device, StoreSource
from storage.manifest import Record
from storage.stores.uri import open_store
from workers import runtime
from workers.errors import DataError
from workers.evaluate import Accuracy, chance_fault, top1
from workers.inputs.checkpoint import open_network
from workers.inputs.images import fetch_images
from workers.inputs.networks import Preprocessing
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
    begin = time.perf_counter()
    with scratch("measure") as folder:
        resident: int | None = None
        if task.level is None:
            network = open_network(task.network)
        else:
            nested = _nested(task, folder)
            nested.quantize_activations(enabled=task.activations)
            resident, network = nested.resident_bytes(), nested.network
            # Accuracy does not depend on residency (tested), and a measurement runs each layer hundreds of times.
            nested.set_residency("expanded")
        images = fetch_images(task.data, folder)
        preprocessing = Preprocessing.from_record(task.network.preprocessing)
        name = f"{task.network.library} {task.network.arch} ({task.mode})"
        accuracy = top1(network, images, preprocessing, batch_size=task.batch_size, limit=task.limit, name=name)
        if task.level is None and task.refuse_chance and accuracy.is_chance:
            raise DataError(chance_fault(accuracy, images))
    return Measured(
        mode=task.mode,
        level=task.level,
        activations=task.activations,
        correct=accuracy.correct,
        total=accuracy.total,
        skipped=tuple(images.skipped),
        resident_bytes=resident,
        seconds=time.perf_counter() - begin,
    )


def _nested(task: MeasureTask, folder: Path) -> runtime.NestedModel:
    assert task.level is not None
    if task.cache is not None:
        device = Device(Path(task.cache))
    else:
        device = Device(folder / "cache", StoreSource(open_store(task.store_uri)), unsigned=True)
        device.pull(task.name, str(task.version), level=task.level)
    return runtime.load(device.manifest(task.name), device.blob_path, level=task.level)
