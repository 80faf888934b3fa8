"""Finding the layers of a model that can be quantized, by qualified name, and replacing them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

LayerKind = Literal["conv1d", "conv2d", "conv_transpose2d", "linear"]

_KINDS: tuple[tuple[type[nn.Module], LayerKind, str], ...] = (
    (nn.Conv1d, "conv1d", "weight"),
    (nn.Conv2d, "conv2d", "weight"),
    (nn.ConvTranspose2d, "conv_transpose2d", "weight"),
    (nn.Linear, "linear", "weight"),
    (nn.MultiheadAttention, "linear", "in_proj_weight"),
)


@dataclass(frozen=True)
class LayerSite:
    """One quantizable layer: ``shape`` is that of ``parameter`` in the state dict, ``groups`` those of a convolution.

    ``aliases``: the other names under which the same module is registered, if any.
    """

    name: str
    kind: LayerKind
    parameter: str
    shape: tuple[int, ...]
    groups: int = 1
    aliases: tuple[str, ...] = ()

    @property
    def state_key(self) -> str:
        """Key of the weight in the model's state dict."""
        return _join(self.name, self.parameter)

    @property
    def state_keys(self) -> tuple[str, ...]:
        """All the keys of the weight in the model's state dict: one for each name of the module."""
        return tuple(_join(name, self.parameter) for name in (self.name, *self.aliases))

    @property
    def channel_first_shape(self) -> tuple[int, ...]:
        """Shape of the weight with the output channel at axis 0, as it is quantized and stored."""
        return channel_first_shape(self.shape, self.kind, self.groups)


@dataclass(frozen=True)
class LayerScan:
    """All the layers of a model in registration order, and what stays float: (layer or parameter name, reason)."""

    layers: tuple[LayerSite, ...]
    kept_float: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ExecutionOrder:
    """Layer names: those that ran, by their first run, then ``never_ran``, in registration order."""

    names: tuple[str, ...]
    never_ran: tuple[str, ...]


def find_layers(model: nn.Module) -> LayerScan:
    """Return every layer of ``model`` that can be quantized; the weights may be on the ``meta`` device.

    Layers are Conv1d, Conv2d, ConvTranspose2d, Linear and the fused input projection of MultiheadAttention, subclasses
    included: a nested layer runs the subclass's own ``forward`` over its weight (``modules``), so that dynamic padding,
    masks or weight standardisation stay what they were. Every other parameter of two or more dimensions is listed in
    ``kept_float`` with the reason. A module registered under several names counts once, under the first.
    """
    owners = _parameter_owners(model)
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    layers: list[LayerSite] = []
    float_layers: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        weight_key = None
        layer_kind = kind_of(module)
        if layer_kind is not None:
            kind, parameter = layer_kind
            reason = _reason_against(module, parameter, owners)
            weight = module._parameters.get(parameter)
            if reason is not None:
                float_layers.append((name, reason))
                continue
            if weight is not None:
                weight_key = parameter
                groups = getattr(module, "groups", 1)
                aliases = tuple(names[id(module)][1:])
                layers.append(LayerSite(name, kind, parameter, tuple(weight.shape), groups, aliases))
        for key, value in module.named_parameters(recurse=False):
            if key != weight_key and value is not None and (is_lazy(value) or value.ndim >= 2):
                float_layers.append(
                    (_join(name, key), f"{type(module).__name__}.{key} is not the weight of a supported layer")
                )
    return LayerScan(tuple(layers), tuple(float_layers))


def kind_of(module: nn.Module) -> tuple[LayerKind, str] | None:
    """Return the kind of a layer and the name of its weight parameter, or None if it is none that can be quantized."""
    for layer_type, kind, parameter in _KINDS:
        if isinstance(module, layer_type):
            return kind, parameter
    return None


