"""Memory of the largest task of each stage, from above: what Ray is asked for, and what a machine must have.

The one place where memory is asked for. ``docs/performance.md`` holds the estimates against measured peaks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from jobs.spec.job import CalibrationSpec
from jobs.stages.job import Job
from jobs.stages.plan import Plan
from jobs.stages.weights import StagedModel
from nestquant.config import NestConfig
from nestquant.moments import input_blocks
from workers.calibrate import NOISE_BATCH
from workers.errors import Need
from workers.executor import Executor
from workers.sensitivity import BATCH_SIZE, NOISE_SAMPLES
from workers.synthesize import CHUNK, SAMPLES
from workers.tasks import PieceTask

PROCESS_BYTES = 480_000_000
"""A worker that has imported Ray, torch, timm and pytorchcv and done nothing yet, pages of shared libraries left out:
449 MB on the machine of ``docs/performance.md``."""

SLACK_BYTES = 100_000_000
"""Decoding one photograph of 12 megapixels (4 bytes a pixel, twice), compiled kernels, what the allocator keeps."""

BATCHES_PER_CHUNK = 2
_MATRICES = 10
"""Matrices ``K x K`` of float64 for each group that the largest step holds at once: moments of two parts, factors."""

_BYTES_TO_SOLVE = 48
"""For each weight of a layer that is quantized alone: float64 weight, grid, integers of every width."""

_SHARD_COPIES = 4
_BYTES_TO_UNPACK = 12
"""For each weight of a layer while it is unpacked: integers of two levels, two float weights."""

_EXPORTER_BYTES = 110_000_000
"""torch's exporter, onnxscript and ONNX Runtime once they have made and run the smallest graph (157 MB, of which some
are in the slack)."""

_EXPORT_COPIES = 5
"""Copies of the float network while it is traced and run, at most: the network, its trace, a level's integers, the
engine's weights twice. ResNet-50 takes nearly that."""

_NETWORK_COPIES = 4
"""Copies of the float weights when a network is fitted anew: the network, its state, the file twice."""


def task_needs(job: Job, executor: Executor) -> dict[str, Need]:
    """Return what a task of each stage that the job has needs, in the order of the stages.

    By ``executor`` follows how many members share the images of the stage ``reconstruct``.
    """
    spec, staged, plan = job.spec, job.staged, job.plan
    needs = []
    if spec.measures_layers:
        needs.append(sensitivity_need(job, sensitivity_samples(job)))
    if spec.recipe == "data_free":
        needs.append(_synthesis_need(job))
    network = _network_bytes(staged) + job.image_bytes
    activations, calibration, evaluation = spec.quantize.activations, spec.calibration, spec.evaluate
    if activations is not None:
        noise = calibration is None or activations.observer == "sigma"
        batch = NOISE_BATCH if noise or calibration is None else min(calibration.batch_size, calibration.samples)
        needs.append(_need("calibrate", network + batch * _forward_bytes(staged), "calibration.batch_size"))
    if spec.effective_quantize.equalizes and calibration is not None:
        batch = min(calibration.batch_size, calibration.samples)
        resident_bytes = _NETWORK_COPIES * _network_bytes(staged) + job.image_bytes
        needs.append(_need("equalize", resident_bytes + batch * _forward_bytes(staged), "calibration.batch_size"))
    if plan.solved_layers:
        images = calibration or CalibrationSpec(data="", samples=SAMPLES, batch_size=CHUNK)
        need_of = functools.partial(member_need, job, images)
        needs.append(need_of(gang_size(executor, images, need_of)))
    blobs = _SHARD_COPIES * spec.store.shard_bytes
    needs.append(Need("quantize", PROCESS_BYTES + plan.task_bytes + blobs, "store.shard_bytes"))
    if spec.export is not None:
        images = calibration or CalibrationSpec(data="", samples=SAMPLES, batch_size=CHUNK)
        batch = min(images.batch_size, images.samples)
        resident_bytes = (
            _EXPORT_COPIES * _network_bytes(staged) + job.image_bytes + blobs + batch * _forward_bytes(staged)
        )
        resident_bytes += _EXPORTER_BYTES
        needs.append(_need("export", resident_bytes, "calibration.batch_size"))
    if evaluation is not None:
        batch = min(evaluation.batch_size, evaluation.limit or evaluation.batch_size)
        resident_bytes = network + _packed_bytes(plan) + blobs + batch * _forward_bytes(staged)
        needs.append(_need("evaluate", resident_bytes, "evaluate.batch_size"))
    return {need.stage: need for need in needs}


def sensitivity_samples(job: Job) -> int:
    """Return how many images a layer's damage is measured on, as the spec has it."""
    spec = job.spec
    if spec.calibration is None:
        return NOISE_SAMPLES
    counts = [section.samples for section in (spec.quantize.mixed, spec.analysis) if section is not None]
    return min(counts[0] if counts else 128, spec.calibration.samples)


