"""One forward for the float network and for each level of the quantized one, halted before each layer.

The batch holds the same images once a *lane*: lane 0 runs the float weights, lane ``1 + k`` those of level ``k``. What
is not quantized treats all lanes alike. A forward runs in a thread of its own that waits before the first call of each
layer until that layer has weights, so a network of ``L`` layers is calibrated layer after layer with one forward, not
with ``L``.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nestquant.moments import UnreadableInputs, read_inputs
from nestquant.quantized_weight import QuantizedWeight
from nestquant.surgery import from_channel_first, kind_of
from nestquant.weight_transforms import WeightTransform
from workers.forward import check_input, run_network


@dataclass(frozen=True)
class Probed:
    """The layers that can be split, in the order of their first calls, and by name why the others cannot.

    ``unreadable``: those among the first whose weights no inputs tell how to round, and why. ``transforms``: what
    others do to their weights before they use them.
    """

    laned: tuple[str, ...]
    unsplit: Mapping[str, str] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    transforms: Mapping[str, WeightTransform] = field(default_factory=dict)


_ATTENTION = "its query, key and value have one weight"
_OTHER_AXIS = "its input does not come image by image along the first axis"
_NOT_CALLED = "it is not called as a layer with its input first"


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
        for name in layers:
            module = network.get_submodule(name)
            if isinstance(module, nn.MultiheadAttention):  # query, key and value would all have to be split
                self._passing.add(name)
            else:
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
        alike: dict[str, bool] = {}
        unreadable: dict[str, str] = {}
        transforms: dict[str, WeightTransform] = {}

        def look(name: str, inputs: Tensor) -> None:
            check_input(name, inputs)
            parts = inputs.chunk(self.lanes) if inputs.shape[0] % self.lanes == 0 else ()
            same = bool(parts) and all(torch.allclose(parts[0], part, rtol=1e-3, atol=1e-4) for part in parts[1:])
            alike[name] = alike.get(name, True) and same
            if not same:
                return
            try:
                transform = read_inputs(self.network.get_submodule(name), parts[0]).transform
                if transform is not None:
                    transforms[name] = transform
            except UnreadableInputs as error:
                unreadable[name] = str(error)

        _WATCH.look = look
        try:
            run_network(self.network, torch.cat([image] * self.lanes), name)
        finally:
            del _WATCH.look
        laned = tuple(name for name, same in alike.items() if same)
        unsplit = {name: self._reason(name, called=name in alike) for name in self._names if name not in laned}
        unreadable = {name: reason for name, reason in unreadable.items() if name in laned}
        return Probed(laned, unsplit, unreadable, transforms)

    def _reason(self, layer: str, *, called: bool) -> str:
        if called:
            return _OTHER_AXIS
        return _ATTENTION if layer in self._passing else _NOT_CALLED

    def _split(self, name: str, module: nn.Module) -> None:
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not args:  # called by keyword: as good as not called
                return plain(**kwargs)
            inputs = args[0]
            look = getattr(_WATCH, "look", None)
            if look is not None:
                look(name, inputs)
                return plain(*args, **kwargs)
            if name not in self._solved and name not in self._passing:
                walk: Walk | None = getattr(_WATCH, "walk", None)
                if walk is not None:
                    walk._halt(name, inputs)
            runs = self._solved.get(name)
            if runs is None:
                return plain(*args, **kwargs)
            parts = zip(runs, inputs.chunk(self.lanes), strict=True)
            return torch.cat([type(run).forward(run, part, *args[1:], **kwargs) for run, part in parts])

        module.forward = forward


_WATCH = threading.local()


@dataclass(frozen=True)
class _Halt:
    layer: str
    inputs: Tensor


class _Abandoned(BaseException):
    """Unwinds the forward of a walk that nobody wants any more."""


class Walk:
    """One batch on its way through the lanes."""

    def __init__(self, lanes: Lanes, images: Tensor) -> None:
        self._lanes, self._images = lanes, images
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
                images, self._images = self._images, torch.empty(0)
                self._lanes.network(torch.cat([images] * self._lanes.lanes))
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


def _with_weight(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a shallow copy of a layer that runs another weight, and its bias with another one added."""
    run = copy.copy(module)
    run.__dict__.pop("forward", None)
    own = module._parameters.get("bias")
    added = bias if own is None or bias is None else own.detach() + bias.to(own.dtype)
    parameters: Mapping[str, Any] = {
        "weight": _in_place_of(module, weight),
        "bias": own if added is None else added.to(weight.dtype),
    }
    run._parameters = {**module._parameters, **parameters}
    return run


def _in_place_of(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight, output channels first, as the layer keeps it."""
    kind, _ = kind_of(module) or (None, "")
    assert kind is not None
    return from_channel_first(weight, kind, int(getattr(module, "groups", 1)))
