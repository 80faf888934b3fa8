"""The functional calls that a layer makes with its weight, whatever ``forward`` its class has.

A subclass may pad dynamically, cast or copy its input: it ends in ``conv2d`` or ``linear`` with the layer's own weight
all the same. A ``TorchFunctionMode`` sees these calls, and with them what the weight is really multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nestquant.surgery import kind_of

Form = Literal["linear", "convolution"]

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_SIGNATURES: Mapping[Callable[..., Any], tuple[Form, tuple[str, ...]]] = {
    functional.linear: ("linear", ("input", "weight", "bias")),
    torch.conv1d: ("convolution", _CONVOLUTION),
    torch.conv2d: ("convolution", _CONVOLUTION),
}


@dataclass(frozen=True)
class LayerCall:
    """One call ``form(inputs, weight, bias, **options)`` with a layer's own weight, unchanged."""

    form: Form
    inputs: Tensor
    weight: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)


_ONE_CALL = frozenset({nn.Conv1d.forward, nn.Conv2d.forward, nn.Linear.forward})


def layer_calls(module: nn.Module, inputs: Tensor) -> tuple[LayerCall, ...]:
    """Return the functional calls that a layer makes with its weight when it runs on ``inputs``, in their order.

    Hooks do not run, and what stands in the place of ``forward`` on the instance neither: the class's own does. It may
    raise anything.
    """
    _, parameter = kind_of(module) or (None, "weight")
    forward: Callable[..., Any] = type(module).forward
    # What torch's own forward calls comes last: the product itself is not needed.
    recorder = _Recorder(getattr(module, parameter), halt=forward in _ONE_CALL)
    try:
        with recorder:
            forward(module, inputs)
    except _Halt:
        pass
    return tuple(recorder.calls)


class _Halt(BaseException):
    """Unwinds a forward of which all is known."""


class _Recorder(TorchFunctionMode):
    def __init__(self, weight: Tensor, *, halt: bool) -> None:
        super().__init__()
        self.calls: list[LayerCall] = []
        self._weight, self._halt = weight, halt

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SIGNATURES:
            form, names = _SIGNATURES[func]
            options = {**dict(zip(names, args, strict=False)), **kwargs}
            inputs, weight = options.pop("input"), options.pop("weight")
            options.pop("bias", None)
            if weight is self._weight:
                self.calls.append(LayerCall(form, inputs, weight, options))
                if self._halt:
                    raise _Halt
        return func(*args, **kwargs)
