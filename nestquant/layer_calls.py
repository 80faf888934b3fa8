"""The functional calls that a layer makes with its weight, whatever ``forward`` its class has.

A subclass may pad dynamically, cast or copy its input, or standardise its weight: it ends in ``conv2d`` or ``linear``
all the same. A ``TorchFunctionMode`` sees these calls, and with them what the weight is really multiplied by. It also
sees every step from the weight to the tensor that is multiplied, so that another weight can take the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from nestquant.surgery import channel_first_shape, kind_of

Form = Literal["linear", "convolution", "transposed"]
Way = Callable[[Tensor], Tensor]
"""From a layer's weight to a tensor that is computed from it."""

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_SIGNATURES: Mapping[Callable[..., Any], tuple[Form, tuple[str, ...]]] = {
    functional.linear: ("linear", ("input", "weight", "bias")),
    torch.conv1d: ("convolution", _CONVOLUTION),
    torch.conv2d: ("convolution", _CONVOLUTION),
    torch.conv_transpose2d: ("transposed", _TRANSPOSED),
}
_ONE_CALL = frozenset(
    {nn.Conv1d.forward, nn.Conv2d.forward, nn.ConvTranspose2d.forward, nn.Linear.forward},
)


@dataclass(frozen=True)
class LayerCall:
    """One call ``form(inputs, weight, bias, **options)`` with a weight that is ``way(the layer's own)``.

    ``way`` is None where it is the layer's own, unchanged. ``biased``: the bias is the layer's own, or would be
    if it had one.
    """

    form: Form
    inputs: Tensor
    weight: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)
    way: Way | None = None
    biased: bool = True


def layer_calls(module: nn.Module, inputs: Tensor) -> tuple[LayerCall, ...]:
    """Return the functional calls that a layer makes with its weight when it runs on ``inputs``, in their order.

    Hooks do not run, and what stands in the place of ``forward`` on the instance neither: the class's own does. It may
    raise anything.
    """
    kind, parameter = kind_of(module) or ("linear", "weight")
    forward: Callable[..., Any] = type(module).forward
    weight = getattr(module, parameter)
    # A layer without bias gets one of zeros, which shows whether its forward would make use of it.
    module = copy.copy(module)
    bias = module._parameters.get("bias")
    if bias is None and parameter == "weight":
        bias = weight.new_zeros(channel_first_shape(tuple(weight.shape), kind, getattr(module, "groups", 1))[0])
        module._parameters = {**module._parameters, "bias": bias}
    # What torch's own forward calls comes last: the product itself is not needed.
    recorder = _Recorder(weight, bias, halt=forward in _ONE_CALL)
    try:
        with recorder:
            forward(module, inputs)
    except _Halt:
        pass
    return tuple(recorder.calls)


class _Halt(BaseException):
    """Unwinds a forward of which all is known."""


class _Recorder(TorchFunctionMode):
    def __init__(self, weight: Tensor, bias: Tensor | None, *, halt: bool) -> None:
        super().__init__()
        self.calls: list[LayerCall] = []
        self._weight, self._bias, self._halt = weight, bias, halt
        # By identity, with the tensor itself: as long as it lives, nothing else has its identity.
        self._ways: dict[int, tuple[Tensor, Way]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SIGNATURES:
            form, names = _SIGNATURES[func]
            options = {**dict(zip(names, args, strict=False)), **kwargs}
            inputs, weight = options.pop("input"), options.pop("weight")
            biased = options.pop("bias", None) is self._bias
            if weight is self._weight or id(weight) in self._ways:
                self.calls.append(LayerCall(form, inputs, weight, options, self._way(weight), biased))
                if self._halt:
                    raise _Halt
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result is not self._weight:
            self._trace(result, func, args, kwargs)
        return result

    def _way(self, value: Any) -> Way | None:
        return self._ways[id(value)][1] if id(value) in self._ways else None

    def _trace(self, result: Tensor, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note how ``result`` comes from the weight, if it does."""
        leaves, structure = tree_flatten((args, dict(kwargs)))
        ways = [_unchanged if leaf is self._weight else self._way(leaf) for leaf in leaves]
        if not any(ways):
            return

        def way(weight: Tensor) -> Tensor:
            values = [leaf if step is None else step(weight) for leaf, step in zip(leaves, ways, strict=True)]
            again, named = tree_unflatten(values, structure)
            computed: Tensor = func(*again, **named)
            return computed

        self._ways[id(result)] = (result, way)


def _unchanged(weight: Tensor) -> Tensor:
    return weight