def sensitivity_need(job: Job, samples: int) -> Need:
    """Return what the largest layer's measurement on so many images needs: network, layer, images, moments."""
    spec, staged, calibration = job.spec, job.staged, job.spec.calibration
    batch = BATCH_SIZE if calibration is None else calibration.batch_size
    solves = spec.recipe == "calibrated" and calibration is not None
    images = max(samples, calibration.samples) if solves and calibration is not None else samples
    layers = job.plan.whole_layers
    largest = max(layer.weights for layer in layers)
    moments = max((moments_bytes(layer) for layer in layers), default=0) if solves else 0
    resident_bytes = _network_bytes(staged) + job.image_bytes + _BYTES_TO_SOLVE * largest + moments
    resident_bytes += images * _input_bytes(staged) + min(batch, images) * _forward_bytes(staged)
    key = "analysis.samples" if spec.quantize.mixed is None else "quantize.mixed.samples"
    return _need("sensitivity", resident_bytes, key)


def trial_need(staged: StagedModel) -> Need:
    """Return what a network's forward of one image needs, tried before work."""
    return _need("stage", _network_bytes(staged) + _forward_bytes(staged), "preprocess.size")


def member_need(job: Job, images: CalibrationSpec, members: int) -> Need:
    """Return what one of so many members of the gang holds: its images halted in mid-forward in every lane, a network a
    lane, the moments of the largest layer.
    """
    layers, staged = job.plan.solved_layers, job.staged
    lanes = 1 + max(len(layer.bits) for layer in layers)
    chunks = chunks_of(images)
    largest = max(stop - start for start, stop in chunks)
    held_images = min(images.samples, largest * math.ceil(len(chunks) / members))
    moments = max(moments_bytes(layer) for layer in layers)
    lane_bytes = lanes * (_network_bytes(staged) + held_images * _forward_bytes(staged))
    return _need("reconstruct", job.image_bytes + moments + lane_bytes, "calibration.samples")


def chunks_of(images: CalibrationSpec) -> list[tuple[int, int]]:
    """Return start and stop of the chunks that a gang shares, the same for any number of members."""
    step = images.batch_size * BATCHES_PER_CHUNK
    return [(start, min(start + step, images.samples)) for start in range(0, images.samples, step)]


def gang_size(executor: Executor, images: CalibrationSpec, need_of: Callable[[int], Need]) -> int:
    """Return the largest number of members that fit beside each other: the more there are, the less each holds."""
    most = len(chunks_of(images))
    fitting = (n for n in range(most, 0, -1) if executor.places(need_of(n).memory_bytes) >= n)
    return next(fitting, 1)


def moments_bytes(layer: PieceTask) -> int:
    """Return the memory that a layer's moments and their solution need in a worker, in bytes (from above)."""
    blocks, inputs = input_blocks(layer.inputs)
    return _MATRICES * 8 * layer.groups * blocks * inputs**2


def _need(stage: str, held_bytes: int, smaller: str) -> Need:
    """Return the need of a task that runs the network: what it holds beside the bare process."""
    return Need(stage, PROCESS_BYTES + SLACK_BYTES + held_bytes, smaller)


def _synthesis_need(job: Job) -> Need:
    """One chunk of images, a forward of all of them, and the network in every form in which it is rewritten."""
    staged = job.staged
    weights = _NETWORK_COPIES * sum(info.size_bytes for info in staged.tensors.values())
    return _need("synthesize", weights + min(CHUNK, SAMPLES) * _forward_bytes(staged), "preprocess.size")


def _network_bytes(staged: StagedModel) -> int:
    """The float network, and a tensor on its way into it (as bytes, and as a tensor)."""
    sizes = [info.size_bytes for info in staged.tensors.values()]
    return sum(sizes) + 2 * max(sizes, default=0)


def _packed_bytes(plan: Plan) -> int:
    """Every level of every layer, packed, and the largest layer or shard group while it is unpacked."""
    packed = sum(math.prod(layer.shape) * sum(NestConfig(bits=layer.bits).level_bits) for layer in plan.layers) // 8
    groups = (sum(piece.weights for piece in group.pieces) for group in plan.groups)
    largest = max(*(math.prod(layer.shape) for layer in plan.layers), *groups)
    return packed + _BYTES_TO_UNPACK * largest


def _forward_bytes(staged: StagedModel) -> int:
    """What a forward pass holds for one image: its activations (traced), and the image twice."""
    return staged.trace.activation_bytes + 2 * _input_bytes(staged)


def _input_bytes(staged: StagedModel) -> int:
    """One image as float32."""
    return 4 * math.prod(staged.preprocessing.input_shape)
