"""Cross-layer equalization: channel sizes of an activation moved into the next layer, exactly.

A tensor between two layers has one grid for all its channels, and those differ by several times. Where nothing lies
between the layers but what a positive factor of a channel passes through (ReLU, pooling, a shuffle of channels), a
channel may be made larger by the layer before, or its BatchNorm, and smaller again by the weights behind: the network
answers as before (Nagel et al., arXiv 1906.04721; Meller et al., arXiv 1902.01917).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from nestquant.surgery import kind_of, shallow_copy

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_TOLERANCE = 1e-9
"""Of the largest value, in float64: whether two results are the same but for the order of sums."""

_DTYPES = (torch.float32, torch.float64)
"""Of parameters that keep their precision when they are made larger or smaller."""

_GAIN_LIMIT = 32.0
"""A channel is not made larger by more: of one that is all but dead on the images, little is known."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads an equalized tensor; ``channels[i]`` is the source's channel in the layer's input ``i``."""

    layer: str
    channels: tuple[int, ...]
    depthwise: bool


@dataclass(frozen=True)
class Site:
    """A tensor whose channels can be resized: what makes it, a BatchNorm or a layer, and all layers that read it."""

    source: str
    channels: int
    readers: tuple[Reader, ...]

    @property
    def depthwise(self) -> bool:
        """Tell whether each of its readers has a scale of weights for each of its channels."""
        return all(reader.depthwise for reader in self.readers)


def find_sites(network: nn.Module, example: Tensor) -> tuple[Site, ...]:
    """Return the tensors of a network whose channels can be resized without changing what it answers.

    Args:
        network: in eval mode on the CPU; it is not changed.
        example: one input ``[1, ...]``.

    None where torch.fx cannot trace the network. Every step is tried on random inputs in float64.
    """
    tracer = _Tracer()
    network = shallow_copy(network)  # a forward may keep what it sees
    try:
        traced = fx.GraphModule(network, tracer.trace(network))
        shapes = _Shapes(traced)
        with torch.no_grad():
            shapes.run(example)
    except Exception:  # a forward may do anything with a proxy of a tensor
        return ()
    modules = dict(network.named_modules())
    calls = Counter(id(modules[str(node.target)]) for node in traced.graph.nodes if node.op == "call_module")
    owners = Counter(id(parameter) for module in modules.values() for parameter in module._parameters.values())
    single = {
        name
        for name, module in modules.items()
        if calls[id(module)] == 1
        and all(owners[id(one)] == 1 for one in module._parameters.values() if one is not None)
    }
    search = _Search(modules, shapes.shapes, single)
    sites = (search.site(node) for node in traced.graph.nodes if node.op == "call_module")
    return tuple(site for site in sites if site is not None)


class _Tracer(fx.Tracer):
    """Traces into modules that have layers inside alone: all others are one node each."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _NORMS) or kind_of(m) is not None or not any(True for _ in m.parameters())


class _Shapes(fx.Interpreter):
    """Runs a traced network and keeps the shape of what each node gives."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


@dataclass(frozen=True)
class _Search:
    modules: Mapping[str, nn.Module]
    shapes: Mapping[fx.Node, tuple[int, ...]]
    single: set[str]

    def site(self, node: fx.Node) -> Site | None:
        name = str(node.target)
        module, shape = self.modules[name], self.shapes.get(node)
        if shape is None or name not in self.single or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        if len(shape) not in (2, 4):
            return None
        if kind_of(module) is not None and any(self._is_norm(user) for user in node.users):
            return None  # the norm behind it is the source
        channels = shape[1]
        if not _tried(module, self.shapes[node.args[0]], channels, reads=False):
            return None
        readers = self._readers(node, torch.arange(channels))
        return None if not readers else Site(name, channels, tuple(readers))

    def _is_norm(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.modules[str(node.target)], _NORMS)

    def _readers(self, node: fx.Node, channels: Tensor) -> list[Reader] | None:
        """Return the layers behind a node, or None where something else reads it. ``channels``: the source's."""
        readers: list[Reader] = []
        for user in node.users:
            if user.op == "call_module" and kind_of(self.modules[str(user.target)]) is not None:
                reader = self._reader(user, node, channels)
                if reader is None:
                    return None
                readers.append(reader)
                continue
            order = self._passed(user, node, len(channels))
            further = None if order is None else self._readers(user, channels[order])
            if further is None:
                return None
            readers += further
        return readers

    def _reader(self, user: fx.Node, node: fx.Node, channels: Tensor) -> Reader | None:
        name = str(user.target)
        module = self.modules[name]
        if name not in self.single or user.args != (node,) or user.kwargs:
            return None
        if not _tried(module, self.shapes[node], len(channels), reads=True):
            return None
        depthwise = getattr(module, "groups", 1) == len(channels)
        return Reader(name, tuple(channels.tolist()), depthwise)

    def _passed(self, user: fx.Node, node: fx.Node, channels: int) -> Tensor | None:
        """Return which input channel each output channel of a step is, or None where factors do not pass it."""
        shape, after = self.shapes[node], self.shapes.get(user)
        if after is None or len(after) < 2 or user.all_input_nodes != [node]:
            return None
        if user.op == "call_module":
            module = copy.deepcopy(self.modules[str(user.target)])
            if user.args != (node,) or user.kwargs or any(True for _ in module.parameters()):
                return None
            step: Callable[[Tensor], Any] = module
        elif user.op in ("call_function", "call_method"):
            step = _replayed(user, node)
        else:
            return None
        return _order(step, shape, after)


