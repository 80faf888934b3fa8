"""One forward for the float network and for each level of the quantized one, halted before each layer.

The batch holds the same images once a *lane*: lane 0 runs the float weights, lane ``1 + k`` those of level ``k``. What
is not quantized treats all lanes alike. A forward runs in a thread of its own that waits before the first call of each
layer until that layer has weights, so a network of ``L`` layers is calibrated layer after layer with one forward, not
with ``L``.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nestquant.moments import UnreadableInputs, input_columns, linear_columns, read_inputs
from nestquant.quantized_weight import QuantizedWeight
from nestquant.surgery import from_channel_first, kind_of
from nestquant.weight_transforms import WeightTransform
from workers.forward import check_input, run_network
from workers.functional_calls import FunctionalCalls


@dataclass(frozen=True)
class Probed:
    """The layers that can be split, in the order of their first calls, and by name why the others cannot.

    ``unreadable``: those among the first whose weights no inputs tell how to round, and why. ``transforms``: what
    others do to their weights before they use them. ``unbiased``: those to whose output no bias of theirs is added.
    """

    laned: tuple[str, ...]
    unsplit: Mapping[str, str] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    transforms: Mapping[str, WeightTransform] = field(default_factory=dict)
    unbiased: frozenset[str] = frozenset()


_OTHER_AXIS = "its input does not come image by image along the first axis"
_NOT_CALLED = "neither it is called with its input first, nor linear() with its weight"


class Lanes:
    """A network in ``1 + level_count`` lanes; its named layers wait for `apply`.

    The network is changed in place: each layer's ``forward`` splits its batch by lane. `probe` tells for which layers
    that is possible.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], level_count: int) -> None:
        self.network, self.level_count = network.eval(), level_count
        self.lanes = 1 + level_count
        self._solved: dict[str, list[nn.Module]] = {}
        self._passing: set[str] = set()
        self._names = tuple(layers)
        self._calls: Counter[str] = Counter()
        self._functional: set[str] = set()
        self._linears: dict[int, str] = {}
        for name in layers:
            module = network.get_submodule(name)
            if isinstance(module, nn.Linear | nn.MultiheadAttention):
                self._linears[id(_weight_of(module))] = name
            if not isinstance(module, nn.MultiheadAttention):  # what goes into it is no input of its weight alone
                self._split(name, module)

    def apply(self, layer: str, weight: QuantizedWeight) -> None:
        """Give a layer its weights: forwards that wait for it, and all later ones, go on with them.

        A layer with fewer levels than the network runs its last one in all the lanes above.
        """
        module = self.network.get_submodule(layer)
        last = weight.config.level_count - 1
        runs = [module]
        for level in range(self.level_count):
            at = min(level, last)
            bias = None if weight.biases is None else weight.biases[at]
            runs.append(_with_weight(module, weight.dequantize(at), bias))
        self._solved[layer] = runs

    @property
    def repeats(self) -> bool:
        """Tell whether a layer is called several times in one forward."""
        return any(count > 1 for count in self._calls.values())

    def leave(self, layer: str) -> None:
        """Let a layer run its float weights in every lane."""
        self._passing.add(layer)

    def start(self, images: Tensor) -> Walk:
        """Return a forward over images ``[B, C, H, W]`` that has not begun."""
        return Walk(self, images)

    @torch.inference_mode()
    def probe(self, image: Tensor, name: str) -> Probed:
        """Return the layers that see the same in every lane when one image ``[1, C, H, W]`` is run.

        Only those can be split: not one that gets its batch along another axis, or never runs as a module. Must be
        called before `apply`. ``name`` is what messages call the network.

        Raises:
            WorkError: a layer's input or the answer holds NaN or infinity. Nothing equals NaN: the layers behind it
                would leave the lanes for no reason of their own.
            ModelError: the network does not run on the image.
        """
        look = _Look(self)
        _WATCH.look = look
        try:
            with FunctionalCalls(self._linears, look.linear):
                run_network(self.network, torch.cat([image] * self.lanes), name)
        finally:
            del _WATCH.look
        self._calls = Counter({name: count for name, count in look.calls.items() if look.alike[name]})
        self._functional = look.functional
        laned = tuple(self._calls)
        unsplit = {
            name: self._reason(name, called=name in look.alike) for name in self._names if name not in self._calls
        }
        unreadable = {name: reason for name, reason in look.unreadable.items() if name in self._calls}
        return Probed(laned, unsplit, unreadable, look.transforms, frozenset(look.unbiased))

    @torch.inference_mode()
    def later_calls(self, layer: str, images: Tensor, take: Callable[[Tensor], None]) -> None:
        """Run the float network on images, and hand on what goes into a layer's second and later calls, if any."""
        calls = self._calls[layer]
        if calls < 2 or layer in self._functional:
            return
        _WATCH.look = _Later(layer, calls, take)
        try:
            self.network(images)
        except _Abandoned:
            pass
        finally:
            del _WATCH.look

    def columns(self, layer: str, inputs: Tensor) -> Tensor:
        """Return what a layer's weight is multiplied by (``nestquant.moments.input_columns``)."""
        if layer in self._functional:
            return linear_columns(inputs)
        return input_columns(self.network.get_submodule(layer), inputs)

    def run(self, images: Tensor) -> None:
        """Run a forward in all lanes."""
        with FunctionalCalls(self._linears, self.linear) if self._functional else nullcontext():
            self.network(torch.cat([images] * self.lanes))

    def linear(self, name: str, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what ``linear`` gives for a layer that is not called itself, lane by lane once it is solved."""
        if name not in self._functional:
            return functional.linear(inputs, weight, bias)
        runs = self._wait(name, inputs)
        if runs is None:
            return functional.linear(inputs, weight, bias)
        own = runs[0]._parameters.get("bias")
        products = []
        for run, part in zip(runs, inputs.chunk(self.lanes), strict=True):
            lane_bias = run._parameters.get("bias") if bias is own else bias
            products.append(functional.linear(part, _weight_of(run), lane_bias))
        return torch.cat(products)

    def _reason(self, layer: str, *, called: bool) -> str:
        return _OTHER_AXIS if called else _NOT_CALLED

    def _split(self, name: str, module: nn.Module) -> None:
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not args:  # called by keyword: as good as not called
                return plain(**kwargs)
            inputs = args[0]
            look: _Look | _Later | None = getattr(_WATCH, "look", None)
            if look is not None:
                return look.called(name, inputs, lambda: plain(*args, **kwargs))
            runs = self._wait(name, inputs)
            if runs is None:
                return plain(*args, **kwargs)
            parts = zip(runs, inputs.chunk(self.lanes), strict=True)
            return torch.cat([type(run).forward(run, part, *args[1:], **kwargs) for run, part in parts])

        module.forward = forward

    def _wait(self, name: str, inputs: Tensor) -> list[nn.Module] | None:
        """Halt the walk that calls a layer until it is solved, and return it for each lane; None: alike in all."""
        if name not in self._solved and name not in self._passing:
            walk: Walk | None = getattr(_WATCH, "walk", None)
            if walk is not None:
                walk._halt(name, inputs)
        return self._solved.get(name)


_WATCH = threading.local()


class _Look:
    """What one forward shows of the layers."""

    def __init__(self, lanes: Lanes) -> None:
        self.calls: Counter[str] = Counter()
        self.alike: dict[str, bool] = {}
        self.unreadable: dict[str, str] = {}
        self.transforms: dict[str, WeightTransform] = {}
        self.unbiased: set[str] = set()
        self.functional: set[str] = set()
        self._lanes = lanes
        self._inside: str | None = None

    def called(self, name: str, inputs: Tensor, run: Callable[[], Any]) -> Any:
        """Note a call of a layer, and let it run."""
        self._note(name, inputs)
        outside, self._inside = self._inside, name
        try:
            if self.alike[name]:
                self._read(name, inputs.chunk(self._lanes.lanes)[0])
            return run()
        finally:
            self._inside = outside

    def _read(self, name: str, inputs: Tensor) -> None:
        try:
            shown = read_inputs(self._lanes.network.get_submodule(name), inputs)
        except UnreadableInputs as error:
            self.unreadable[name] = str(error)
            return
        if shown.transform is not None:
            self.transforms[name] = shown.transform
        if not shown.biased:
            self.unbiased.add(name)

    def linear(self, name: str, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Note a linear map with a layer's weight, unless the layer makes it itself."""
        if self._inside != name:
            self._note(name, inputs)
            self.functional.add(name)
            if bias is None or bias is not self._lanes.network.get_submodule(name)._parameters.get("bias"):
                self.unbiased.add(name)
        return functional.linear(inputs, weight, bias)

    def _note(self, name: str, inputs: Tensor) -> None:
        check_input(name, inputs)
        parts = inputs.chunk(self._lanes.lanes) if inputs.shape[0] % self._lanes.lanes == 0 else ()
        same = bool(parts) and all(torch.allclose(parts[0], part, rtol=1e-3, atol=1e-4) for part in parts[1:])
        self.calls[name] += 1
        self.alike[name] = self.alike.get(name, True) and same


class _Later:
    """Hands on what goes into one layer's second and later calls, and ends the forward behind the last."""

    def __init__(self, layer: str, calls: int, take: Callable[[Tensor], None]) -> None:
        self._layer, self._calls, self._take, self._count = layer, calls, take, 0

    def called(self, name: str, inputs: Tensor, run: Callable[[], Any]) -> Any:
        """Let a layer run."""
        if name == self._layer:
            self._count += 1
            if self._count > 1:
                self._take(inputs)
            if self._count == self._calls:
                raise _Abandoned
        return run()


@dataclass(frozen=True)
class _Halt:
    layer: str
    inputs: Tensor


class _Abandoned(BaseException):
    """Unwinds the forward of a walk that nobody wants any more."""


class Walk:
    """One batch on its way through the lanes."""

    def __init__(self, lanes: Lanes, images: Tensor) -> None:
        self._lanes, self.images = lanes, images
        self._thread: threading.Thread | None = None
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._at: _Halt | None = None
        self._error: BaseException | None = None
        self._ended = self._abandoned = False

    def reach(self, layer: str) -> tuple[Tensor, ...] | None:
        """Go on to a layer's first call and return its input, one tensor a lane; None where it is not called next.

        Every layer before it must have weights by then. Raises what the forward raises.
        """
        while not self._ended and (self._at is None or self._passed(self._at.layer)):
            self._step()
        if self._at is None or self._at.layer != layer:
            return None
        return self._at.inputs.chunk(self._lanes.lanes)

    def columns(self, layer: str, inputs: Tensor) -> Tensor:
        """Return what a layer's weight is multiplied by (``nestquant.moments.input_columns``)."""
        return self._lanes.columns(layer, inputs)

    def later_calls(self, layer: str, take: Callable[[Tensor], None]) -> None:
        """Hand on what the float network puts into a layer's second and later calls, if it has any."""
        self._lanes.later_calls(layer, self.images, take)

    def close(self) -> None:
        """End the forward where it stands."""
        self._abandoned = True
        if self._thread is not None:
            if not self._ended:
                self._step()
            self._thread.join()

    def _passed(self, layer: str) -> bool:
        return layer in self._lanes._solved or layer in self._lanes._passing

    def _step(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="nestquant-walk", daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._halted.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        try:
            torch.set_num_threads(1)  # a thread has settings of its own; how a sum is split changes its last bit
            _WATCH.walk = self
            with torch.inference_mode():
                images = self.images
                if not self._lanes.repeats:  # nobody will ask for them again
                    self.images = torch.empty(0)
                self._lanes.run(images)
        except _Abandoned:
            pass
        except BaseException as error:  # raised where the walk is asked to go on
            self._error = error
        finally:
            self._at, self._ended = None, True
            self._halted.release()

    def _halt(self, layer: str, inputs: Tensor) -> None:
        self._at = _Halt(layer, inputs)
        self._halted.release()
        self._go.acquire()
        self._at = None
        if self._abandoned:
            raise _Abandoned


def _weight_of(module: nn.Module) -> Tensor:
    _, parameter = kind_of(module) or (None, "weight")
    weight = module._parameters[parameter]
    assert weight is not None
    return weight


def _with_weight(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a shallow copy of a layer that runs another weight, and its bias with another one added."""
    run = copy.copy(module)
    run.__dict__.pop("forward", None)
    own = module._parameters.get("bias")
    added = bias if own is None or bias is None else own.detach() + bias.to(own.dtype)
    kind, parameter = kind_of(module) or (None, "")
    assert kind is not None
    groups = int(getattr(module, "groups", 1))
    parameters: dict[str, Any] = {parameter: from_channel_first(weight, kind, groups)}
    if parameter == "weight":
        parameters["bias"] = own if added is None else added.to(weight.dtype)
    run._parameters = {**module._parameters, **parameters}
    return run