def channel_first(weight: Tensor, kind: LayerKind, groups: int = 1) -> Tensor:
    """Return ``weight`` with the output channel at axis 0: ``[O, I / groups, *kernel]``; a view where possible.

    Only a transposed convolution stores it otherwise: ``[I, O / groups, kh, kw]``.
    """
    if kind != "conv_transpose2d":
        return weight
    inputs, outputs = weight.shape[:2]
    grouped = weight.reshape(groups, inputs // groups, outputs, *weight.shape[2:])
    return grouped.transpose(1, 2).flatten(0, 1)


def from_channel_first(weight: Tensor, kind: LayerKind, groups: int = 1) -> Tensor:
    """Return ``weight`` as its layer stores it; the inverse of ``channel_first`` (for its axes, its own inverse)."""
    return channel_first(weight, kind, groups)


def channel_first_shape(shape: tuple[int, ...], kind: LayerKind, groups: int = 1) -> tuple[int, ...]:
    """Return the shape that ``channel_first`` gives a weight of ``shape``."""
    if kind != "conv_transpose2d":
        return shape
    return (shape[1] * groups, shape[0] // groups, *shape[2:])


def execution_order(model: nn.Module, example_input: Any) -> ExecutionOrder:
    """Return the layers in the order of their first call in one forward pass.

    ``example_input``: a tensor, or a tuple of arguments. Works on the ``meta`` device. A layer whose weight is used
    without a call (by a functional) counts as never run.
    """
    sites = find_layers(model).layers
    ran: dict[str, None] = {}

    def note(name: str) -> Any:
        return lambda *_: ran.setdefault(name, None)

    hooks = [model.get_submodule(site.name).register_forward_pre_hook(note(site.name)) for site in sites]
    was_training = model.training
    try:
        model.eval()
        with torch.no_grad():
            model(*example_input) if isinstance(example_input, tuple) else model(example_input)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    never_ran = tuple(site.name for site in sites if site.name not in ran)
    return ExecutionOrder((*ran, *never_ran), never_ran)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one called ``name``, under all the names that a shared one has.

    Raises:
        KeyError: There is none.
        ValueError: The root, which has no place to be put.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise KeyError(f"the model has no module {name!r}")
    if not name:
        raise ValueError("the root module cannot be replaced within itself")
    old = modules[name]
    for parent in modules.values():
        for child_name, child in parent._modules.items():
            if child is old:
                parent._modules[child_name] = module


def shallow_copy(network: nn.Module, *, own: bool = False) -> nn.Module:
    """Return a network with modules of its own over the same parameters, and the same buffers unless ``own``."""
    shared = [*network.parameters(), *(() if own else network.buffers())]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def _reason_against(module: nn.Module, parameter: str, owners: dict[int, list[str]]) -> str | None:
    """Return why a layer of a known kind stays float, or None if it need not."""
    if parametrize.is_parametrized(module, parameter):
        return f"{parameter} is computed by a parametrization: fold it in (remove_parametrizations) to quantize"
    if parameter not in module._parameters:
        return f"{parameter} is computed before each forward (weight_norm, spectral_norm): fold it in to quantize"
    weight = module._parameters[parameter]
    if weight is None:
        return f"{parameter} is None: projections of different widths (q_proj_weight and so on) are not supported"
    if len(owners[id(weight)]) > 1:
        return f"{parameter} is shared: {', '.join(owners[id(weight)])} are one parameter"
    if getattr(module, "binarized", False):
        return f"{type(module).__name__} keeps only the signs of its {parameter}"
    return _unfit(weight, parameter)


def _unfit(weight: nn.Parameter, parameter: str) -> str | None:
    if is_lazy(weight):
        return f"{parameter} is not initialized: run the model once"
    if weight.numel() == 0:
        return f"{parameter} is empty: shape {tuple(weight.shape)}"
    if not weight.is_floating_point():
        return f"{parameter} is {weight.dtype}, not floating point"
    return None


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """Return by parameter identity the qualified names of each, one for every module that holds it."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, value in _own_parameters(module):
            owners[id(value)].append(_join(name, key))
    return owners


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((key, value) for key, value in module._parameters.items() if value is not None)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
