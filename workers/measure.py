"""Accuracy of a published version, measured on what a device gets: shards pulled back from the store.

One task is one range of the images in one mode. What it counts are integers, its batches are those of a run over the
whole set where it begins at a multiple of the batch size, and its record stands in the job's ledger: any split over
workers, and a run that goes on where another ended, add up to the same.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from nestquant.engines.images import Preprocessing
from storage.device import Device, StoreSource
from storage.manifest import Record
from storage.registry import Registry
from storage.stores.uri import open_store
from workers import runtime
from workers.errors import DataError
from workers.evaluate import Accuracy, Counts, count_answers
from workers.inputs import own
from workers.inputs.checkpoint import open_network
from workers.inputs.images import ImageSet, fetch_images, none_readable
from workers.ledger import Ledger
from workers.scratch import scratch
from workers.tasks import NetworkRef


class MeasureTask(Record):
    """Measure one mode of one version on the images ``start:stop``, ``start`` a multiple of ``batch_size``.

    ``level`` None measures the float network from its source. ``cache`` is a device's folder that holds the
    version already, where the worker can see it; else the worker pulls the version itself. ``series`` names what the
    counts rest on beside the task (`jobs.stages.evaluation`), for the ledger of ``job``; None keeps no record.
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
    start: int
    stop: int
    batch_size: int
    job: str = ""
    series: str | None = None

    @property
    def mode_key(self) -> str:
        """Return the mode as a part of a key: of levels, their number says more than the word."""
        if self.level is None:
            return "float"
        return f"level{self.level}{'-activations' if self.activations else ''}"


class MeasuredRange(Record):
    """Answers of one mode on the images ``start:stop``; ``skipped`` of them, (name, reason), could not be used."""

    start: int
    stop: int
    counts: Counts
    skipped: tuple[tuple[str, str], ...]
    resident_bytes: int | None
    seconds: float


class Measured(Record):
    """Right answers of one mode; ``seconds`` of all workers together, with reading the images."""

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


def measure(task: MeasureTask) -> MeasuredRange:
    """Measure one mode on a range of images, or return what an earlier run of the job measured.

    Raises:
        WorkError: the images or the version cannot be read, or the answers are not finite.
    """
    if task.series is None:
        return _measure(task)
    ledger = Ledger(Registry(open_store(task.store_uri)), task.job)
    key = ledger.measured_key(task.series, task.mode_key, task.start, task.stop)
    earlier = ledger.find(key, MeasuredRange)
    if earlier is not None:
        return earlier
    measured = _measure(task)
    ledger.keep(key, measured)
    return measured


def _measure(task: MeasureTask) -> MeasuredRange:
    with scratch("measure") as folder:
        nested = None if task.level is None else _nested(task, folder)
        network = open_network(task.network) if nested is None else nested.network
        return measure_range(
            nested or network,
            fetch_images(task.data, folder),
            Preprocessing.from_record(task.network.preprocessing),
            activations=task.activations,
            name=f"{task.network.library} {task.network.arch} ({task.mode})",
            batch_size=task.batch_size,
            start=task.start,
            stop=task.stop,
        )


def measure_range(
    model: runtime.NestedModel | nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    activations: bool,
    name: str,
    batch_size: int,
    start: int,
    stop: int,
) -> MeasuredRange:
    """Measure a network as it stands, a nested one at its present level; its residency is packed again afterwards.

    Args:
        model: a nested model, or a float network.
        images: labelled images; what they skip is counted anew.
        preprocessing: from an image to the network's input.
        activations: quantize activations of a nested model too.
        name: what messages call the network.
        batch_size: images in one forward pass.
        start: the first image.
        stop: the first image that does not count.

    Raises:
        WorkError: the images cannot be read, or answers are not finite.
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
        counts = count_answers(network, images, preprocessing, batch_size=batch_size, start=start, stop=stop, name=name)
    finally:
        if nested is not None:
            nested.set_residency("packed")
    return MeasuredRange(
        start=start,
        stop=stop,
        counts=counts,
        skipped=tuple(images.skipped),
        resident_bytes=resident,
        seconds=time.perf_counter() - begin,
    )


def join_ranges(
    parts: Sequence[MeasuredRange], *, mode: str, level: int | None, activations: bool, data: str
) -> tuple[Measured, Counts]:
    """Add the ranges of one mode up.

    Args:
        parts: every range once, in the images' order.
        mode: the word for it in results.
        level: the level, None for the float network.
        activations: they were quantized too.
        data: what the user calls the image set.

    Returns:
        What the mode reached, and the counts by class behind it.

    Raises:
        DataError: not one image could be used.
    """
    assert all(one.stop == following.start for one, following in itertools.pairwise(parts)), parts
    counts = sum((part.counts for part in parts), Counts())
    skipped = tuple(image for part in parts for image in part.skipped)
    if counts.total == 0:
        raise DataError(none_readable(data, skipped))
    measured = Measured(
        mode=mode,
        level=level,
        activations=activations,
        correct=counts.correct,
        total=counts.total,
        skipped=skipped,
        resident_bytes=parts[0].resident_bytes,
        seconds=sum(part.seconds for part in parts),
    )
    return measured, counts


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
