"""The integer grid of a layer: a scale and a zero point for each output channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestquant.config import Scheme, signed_range


@dataclass(frozen=True)
class QParams:
    """``w ~ scale * (q - zero_point)``, one of each for every output channel.

    ``scale``: float32 ``[O]``, positive. ``zero_point``: int32 ``[O]``.
    """

    scale: Tensor
    zero_point: Tensor

    def __post_init__(self) -> None:
        if self.scale.ndim != 1 or self.scale.shape != self.zero_point.shape:
            raise ValueError(
                f"scale and zero_point must have one value for each output channel; "
                f"got shapes {tuple(self.scale.shape)} and {tuple(self.zero_point.shape)}"
            )
        if self.scale.dtype != torch.float32 or self.zero_point.dtype != torch.int32:
            raise ValueError(
                f"scale must be float32 and zero_point int32; got {self.scale.dtype}, {self.zero_point.dtype}"
            )

    def rows(self, start: int, stop: int) -> QParams:
        """Return the parameters of output channels ``start:stop``."""
        return QParams(self.scale[start:stop], self.zero_point[start:stop])

    def to(self, device: torch.device | str) -> QParams:
        """Return the parameters on ``device``."""
        return QParams(self.scale.to(device), self.zero_point.to(device))


def choose_qparams(weight: Tensor, *, bits: int, scheme: Scheme, steps: int | None = None) -> QParams:
    """Return the grid of ``weight``, a float tensor ``[O, ...]`` with the output channel first.

    Asymmetric: the range of a channel is widened to hold zero, so zero is exact. Symmetric: the zero point is 0 and the
    integers used are ``[-(2^(bits-1) - 1), 2^(bits-1) - 1]``. An all-zero channel gets scale 1. A range below float32's
    smallest normal number is widened to it, as a denormal scale would be flushed to zero on some devices. Ranges are
    taken in float64, so that the largest float32 does not overflow.

    ``steps``: how many steps of the grid a channel's range takes (asymmetric), or the larger of its two sides
    (symmetric); all that there are by default. Fewer leave room at the top.

    Raises:
        ValueError: NaN or infinite weights, no elements, or fewer than two dimensions.
    """
    flat = _rows(weight)
    if scheme == "symmetric":
        if bits < 2:
            raise ValueError("the symmetric scheme needs at least 2 bits")
        extent = flat.abs().amax(dim=1).double()
        scale = _safe_scale(extent, steps or (1 << (bits - 1)) - 1)
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32))
    low = flat.amin(dim=1).clamp(max=0).double()
    high = flat.amax(dim=1).clamp(min=0).double()
    scale = _safe_scale(high - low, steps or (1 << bits) - 1)
    qmin, qmax = signed_range(bits)
    zero_point = (qmin - torch.round(low / scale.double())).clamp(qmin, qmax)
    return QParams(scale, zero_point.to(torch.int32))


def to_grid(weight: Tensor, qparams: QParams) -> Tensor:
    """Return ``weight / scale + zero_point``: float32, the shape of ``weight``, real numbers on the integer grid."""
    _check_channels(weight, qparams)
    shape = (-1, *(1,) * (weight.ndim - 1))
    return weight.float() / qparams.scale.view(shape) + qparams.zero_point.view(shape)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """Return ``scale * (q - zero_point)``: float32, the shape of ``q`` ``[O, ...]``.

    ``q`` lies on the full-bit grid: for a part-bit weight give ``nesting.to_full_grid(high, ...)``.
    """
    _check_channels(q, qparams)
    shape = (-1, *(1,) * (q.ndim - 1))
    return q.float().sub_(qparams.zero_point.view(shape)).mul_(qparams.scale.view(shape))


def _rows(weight: Tensor) -> Tensor:
    """Return ``weight`` as float32 ``[O, rest]``, checked."""
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(f"a weight must have at least 2 dimensions and one element; got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"a weight must be floating point; got {weight.dtype}")
    flat = weight.detach().float().reshape(weight.shape[0], -1)
    finite = torch.isfinite(flat)
    if not finite.all():
        bad = int((~finite).sum())
        channel = int((~finite).any(dim=1).nonzero()[0])
        raise ValueError(f"{bad} of {flat.numel()} weights are NaN or infinite, the first in output channel {channel}")
    return flat


def _safe_scale(extent: Tensor, steps: int) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny
    scale = (extent / steps).float().clamp(min=tiny)
    # Rounded up, the scale of a range next to float32's largest number would take its far end to infinity.
    largest = torch.finfo(torch.float32).max
    scale = torch.where(scale.double() * steps > largest, torch.nextafter(scale, torch.zeros_like(scale)), scale)
    return torch.where(extent == 0, torch.ones_like(scale), scale)


def _check_channels(tensor: Tensor, qparams: QParams) -> None:
    if tensor.ndim < 1 or tensor.shape[0] != qparams.scale.shape[0]:
        raise ValueError(
            f"{qparams.scale.shape[0]} channels of qparams do not fit a tensor of shape {tuple(tensor.shape)}"
        )
