"""Networks run here: what somebody else's ``forward`` raises becomes one line with the network and the layer, and an
answer that is not finite is traced to the layer that gave it first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workers.errors import ModelError, WorkError, one_line


@contextmanager
def network_boundary(network: nn.Module, what: str) -> Iterator[None]:
    """Turn whatever ``network`` raises inside into one line.

    Args:
        network: the network that runs; the layer at fault is looked for in it.
        what: how the line begins: ``timm resnet18 cannot run on inputs of 1 x 3 x 224 x 224``.

    Raises:
        ModelError: the line. Errors of our own that hooks raise pass as they are.
    """
    try:
        yield
    except WorkError:
        raise
    except Exception as error:  # a network's forward raises anything
        raise ModelError(f"{what}: {_place(network, error)}{one_line(error)}.") from error


def run_network(network: nn.Module, inputs: Tensor, name: str) -> Any:
    """Return what a network answers to ``inputs`` ``[N, C, H, W]``.

    Args:
        network: a network, on the device of the inputs.
        inputs: float images, normalised.
        name: what messages call the network.

    Raises:
        ModelError: it cannot run on them.
        WorkError: the answer is one tensor and holds NaN or infinity.
    """
    with network_boundary(network, f"{name} cannot run on inputs of {extents(inputs)}"):
        answer = network(inputs)
    if isinstance(answer, Tensor) and not is_finite(answer):
        count = len(inputs)
        if answer.shape[:1] == inputs.shape[:1]:
            count -= int(torch.isfinite(answer.reshape(count, -1)).all(dim=1).sum())
        raise WorkError(
            f"{name} answers {count} of {len(inputs)} images with NaN or infinity{_source(network, inputs)}; check the "
            "checkpoint and the preprocessing."
        )
    return answer


def input_fault(network: nn.Module) -> str:
    """Return why a network's forward cannot be called with one input, by its signature; else the empty string."""
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):  # compiled: it has none
        return ""
    places = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    needed = [one.name for one in places if one.default is one.empty]
    needed += [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    if len(needed) > 1:
        return f"its forward takes {len(needed)} inputs, {' and '.join(needed)}; expected one, an image"
    takes_any = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    return "" if places or takes_any else "its forward takes no input; expected one, an image"


def classes_of(network: nn.Module, answer: Any) -> tuple[int | None, str]:
    """Return how many classes a network's answer to one image tells apart, or None and why it tells none."""
    if getattr(network, "num_classes", None) == 0:
        return None, "it has no classifier (num_classes: 0) and gives features"
    if not isinstance(answer, Tensor):
        return None, f"it answers with a {type(answer).__name__} and not with one tensor"
    if answer.ndim != 2 or answer.shape[1] < 2:
        return None, f"it answers one image with a tensor {tuple(answer.shape)} and not (1, classes)"
    return int(answer.shape[1]), ""


def check_input(layer: str, *inputs: Tensor) -> None:
    """Raise `WorkError`, naming the layer, where what goes into it holds NaN or infinity."""
    if not all(is_finite(one) for one in inputs):
        raise WorkError(
            f"Layer {layer!r}: its input holds NaN or infinity; check the checkpoint and the preprocessing."
        )


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity; one of integers never does."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def extents(tensor: Tensor) -> str:
    """Return a shape as people write it: ``1 x 3 x 224 x 224``."""
    return " x ".join(str(extent) for extent in tensor.shape)


def _place(network: nn.Module, error: BaseException) -> str:
    """Return ``in layer 'name', `` for the innermost module of the network that was running, or the empty string."""
    names = {id(module): name for name, module in network.named_modules() if name}
    place, trace = "", error.__traceback__
    while trace is not None:
        place = names.get(id(trace.tb_frame.f_locals.get("self")), place)
        trace = trace.tb_next
    return f"in layer {place!r}, " if place else ""


def _source(network: nn.Module, inputs: Tensor) -> str:
    """Run once more, and return ``, first in what layer 'name' gives`` for the first layer whose output is not
    finite.
    """
    if not is_finite(inputs):
        return ", and they are not finite themselves"
    layers: list[str] = []

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not layers and isinstance(output, Tensor) and not is_finite(output):
                layers.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in network.named_modules() if name]
    try:
        with torch.inference_mode():
            network(inputs)
    except Exception:  # it ran a moment ago; the place is all that is missing
        return ""
    finally:
        for handle in handles:
            handle.remove()
    return f", first in what layer {layers[0]!r} gives" if layers else ""
