"""A weight held as packed levels: part-bit with the first ones, full-bit with all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestquant.affine import QParams
from nestquant.config import check_bits, level_bits, level_shifts, signed_range
from nestquant.packing import pack, packed_size, unpack
from nestquant.surgery import LayerKind, channel_first_shape, from_channel_first

Residency = Literal["packed", "expanded"]
Packed = NDArray[np.uint8] | Tensor | bytes | bytearray | memoryview


class NestedWeight(nn.Module):
    """The packed levels of one layer's weight, and the float weight that the active level stands for.

    Residency ``packed`` keeps the packed levels alone and unpacks them on each use: least memory. ``expanded`` keeps
    the float weight of the active level beside them: fast. Calling the module returns the weight in the layer's own
    shape and dtype.

    Buffers are not persistent: a state dict of a nested model holds the float parameters alone, and the levels travel
    as shards. Casting the model (``half()``) casts the weights and biases that come out, never what they are made of.
    """

    scale: Tensor
    zero_point: Tensor
    biases: Tensor | None
    expanded: Tensor | None

    def __init__(
        self,
        *,
        qparams: QParams,
        bits: tuple[int, ...],
        parts: Sequence[Packed],
        shape: tuple[int, ...],
        kind: LayerKind,
        groups: int = 1,
        residency: Residency = "packed",
        dtype: torch.dtype = torch.float32,
        biases: Tensor | None = None,
    ) -> None:
        """Hold ``parts``, packed levels from level 0 up, one at least, of a weight of ``shape`` as its layer stores it.

        ``biases``: what each level adds to the layer's bias, float16 ``[levels, O]``.

        Raises:
            ValueError: Bits, qparams, parts, shape and biases do not fit together.
        """
        super().__init__()
        check_bits(bits)
        self.bits = bits
        self.kind: LayerKind = kind
        self.groups = groups
        self.shape = channel_first_shape(shape, kind, groups)
        self.dtype = dtype
        if qparams.scale.shape[0] != self.shape[0]:
            raise ValueError(f"{self.shape[0]} output channels need as many scales; got {qparams.scale.shape[0]}")
        if not 1 <= len(parts) <= len(bits):
            raise ValueError(f"bits {bits} have 1 to {len(bits)} parts; got {len(parts)}")
        expected = (len(bits), self.shape[0])
        if biases is not None and (biases.shape != expected or biases.dtype != torch.float16):
            raise ValueError(f"biases must be float16 {expected}; got {biases.dtype} {tuple(biases.shape)}")
        self._residency: Residency = "packed"
        self._explicit_level: int | None = None
        self.level_count = 0
        self.register_buffer("scale", qparams.scale.clone(), persistent=False)
        self.register_buffer("zero_point", qparams.zero_point.clone(), persistent=False)
        self.register_buffer("biases", None if biases is None else biases.clone(), persistent=False)
        self.register_buffer("expanded", None, persistent=False)
        for part in parts:
            self._append(self.check_next(part))  # Not ``accept``: an expanded weight is built once, at the end.
        self.set_residency(residency)

    @property
    def level(self) -> int:
        """The level that runs: the highest one present, or a lower one that was set."""
        highest = self.level_count - 1
        return highest if self._explicit_level is None else self._explicit_level

    @property
    def residency(self) -> Residency:
        """``packed`` or ``expanded``."""
        return self._residency

    @property
    def level_bits(self) -> tuple[int, ...]:
        """Signed bits of each level's integers."""
        return level_bits(self.bits)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all the buffers held: packed levels, scales, zero points, and the expanded weight, if any."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers())

    def set_level(self, level: int | None) -> None:
        """Run at ``level`` from now on, even when higher ones are paged in; None runs at the highest one present."""
        if level is not None and not 0 <= level < self.level_count:
            raise ValueError(f"level must be one of those present, 0 to {self.level_count - 1}; got {level}")
        self._explicit_level = level
        self._refresh()

    def set_residency(self, residency: Residency) -> None:
        """Keep the float weight of the active level (``expanded``), or drop it (``packed``)."""
        if residency not in {"packed", "expanded"}:
            raise ValueError(f"residency must be 'packed' or 'expanded'; got {residency!r}")
        self._residency = residency
        self._refresh()

    def page_in(self, low: Packed) -> None:
        """Take the packed bytes of the next level. Nothing changes where they are refused (ValueError)."""
        self.accept(self.check_next(low))

    def page_out(self) -> None:
        """Drop the highest level present; RuntimeError if only level 0 is left."""
        if self.level_count == 1:
            raise RuntimeError("only level 0 is left: a layer cannot run without it")
        self.level_count -= 1
        delattr(self, f"part_{self.level_count}")
        if self._explicit_level is not None and self._explicit_level >= self.level_count:
            self._explicit_level = None
        self._refresh()

    def check_next(self, packed: Packed) -> Tensor:
        """Return the next level's bytes as a tensor of its own memory, after checking them against the levels present.

        Raises:
            ValueError: A level too many, a wrong length, padding that is not zero, or integers that leave their grid
                together with the levels below, as a part of another version would.
        """
        level = self.level_count
        if level == len(self.bits):
            raise ValueError(f"all {level} levels are present already")
        array = _as_array(packed)
        part = unpack(array, self.level_bits[level], self.shape)
        if level:
            shift = self.bits[-1 - level] - self.bits[-level]
            value = (self._recompose(level - 1).short().cpu() << shift).add_(torch.from_numpy(part))
            low, high = signed_range(self.bits[-1 - level])
            if int(value.min()) < low or int(value.max()) > high:
                raise ValueError(
                    f"level {level} does not belong to the levels below it: integers leave [{low}, {high}]"
                )
        return torch.from_numpy(array.copy()).to(self.scale.device)

    def accept(self, checked: Tensor) -> None:
        """Take the next level as ``check_next`` returned it."""
        self._append(checked)
        self._refresh()

    def part(self, level: int) -> Tensor:
        """Return the packed bytes of a level that is present: uint8 ``[packed_size]``."""
        if not 0 <= level < self.level_count:
            raise IndexError(f"level {level} is not present; there are {self.level_count}")
        return self.get_buffer(f"part_{level}")

    def forward(self) -> Tensor:
        """Return the weight of the active level, in the layer's shape and dtype."""
        return self._build() if self.expanded is None else self.expanded

    def bias(self) -> Tensor | None:
        """Return what the active level adds to the layer's bias, ``[O]`` in the layer's dtype; None if nothing."""
        return None if self.biases is None else self.biases[self.level].to(self.dtype)

    def extra_repr(self) -> str:
        """Describe bits, levels and residency."""
        return f"bits={self.bits}, levels={self.level_count}, level={self.level}, residency={self.residency!r}"

    def _append(self, part: Tensor) -> None:
        self.register_buffer(f"part_{self.level_count}", part, persistent=False)
        self.level_count += 1

    def _refresh(self) -> None:
        # Dropped first, so that the old and the new weight are never held at once.
        self.expanded = None
        if self._residency == "expanded":
            self.expanded = self._build()

    def _build(self) -> Tensor:
        """Unpack, recompose, and dequantize on the full grid: ``scale * (value * 2^shift - zero_point)``."""
        level = self.level
        value = self._recompose(level, self.bits[0] - self.bits[-1 - level])
        per_channel = (-1, *(1,) * (len(self.shape) - 1))
        weight = value.float().sub_(self.zero_point.view(per_channel)).mul_(self.scale.view(per_channel))
        return from_channel_first(weight, self.kind, self.groups).to(self.dtype).contiguous()

    def _recompose(self, level: int, final_shift: int = 0) -> Tensor:
        """Return levels ``0..level`` as integers, shifted; int8 holds every step, as ``check_next`` made sure of."""
        value = _unpack(self.part(0), self.level_bits[0], self.shape)
        for at, shift in enumerate(level_shifts(self.bits)[:level], start=1):
            value.bitwise_left_shift_(shift).add_(_unpack(self.part(at), self.level_bits[at], self.shape))
        return value.bitwise_left_shift_(final_shift) if final_shift else value

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> NestedWeight:
        scale, biases = self.scale, self.biases
        dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        if self.biases is not None and biases is not None and self.biases.dtype != biases.dtype:
            self.biases = biases.to(self.scale.device)
        if dtype != self.dtype:
            self.dtype = dtype
            self._refresh()
        return self


