"""Solved layers: what the recipe ``calibrated`` found for each, kept by the job until shards are made of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nestquant.affine import QParams
from nestquant.quantized_weight import QuantizedWeight
from storage.manifest import Descriptor, Record
from storage.registry import Registry
from storage.stores.uri import open_store
from storage.tensor_file import load_tensors, save_tensors
from workers.errors import WorkError
from workers.ledger import Ledger
from workers.tasks import PieceTask

MEDIA_TYPE_SOLUTION = "application/vnd.nestquant.solution.v1+safetensors"


class SolvedRecord(Record):
    """One layer, solved: where its integers stand, whether levels have biases, on how many images it rests.

    ``without``: why it was rounded without data; None where it was not, and in records of older releases.
    """

    layer: str
    descriptor: Descriptor
    biases: bool
    samples: int
    skipped: tuple[tuple[str, str], ...]
    without: str | None = None


def find_solved(registry: Registry, job: str, solution: int) -> SolvedRecord | None:
    """Return a layer's record if it is solved and its integers are there."""
    ledger = Ledger(registry, job)
    record = ledger.find(ledger.solved_key(solution), SolvedRecord)
    return record if record is not None and registry.has_blob(record.descriptor) else None


def read_solution(registry: Registry, job: str, piece: PieceTask) -> QuantizedWeight:
    """Return the solved integers of a piece's output channels.

    Raises:
        WorkError: the layer is not solved.
    """
    assert piece.solution is not None
    ledger = Ledger(registry, job)
    record = ledger.find(ledger.solved_key(piece.solution), SolvedRecord)
    if record is None:
        raise WorkError(f"Layer {piece.layer!r} is not solved: run the job again.")
    arrays = _arrays(registry.store.uri, record.descriptor)
    tensors = {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}
    rows = slice(piece.start, piece.stop)
    parts = tuple(tensors[f"level{level}"][rows] for level in range(piece.config.level_count))
    biases = tensors["biases"][:, rows] if record.biases else None
    return QuantizedWeight(QParams(tensors["scale"][rows], tensors["zero_point"][rows]), parts, piece.config, biases)


def save_solution(weight: QuantizedWeight) -> bytes:
    """Return a safetensors file with a whole layer's integers, grid and biases."""
    tensors: dict[str, npt.NDArray[Any]] = {f"level{level}": part.numpy() for level, part in enumerate(weight.parts)}
    tensors |= {"scale": weight.qparams.scale.numpy(), "zero_point": weight.qparams.zero_point.numpy()}
    if weight.biases is not None:
        tensors["biases"] = weight.biases.numpy()
    return save_tensors(tensors, {})


@functools.lru_cache(maxsize=256)
def _arrays(uri: str, descriptor: Descriptor) -> Mapping[str, npt.NDArray[np.generic]]:
    """Each layer's solution is wanted for every layer after it: a worker reads it once."""
    return load_tensors(Registry(open_store(uri)).get_blob(descriptor))[0]
