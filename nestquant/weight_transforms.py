"""Weights that a layer transforms before it uses them: scaled or standardised, each output channel on its own.

Weight standardisation (arXiv 1903.10520) multiplies inputs by ``gain (w - mean(w)) / deviation(w)``. The stored
integers stand for ``w``, and the transform runs over them on a device as it does over floats. So they are solved for
``w``, under inputs less their mean, which is what a weight less its mean sees of them; biases follow from what the
transform makes of the integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nestquant.layer_calls import LayerCall

_TOLERANCE = 1e-3
"""Of a channel's norm: float32 arithmetic of a few steps stays far below it, any other transform far above."""


@dataclass(frozen=True)
class WeightTransform:
    """``apply`` makes the weight that is used of one ``[O, I / groups, *kernel]``; each channel is multiplied by a
    number, after its mean was taken off where ``centred``.
    """

    apply: Callable[[Tensor], Tensor]
    centred: bool


def transform_of(call: LayerCall, weight: Tensor) -> WeightTransform | None:
    """Return how a call's weight comes from the layer's own, or None where it is the same.

    Raises:
        ValueError: It comes from it in another way than ``WeightTransform`` knows.
    """
    if call.way is None:
        return None
    plain, used = (value.detach().double().flatten(1) for value in (weight, call.weight))
    if call.form != "transposed" and plain.shape == used.shape:
        if torch.allclose(plain, used):
            return None
        way, shape = call.way, weight.shape
        for centred, base in ((False, plain), (True, plain - plain.mean(dim=1, keepdim=True))):
            scale = (base * used).sum(dim=1) / base.square().sum(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
            error = (used - scale[:, None] * base).norm(dim=1)
            if bool((error <= _TOLERANCE * used.norm(dim=1)).all()):
                return WeightTransform(lambda value: way(value).reshape(shape), centred)
    raise ValueError("transforms its weight in a way that is not known")
