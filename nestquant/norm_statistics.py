"""BatchNorm statistics of other inputs than those that a network was trained on.

A BatchNorm layer promises what leaves it: mean ``beta`` and deviation ``gamma`` in each channel, if its statistics are
those of its inputs. On synthetic images they are not, and what reaches the layers behind has another mean and spread
than in use. With the statistics taken anew on the synthetic images, every layer behind a BatchNorm sees the first and
second moments of each channel that it was trained with, although no training image is there. (Others change the images
by gradient until the statistics fit: ZeroQ, arXiv 2001.00281. This needs no gradient, and the fit is exact.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class NormSums:
    """Sums over ``count`` values of each channel that went into a layer; float64 ``[C]``."""

    count: int
    value: Tensor
    square: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> NormSums:
        """Return the sums of inputs ``[N, C, ...]``."""
        flat = inputs.transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(flat.double(), dim=1, correction=0)
        count = flat.shape[1]
        return cls(count, mean * count, (variance + mean.square()) * count)

    @classmethod
    def merge(cls, parts: Sequence[NormSums]) -> NormSums:
        """Return the sums of all parts, added in the order given."""
        total = parts[0]
        for part in parts[1:]:
            total = cls(total.count + part.count, total.value + part.value, total.square + part.square)
        return total

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and (biased) variance, float64 ``[C]``."""
        mean = self.value / self.count
        return mean, (self.square / self.count - mean.square()).clamp(min=0)


def norm_layers(network: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers that hold statistics, by name.

    One with mean 0 and variance 1 in every channel was never shown anything (an identity, or random weights): it
    promises nothing, and is left out.
    """
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and not _untouched(module)
    }


class NotFinite(ValueError):
    """What goes into a layer holds NaN or infinity."""


@torch.no_grad()
def take_statistics(network: nn.Module, inputs: Tensor) -> dict[str, NormSums]:
    """Run the network on ``inputs`` ``[N, C, H, W]``, each BatchNorm by this batch's own statistics, and return them.

    The network is left as it was. What it raises passes.

    Raises:
        NotFinite: Inputs of a layer, which is named, hold NaN or infinity.
    """
    layers = norm_layers(network)
    totals: dict[str, NormSums] = {}
    handles = []
    with _restored(layers):
        for name, layer in layers.items():

            def take(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                if not torch.isfinite(args[0]).all():
                    raise NotFinite(f"layer {name!r}: its input holds NaN or infinity; check the checkpoint")
                assert isinstance(module, _BatchNorm)
                sums = NormSums.of(args[0])
                _set(module, sums)
                totals[name] = NormSums.merge([totals[name], sums]) if name in totals else sums

            handles.append(layer.register_forward_pre_hook(take))
        try:
            network(inputs)
        finally:
            for handle in handles:
                handle.remove()
    return totals


@torch.no_grad()
def put_statistics(network: nn.Module, statistics: Mapping[str, NormSums]) -> None:
    """Set the statistics of the BatchNorm layers named; all other layers keep theirs."""
    for name, sums in statistics.items():
        layer = network.get_submodule(name)
        assert isinstance(layer, _BatchNorm)
        _set(layer, sums)


def _set(layer: _BatchNorm, sums: NormSums) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, variance = sums.statistics()
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)


def _untouched(layer: _BatchNorm) -> bool:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return bool((layer.running_mean == 0).all()) and bool((layer.running_var == 1).all())


@contextmanager
def _restored(layers: Mapping[str, _BatchNorm]) -> Iterator[None]:
    state = {
        name: [buffer.clone() for buffer in (layer.running_mean, layer.running_var) if buffer is not None]
        for name, layer in layers.items()
    }
    try:
        yield
    finally:
        for name, (mean, variance) in state.items():
            layer = layers[name]
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