def _replayed(user: fx.Node, node: fx.Node) -> Callable[[Tensor], Any]:
    def step(value: Tensor) -> Any:
        args, kwargs = fx.map_arg((user.args, user.kwargs), lambda _: value)
        if user.op == "call_method":
            first, *rest = args
            return getattr(first, str(user.target))(*rest, **kwargs)
        assert callable(user.target)
        return user.target(*args, **kwargs)

    return step


def _order(step: Callable[[Tensor], Any], shape: tuple[int, ...], after: tuple[int, ...]) -> Tensor | None:
    """Return for each output channel of a step the input channel that it is, or None where a power of two that an
    input channel is multiplied by is not found again, bit for bit, in the output.
    """
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    view = (1, channels, *(1 for _ in shape[2:]))
    try:
        marks = step(torch.arange(1, channels + 1, dtype=torch.float64).view(view).expand(shape).contiguous())
        flat = marks.reshape(after[0], after[1], -1)
        order = flat.amax(dim=2)[0].round().long() - 1
        if order.min() < 0 or order.max() >= channels:
            return None
        noise = 16 * torch.randn(shape, generator=generator, dtype=torch.float64)
        factors = torch.exp2(torch.randint(-3, 4, (channels,), generator=generator).double())
        expected = step(noise.clone()) * factors[order].view(1, len(order), *(1 for _ in after[2:]))
        same = torch.equal(step(noise * factors.view(view)), expected)
    except Exception:  # a step that takes no float64, or something that is no tensor
        return None
    return order if same else None


@torch.no_grad()
def _resize_source(module: nn.Module, gains: Tensor) -> bool:
    """Make a module's output channels larger by ``gains`` ``[C]``; tell whether it has parameters to do it by."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.dtype not in _DTYPES or not isinstance(module, (*_NORMS, nn.Conv2d, nn.Linear)):
        return False
    factors = gains.to(weight.dtype).view(-1, *(1 for _ in weight.shape[1:]))
    module._parameters["weight"] = nn.Parameter(weight * factors, requires_grad=weight.requires_grad)
    if bias is not None:
        module._parameters["bias"] = nn.Parameter(bias * gains.to(bias.dtype), requires_grad=bias.requires_grad)
    return True


@torch.no_grad()
def _resize_reader(module: nn.Module, gains: Tensor) -> bool:
    """Make a layer's weights smaller by ``gains`` ``[I]``, one an input channel."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in _DTYPES or not isinstance(module, nn.Conv2d | nn.Linear):
        return False
    groups = getattr(module, "groups", 1)
    inputs = weight.shape[1]
    each = gains.to(weight.dtype).view(groups, 1, inputs).expand(groups, weight.shape[0] // groups, inputs)
    divided = weight / each.reshape(weight.shape[0], inputs, *(1 for _ in weight.shape[2:]))
    module._parameters["weight"] = nn.Parameter(divided, requires_grad=weight.requires_grad)
    return True


@torch.no_grad()
def _tried(module: nn.Module, shape: tuple[int, ...], channels: int, *, reads: bool) -> bool:
    """Tell whether a module resized by random powers of two answers a random input as it should."""
    generator = torch.Generator().manual_seed(0)
    gains = torch.exp2(torch.randint(-3, 4, (channels,), generator=generator).double())
    noise = 16 * torch.randn(shape, generator=generator, dtype=torch.float64)
    own, resized = copy.deepcopy(module).double(), copy.deepcopy(module).double()
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in _DTYPES:
        return False
    try:
        expected = own(noise)
        if reads:
            if not _resize_reader(resized, gains):
                return False
            answer = resized(noise * gains.view(1, -1, *(1 for _ in shape[2:])))
        else:
            if not _resize_source(resized, gains):
                return False
            expected, answer = expected * gains.view(1, -1, *(1 for _ in expected.shape[2:])), resized(noise)
    except Exception:  # a layer's own class may refuse anything
        return False
    return torch.allclose(answer, expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max()))


def channel_gains(sizes: Tensor, power: float) -> Tensor:
    """Return by how much each channel is made larger: float64 ``[C]``, 1 for the largest.

    ``sizes``: of each channel ``[C]``, none below zero. A power of 1 makes all alike; a channel of size zero stays.
    """
    sizes = sizes.double()
    gains = torch.where(sizes > 0, (sizes.max() / sizes).clamp(max=1e12) ** power, torch.ones_like(sizes))
    return gains.clamp(1.0, _GAIN_LIMIT)


@torch.no_grad()
def equalize(network: nn.Module, site: Site, gains: Tensor) -> None:
    """Make the channels of a site larger by ``gains`` ``[C]``, and their readers' weights smaller.

    The modules get parameters of their own: those that they had may be shared with another network.
    """
    _resize_source(network.get_submodule(site.source), gains)
    for reader in site.readers:
        _resize_reader(network.get_submodule(reader.layer), gains[torch.tensor(reader.channels)])


@torch.no_grad()
def channel_sizes(network: nn.Module, sites: Sequence[Site], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the largest magnitude of each channel of each site over the inputs, float64 ``[C]``, by source."""
    sizes = {site.source: torch.zeros(site.channels, dtype=torch.float64) for site in sites}

    def watch(site: Site, reader: Reader) -> Any:
        places = torch.tensor(reader.channels)

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            largest = args[0].detach().abs().transpose(0, 1).flatten(1).amax(dim=1).double()
            sizes[site.source].scatter_reduce_(0, places, largest, "amax")

        return hook

    handles = [
        network.get_submodule(reader.layer).register_forward_pre_hook(watch(site, reader))
        for site in sites
        for reader in site.readers
    ]
    try:
        for batch in batches:
            network(batch)
    finally:
        for handle in handles:
            handle.remove()
    return sizes
