"""Layers that run part-bit or full-bit: the float layer's own class and forward, over a nested weight.

A nested layer is a subclass of the layer that it replaces (``NestedConv2d`` of ``nn.Conv2d``; for a subclass such as
timm's ``Conv2dSame`` a class that derives from both), with its weight parameter replaced by a property that computes
the weight from packed levels. So stride, padding, dilation, groups, bias, hooks, dynamic padding or weight
standardisation stay the float layer's, and code that reads ``layer.weight`` or calls ``F.linear(x, layer.weight)``
goes on working. The same technique as ``torch.nn.utils.parametrize``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nestquant.affine import QParams
from nestquant.nested_weight import NestedWeight, Packed, Residency, pack_parts
from nestquant.observers import ActivationQParams, fake_quantize
from nestquant.quantized_weight import QuantizedWeight
from nestquant.surgery import kind_of, replace


class NestedLayer(nn.Module):
    """What all nested layers share: the nested weight and, if wanted, fake-quantized inputs."""

    parameter: ClassVar[str]
    nested: NestedWeight
    activation: ActivationQParams | None
    _active_weight: Tensor | None

    def __init_subclass__(cls, parameter: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if parameter:
            cls.parameter = parameter
            setattr(cls, parameter, property(NestedLayer._weight, doc="The float weight of the active level."))
            if parameter == "weight":
                cls.bias = property(NestedLayer._bias, doc="The bias of the active level.")  # type: ignore[attr-defined]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the float layer's own forward over the nested weight.

        Floating inputs given by position are fake-quantized first where there is an activation range.
        """
        if self.activation is not None:
            args = _quantize_inputs(args, self.activation)
        # A forward that reads the weight several times unpacks it once. Another thread's forward at worst unpacks
        # again.
        self._active_weight = self.nested()
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._active_weight = None

    def page_in(self, low: Packed) -> None:
        """Take the packed bytes of the next level (``NestedWeight.page_in``)."""
        self.nested.page_in(low)

    def page_out(self) -> None:
        """Drop the highest level present (``NestedWeight.page_out``)."""
        self.nested.page_out()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weight's buffers as they are now."""
        return self.nested.resident_bytes

    def _weight(self) -> Tensor:
        weight = self._active_weight
        return self.nested() if weight is None else weight

    def _bias(self) -> Tensor | None:
        own, added = self._parameters.get("bias"), self.nested.bias()
        if own is None or added is None:
            return own if added is None else added
        return own + added


class NestedConv1d(NestedLayer, nn.Conv1d, parameter="weight"):
    """``nn.Conv1d`` over a nested weight."""


class NestedConv2d(NestedLayer, nn.Conv2d, parameter="weight"):
    """``nn.Conv2d`` over a nested weight."""


class NestedConvTranspose2d(NestedLayer, nn.ConvTranspose2d, parameter="weight"):
    """``nn.ConvTranspose2d`` over a nested weight."""


class NestedLinear(NestedLayer, nn.Linear, parameter="weight"):
    """``nn.Linear`` over a nested weight."""


class NestedMultiheadAttention(NestedLayer, nn.MultiheadAttention, parameter="in_proj_weight"):
    """``nn.MultiheadAttention`` whose fused input projection is nested; ``out_proj`` is a layer of its own."""


_NESTED: tuple[tuple[type[nn.Module], type[NestedLayer]], ...] = (
    (nn.Conv1d, NestedConv1d),
    (nn.Conv2d, NestedConv2d),
    (nn.ConvTranspose2d, NestedConvTranspose2d),
    (nn.Linear, NestedLinear),
    (nn.MultiheadAttention, NestedMultiheadAttention),
)


def from_float(
    module: nn.Module,
    weight: QuantizedWeight,
    *,
    residency: Residency = "packed",
    activation: ActivationQParams | None = None,
) -> NestedLayer:
    """Return ``module`` as a nested layer with all the levels of ``weight`` paged in. See ``from_packed``."""
    bits = weight.config.bits
    parts = pack_parts(weight.parts, bits)
    return from_packed(
        module,
        qparams=weight.qparams,
        bits=bits,
        parts=parts,
        residency=residency,
        activation=activation,
        biases=weight.biases,
    )


