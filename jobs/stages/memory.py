"""Memory of the largest task of each stage, from above: what Ray is asked for, and what a machine must have.

``docs/performance.md`` holds the estimates against measured peaks.
"""

from __future__ import annotations

import functools
import math

from jobs.spec.job import CalibrationSpec, JobSpec
from jobs.stages.plan import Plan
from jobs.stages.reconstruction import chunks_of, gang_size, moments_bytes
from jobs.stages.sensitivity import sensitivity_bytes
from jobs.stages.synthesis import CHUNK, SAMPLES
from jobs.stages.weights import Staged
from nestquant.config import NestConfig
from workers.calibrate import NOISE_BATCH
from workers.errors import Need
from workers.executor import Executor

PROCESS_BYTES = 480_000_000
"""A worker that has imported Ray, torch, timm and pytorchcv and done nothing yet, pages of shared libraries left out:
449 MB on the machine of ``docs/performance.md``."""

SLACK_BYTES = 100_000_000
"""Decoding one photograph of 12 megapixels (4 bytes a pixel, twice), compiled kernels, what the allocator keeps."""

_SHARD_COPIES = 4
_BYTES_TO_UNPACK = 12
"""For each weight of a layer while it is unpacked: integers of two levels, two float weights."""


def task_needs(spec: JobSpec, staged: Staged, plan: Plan, executor: Executor, *, image_bytes: int) -> dict[str, Need]:
    """Return what a task of each stage that the job has needs, in the order of the stages.

    ``image_bytes`` is what the largest image set keeps in memory; by ``executor`` follows how many members share the
    images of the stage ``reconstruct``.
    """
    needs = []
    if spec.measures_layers:
        key = "analysis.samples" if spec.quantize.mixed is None else "quantize.mixed.samples"
        needs.append(Need("sensitivity", PROCESS_BYTES + sensitivity_bytes(spec, staged, plan), key))
    forward = staged.activation_bytes + 2 * _input_bytes(staged)
    network = PROCESS_BYTES + SLACK_BYTES + _network_bytes(staged) + image_bytes
    activations, calibration, measured = spec.quantize.activations, spec.calibration, spec.evaluate
    if activations is not None:
        noise = calibration is None or activations.observer == "sigma"
        batch = NOISE_BATCH if noise or calibration is None else min(calibration.batch_size, calibration.samples)
        needs.append(Need("calibrate", network + batch * forward, "calibration.batch_size"))
    if plan.solved_layers:
        images = calibration or CalibrationSpec(data="", samples=SAMPLES, batch_size=CHUNK)
        need_of = functools.partial(member_need, staged, plan, images, image_bytes=image_bytes)
        needs.append(need_of(gang_size(executor, images, need_of)))
    blobs = _SHARD_COPIES * spec.store.shard_bytes
    needs.append(Need("quantize", PROCESS_BYTES + plan.task_bytes + blobs, "store.shard_bytes"))
    if measured is not None:
        batch = min(measured.batch_size, measured.limit or measured.batch_size)
        held = network + _packed_bytes(plan) + blobs + batch * forward
        needs.append(Need("evaluate", held, "evaluate.batch_size"))
    return {need.stage: need for need in needs}


def member_need(staged: Staged, plan: Plan, calibration: CalibrationSpec, members: int, *, image_bytes: int) -> Need:
    """Return what one of so many members of the gang holds: its images halted in mid-forward in every lane, a network a
    lane, the moments of the largest layer.
    """
    layers = plan.solved_layers
    lanes = 1 + max(len(layer.bits) for layer in layers)
    chunks = chunks_of(calibration)
    largest = max(stop - start for start, stop in chunks)
    images = min(calibration.samples, largest * math.ceil(len(chunks) / members))
    moments = max(moments_bytes(layer) for layer in layers)
    held = lanes * (_network_bytes(staged) + images * (staged.activation_bytes + 2 * _input_bytes(staged)))
    return Need("reconstruct", PROCESS_BYTES + SLACK_BYTES + image_bytes + moments + held, "calibration.samples")


def _network_bytes(staged: Staged) -> int:
    """The float network, and a tensor on its way into it (as bytes, and as a tensor)."""
    sizes = [info.size_bytes for info in staged.tensors.values()]
    return sum(sizes) + 2 * max(sizes, default=0)


def _packed_bytes(plan: Plan) -> int:
    """Every level of every layer, packed, and the largest layer or shard group while it is unpacked."""
    packed = sum(math.prod(layer.shape) * sum(NestConfig(bits=layer.bits).level_bits) for layer in plan.layers) // 8
    groups = (sum(piece.weights for piece in group.pieces) for group in plan.groups)
    largest = max(*(math.prod(layer.shape) for layer in plan.layers), *groups)
    return packed + _BYTES_TO_UNPACK * largest


def _input_bytes(staged: Staged) -> int:
    """One image as float32."""
    return 4 * len(staged.preprocessing.mean) * staged.preprocessing.size**2
