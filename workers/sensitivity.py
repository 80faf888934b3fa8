"""How much a network loses when one layer alone runs part-bit: the divergence of its answers from the float network's.

One task is one layer with all its candidate widths, over the same first images of the calibration set, one thread,
sums in float64 in the order of the images: its result depends on nothing but itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestquant.calibrated import calibrate_weight
from nestquant.engines.images import Preprocessing
from nestquant.modules import from_float
from nestquant.moments import Moments, UnreadableInputs, read_inputs
from nestquant.quantized_weight import QuantizedWeight, quantize_weight
from nestquant.surgery import replace
from nestquant.weight_transforms import WeightTransform
from storage.manifest import Record
from storage.registry import Registry
from storage.shard import build_shard
from storage.stores.uri import open_store
from workers.calibrate import NOISE_SEED
from workers.errors import DataError, WorkError
from workers.forward import check_input, run_network
from workers.inputs.checkpoint import open_network
from workers.inputs.images import fetch_images, spread
from workers.inputs.tensors import open_tensors
from workers.ledger import Ledger
from workers.pieces import PieceCode
from workers.quantize import losses, read_piece
from workers.scratch import scratch
from workers.tasks import PieceTask, TaskContext
from workers.threads import threads

NOISE_SAMPLES = 32
"""Images of noise where the job has none of its own."""

BATCH_SIZE = 32
"""Images of noise in one forward pass."""


class SensitivityTask(Record):
    """Measure one layer at each of ``candidates``: the bits of its levels, the last of which it runs at.

    Damage is measured on ``samples`` of the set's ``stop`` images, or on noise where ``data`` is None. With
    ``calibrated`` the layer's integers follow from its inputs on the others: on the images that chose them they would
    look better than they are. A set too small for both is halved.
    """

    context: TaskContext
    layer: PieceTask
    index: int
    candidates: tuple[tuple[int, ...], ...]
    calibrated: bool
    data: str | None
    samples: int
    stop: int
    batch_size: int


class Damage(Record):
    """What one layer at ``bits`` does to the network, all other layers float.

    ``divergence``: mean Kullback-Leibler divergence of the answers from the float network's, in nats. ``same``: images
    that get the same answer. ``lost``: what the float network's probability of its own answer exceeds that of the
    answer given, mean over the images: the share of right answers lost if its probabilities can be trusted. ``correct``
    counts right answers where there are labels. ``sqnr_db[0]`` is part-bit, the last full-bit, None where nothing was
    lost. ``flips`` as in ``PieceRecord``. ``shard_bytes`` of a level-0 shard of this layer alone.
    """

    bits: tuple[int, ...]
    divergence: float
    same: int
    lost: float
    correct: int | None
    sqnr_db: tuple[float | None, ...]
    flips: tuple[int, ...]
    shard_bytes: int


class SensitivityRecord(Record):
    """One layer, measured on ``images`` images; ``float_correct`` and each ``correct`` where they carry labels."""

    layer: str
    images: int
    noise: bool
    float_correct: int | None
    damages: tuple[Damage, ...]
    skipped: tuple[tuple[str, str], ...]

    def at(self, bits: tuple[int, ...]) -> Damage | None:
        """Return the damage at these bits, if it was measured."""
        return next((damage for damage in self.damages if damage.bits == bits), None)


@torch.inference_mode()
def measure_layer(task: SensitivityTask) -> SensitivityRecord:
    """Measure a layer, or return what an earlier run of the job measured.

    Raises:
        WorkError: naming the layer that cannot be quantized, or the image set that cannot be read.
    """
    ledger = Ledger(Registry(open_store(task.context.store_uri)), task.context.job)
    key = ledger.sensitivity_key(task.index, task.samples, task.candidates)
    earlier = ledger.find(key, SensitivityRecord)
    if earlier is not None:
        return earlier
    network, name = open_network(task.context.network), task.context.network.title
    weight = read_piece(open_tensors(task.context.network.source), task.layer)
    # One thread: how a sum is split over threads changes its last bit.
    with scratch("sensitivity") as folder, threads(1):
        judged, rest, skipped = _images(task, folder)
        labelled = all(int(labels.min()) >= 0 for _, labels in judged)
        reference, calls = _run_float(network, task, judged, rest)
        module = network.get_submodule(task.layer.layer)
        damages = []
        for bits in task.candidates:
            quantized = _quantized(task, weight, bits, calls)
            layer = from_float(module, quantized, residency="expanded")
            layer.nested.set_level(0)
            replace(network, task.layer.layer, layer)
            answers = _Answers.compare(network, judged, reference, f"{name} with {task.layer.layer!r} part-bit")
            replace(network, task.layer.layer, module)
            damages.append(_damage(task, weight, quantized, answers, labelled=labelled))
    record = SensitivityRecord(
        layer=task.layer.layer,
        images=sum(len(labels) for _, labels in judged),
        noise=task.data is None,
        float_correct=sum(_correct(logits, labels) for logits, (_, labels) in zip(reference, judged, strict=True))
        if labelled
        else None,
        damages=tuple(damages),
        skipped=skipped,
    )
    ledger.keep(key, record)
    return record


Batch = tuple[Tensor, Tensor]


def _images(task: SensitivityTask, folder: Path) -> tuple[list[Batch], list[Batch], tuple[tuple[str, str], ...]]:
    """Return the batches that damage is measured on, those that moments are taken from, and what was left out."""
    preprocessing = Preprocessing.from_record(task.context.network.preprocessing)
    if task.data is None:
        shape = (task.samples, *preprocessing.input_shape)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(NOISE_SEED))
        return [(one, torch.full((len(one),), -1)) for one in torch.split(noise, task.batch_size)], [], ()
    images = fetch_images(task.data, folder).sample(task.stop)
    stop = len(images)
    edge = min(task.samples, max(1, stop // 2)) if task.calibrated else min(task.samples, stop)
    # Spread over the set, as the samples are: a set is often sorted by class.
    first = spread(stop, edge)
    order = [*first, *sorted(set(range(stop)).difference(first))]
    images = images.take(order)
    judged = list(images.batches(preprocessing, batch_size=task.batch_size, stop=edge))
    rest = list(images.batches(preprocessing, batch_size=task.batch_size, start=edge)) if task.calibrated else []
    if not judged or (task.calibrated and not rest):
        raise DataError(
            f"calibration.data: {stop} images, {len(images.skipped)} of them unreadable, are too few to measure layers "
            "on; raise calibration.samples, or leave quantize.mixed and analysis out."
        )
    return judged, rest, tuple(images.skipped)


def _run_float(
    network: nn.Module, task: SensitivityTask, judged: Sequence[Batch], rest: Sequence[Batch]
) -> tuple[list[Tensor], _Calls]:
    """Return the float network's answers, and what the layer's inputs look like on the other images."""
    name = task.context.network.title
    reference = [_logits(network, inputs, name) for inputs, _ in judged]
    calls = _Calls()
    for inputs, _ in rest:
        with _watched(network.get_submodule(task.layer.layer), task.layer.layer, calls):
            run_network(network, inputs, name)
    return reference, calls


@dataclass
class _Calls:
    """The moments of a layer's inputs over all its calls, None before the first; what it does to its weight."""

    moments: Moments | None = None
    transform: WeightTransform | None = None