def from_packed(
    module: nn.Module,
    *,
    qparams: QParams,
    bits: tuple[int, ...],
    parts: Sequence[Packed],
    residency: Residency = "packed",
    activation: ActivationQParams | None = None,
    biases: Tensor | None = None,
) -> NestedLayer:
    """Return ``module`` as a nested layer over packed levels: level 0 alone, or as many as there are.

    ``biases``: what each level adds to the layer's bias, float16 ``[levels, O]``. ``module`` may be on the ``meta``
    device: only its class, attributes and the shape of its weight count. It is not changed; bias and submodules are
    shared with it.

    Raises:
        TypeError: A layer that cannot be nested.
        ValueError: The parts do not fit its weight, or biases stand beside a weight that is not the layer's only one.
    """
    kind, parameter = kind_of(module) or (None, "")
    weight = module._parameters.get(parameter)
    if kind is None or weight is None:
        raise TypeError(f"{type(module).__name__} has no weight parameter that can be nested")
    assert weight is not None
    if biases is not None and parameter != "weight":
        raise ValueError(f"{type(module).__name__} has no bias of one level for its {parameter}")
    cls = _nested_class(type(module))  # type: ignore[arg-type]  # mypy looks at the hash of instances
    layer = cls.__new__(cls)
    layer.__dict__.update(
        {key: copy.copy(value) if isinstance(value, dict | set) else value for key, value in vars(module).items()}
    )
    del layer._parameters[parameter]
    layer.nested = NestedWeight(
        qparams=qparams,
        bits=bits,
        parts=parts,
        shape=tuple(weight.shape),
        kind=kind,
        groups=getattr(module, "groups", 1),
        residency=residency,
        dtype=weight.dtype,
        biases=biases,
    )
    layer.activation = activation
    layer._active_weight = None
    return layer


def nested_layers(model: nn.Module) -> dict[str, NestedLayer]:
    """Return the nested layers of ``model`` by qualified name, in registration order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NestedLayer)}


def nest_model(
    model: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    *,
    residency: Residency = "packed",
    activations: Mapping[str, ActivationQParams] | None = None,
) -> None:
    """Replace the named layers of ``model`` by nested ones, in place; KeyError for a name that it does not have."""
    for name, weight in weights.items():
        activation = (activations or {}).get(name)
        module = model.get_submodule(name)
        replace(model, name, from_float(module, weight, residency=residency, activation=activation))


def page_in(model: nn.Module, parts: Mapping[str, Packed]) -> None:
    """Page the next level of the named layers in: all of them, or none where one part is refused.

    ``parts``: by layer name, the packed bytes. Layers that are not named stay at their level, so shards can be paged in
    as they arrive.

    Raises:
        KeyError: A name without a nested layer.
        ValueError: A part does not fit its layer, which is named.
    """
    layers = nested_layers(model)
    if unknown := sorted(parts.keys() - layers.keys()):
        raise KeyError(f"the model has no nested layer named {', '.join(unknown)}")
    checked: dict[str, Tensor] = {}
    for name, part in parts.items():
        try:
            checked[name] = layers[name].nested.check_next(part)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
    for name, tensor in checked.items():
        layers[name].nested.accept(tensor)


def page_out(model: nn.Module) -> None:
    """Drop the highest level of every nested layer that has more than one; RuntimeError if none has."""
    paged = [layer for layer in nested_layers(model).values() if layer.nested.level_count > 1]
    if not paged:
        raise RuntimeError("there is no level to page out: every nested layer is at level 0")
    for layer in paged:
        layer.page_out()


def set_level(model: nn.Module, level: int | None) -> None:
    """Run every nested layer at ``level`` (None: at its highest present).

    Raises:
        ValueError: A layer lacks the level; nothing is changed then.
    """
    layers = nested_layers(model)
    for name, layer in layers.items():
        if level is not None and not 0 <= level < layer.nested.level_count:
            raise ValueError(f"layer {name} has levels 0 to {layer.nested.level_count - 1}; got {level}")
    for layer in layers.values():
        layer.nested.set_level(level)


def set_residency(model: nn.Module, residency: Residency) -> None:
    """Set the residency of every nested layer."""
    for layer in nested_layers(model).values():
        layer.nested.set_residency(residency)


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers of ``model``, memory that several share counted once."""
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


@functools.cache
def _nested_class(layer_type: type[Any]) -> type[NestedLayer]:
    for base, nested in _NESTED:
        if layer_type is base:
            return nested
        if issubclass(layer_type, base):
            return type(f"Nested{layer_type.__name__}", (nested, layer_type), {"__module__": nested.__module__})
    raise TypeError(f"{layer_type.__name__} cannot be nested")


def _quantize_inputs(args: tuple[Any, ...], activation: ActivationQParams) -> tuple[Any, ...]:
    # One tensor given several times (self-attention's query, key and value) stays one: attention asks for identity.
    results: dict[int, Tensor] = {}
    quantized: list[Any] = []
    for value in args:
        if isinstance(value, Tensor) and torch.is_floating_point(value):
            if id(value) not in results:
                results[id(value)] = fake_quantize(value, activation)
            quantized.append(results[id(value)])
        else:
            quantized.append(value)
    return tuple(quantized)