def pack_parts(parts: Sequence[Tensor], bits: tuple[int, ...]) -> list[NDArray[np.uint8]]:
    """Return int8 levels (level 0 first, output channel first) packed for ``NestedWeight``."""
    return [pack(part.cpu().numpy(), width) for part, width in zip(parts, level_bits(bits), strict=False)]


def _as_array(packed: Packed) -> NDArray[np.uint8]:
    if isinstance(packed, Tensor):
        return packed.detach().cpu().numpy()
    if isinstance(packed, np.ndarray):
        return packed
    return np.frombuffer(packed, dtype=np.uint8)


def _unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    if packed.device.type == "cpu":
        return torch.from_numpy(unpack(packed.numpy(), bits, shape))
    return _unpack_on_device(packed, bits, shape)


def _unpack_on_device(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Do what ``packing.unpack`` does with torch operations, where the bytes lie; they were checked when they came."""
    count = math.prod(shape)
    groups = -(-count // 8)
    octets = torch.zeros(groups * bits, dtype=torch.uint8, device=packed.device)
    octets[: packed_size(count, bits)] = packed
    at = torch.arange(8, device=packed.device)
    lanes = (octets.view(groups, bits).long() << (8 * at[:bits])).sum(dim=1, keepdim=True)
    codes = (lanes >> (bits * at)) & ((1 << bits) - 1)
    sign = 1 << (bits - 1)
    return ((codes ^ sign) - sign).to(torch.int8).reshape(-1)[:count].view(shape)