@contextmanager
def _watched(module: nn.Module, layer: str, calls: _Calls) -> Iterator[None]:
    """Add the moments of the layer's inputs up in ``calls``."""

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            check_input(layer, args[0])
            with suppress(UnreadableInputs):  # rounded without data, as the stage ``reconstruct`` does
                inputs = read_inputs(module, args[0])
                part = Moments.of(inputs.columns, inputs.columns)
                calls.moments = part if calls.moments is None else Moments.merge([calls.moments, part])
                calls.transform = inputs.transform

    handle = module.register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _quantized(task: SensitivityTask, weight: Tensor, bits: tuple[int, ...], calls: _Calls) -> QuantizedWeight:
    config = dataclasses.replace(task.layer.config, bits=bits)
    try:
        if calls.moments is None:
            return quantize_weight(weight, config)
        moments = [calls.moments] * config.level_count
        return calibrate_weight(weight, config, moments, groups=task.layer.groups, transform=calls.transform)
    except (ValueError, RuntimeError) as error:  # a RuntimeError is the linear algebra's
        raise WorkError(f"Layer {task.layer.layer!r}: {error}") from error


@dataclass(frozen=True)
class _Answers:
    """Sums over the images; see `Damage`."""

    images: int
    divergence: float
    same: int
    lost: float
    correct: int

    @classmethod
    def compare(cls, network: nn.Module, judged: Sequence[Batch], reference: Sequence[Tensor], name: str) -> _Answers:
        """Run the network and hold its answers against the float one's, batch after batch."""
        divergence, lost, same, correct, images = 0.0, 0.0, 0, 0, 0
        for (inputs, labels), expected in zip(judged, reference, strict=True):
            actual = _logits(network, inputs, name)
            own, other = expected.double().log_softmax(dim=1), actual.double().log_softmax(dim=1)
            answer, choice = expected.argmax(dim=1), actual.argmax(dim=1)
            divergence += float((own.exp() * (own - other)).sum())
            chances = own.exp()
            lost += float((chances.gather(1, answer[:, None]) - chances.gather(1, choice[:, None])).sum())
            same += int((answer == choice).sum())
            correct += _correct(actual, labels)
            images += len(labels)
        return cls(images, divergence, same, lost, correct)


def _logits(network: nn.Module, inputs: Tensor, name: str) -> Tensor:
    logits = run_network(network, inputs, name)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise WorkError(f"Layers are measured by the answers of a classifier; {name} gives none.")
    return logits


def _correct(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(dim=1) == labels).sum())


def _damage(
    task: SensitivityTask, weight: Tensor, quantized: QuantizedWeight, answers: _Answers, *, labelled: bool
) -> Damage:
    bits = quantized.config.bits
    lost = losses(task.layer.model_copy(update={"bits": bits}), weight, quantized)
    return Damage(
        bits=bits,
        divergence=answers.divergence / answers.images,
        same=answers.same,
        lost=answers.lost / answers.images,
        correct=answers.correct if labelled else None,
        sqnr_db=sqnr_db(lost.signal, lost.noise),
        flips=lost.flips,
        shard_bytes=shard_bytes(task.layer.layer, quantized),
    )


def sqnr_db(signal: float, noise: Sequence[float]) -> tuple[float | None, ...]:
    """Return signal-to-noise ratios in dB of sums of squares; None where nothing was lost."""
    return tuple(10 * math.log10(signal / level) if signal > 0 and level > 0 else None for level in noise)


def shard_bytes(name: str, quantized: QuantizedWeight) -> int:
    """Return the bytes of a level-0 shard that holds a layer alone: integers, grid and biases."""
    code = PieceCode(name, 0, quantized.parts[0].shape[0])
    return len(build_shard(code.integers(quantized, 0), code.grid(quantized)).data)
