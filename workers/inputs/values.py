"""Numbers that no network computes with: looked for in every tensor, where its bytes are first read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.errors import CheckpointError

LARGEST = 2.0**64
"""The square of anything beyond it overflows float32, and so does its product with another number as large: a trained
network lies some fifteen orders of magnitude below. float16 never gets there."""

_VARIANCE = "running_var"


def check_values(where: str, name: str, tensor: Tensor) -> None:
    """Raise `CheckpointError` for values that no network computes with.

    NaN, infinity, magnitudes beyond ``LARGEST``, and a normalisation's variance below zero.

    Args:
        where: the file, as the user calls it.
        name: the tensor's name in the state dict.
        tensor: all of it, or a part; any shape, any type, of which only floats are looked at.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = (float(end) for end in torch.aminmax(tensor))  # NaN wins over every number
    if math.isnan(low):
        fault = "holds NaN: the training diverged, or the file is damaged; take an earlier checkpoint"
    elif math.isinf(low) or math.isinf(high):
        fault = "holds infinity: the training diverged, or the file is damaged; take an earlier checkpoint"
    elif max(-low, high) > LARGEST:
        worst = low if -low > high else high
        fault = f"holds {worst:.6g}; beyond {LARGEST:.1e} products overflow float32: take an earlier checkpoint"
    elif low < 0 and name.rpartition(".")[2] == _VARIANCE:
        fault = f"holds a variance below zero, {low:.6g}: the file is damaged, or is not what its names say"
    else:
        return
    raise CheckpointError(f"{where}: tensor {name!r} {fault}.")
