"""Whether weights fit a network, and the argument to change where they are those of another size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from workers.errors import CheckpointError, WorkError, nearest, shown
from workers.inputs import networks
from workers.inputs.tensors import TensorInfo, TensorReader

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the network's state dict, in its order."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def check_fit(network: nn.Module, reader: TensorReader) -> dict[str, TensorInfo]:
    """Return the checkpoint's tensors that the network uses, in the network's order.

    Raises:
        CheckpointError: they do not fit (`check_shapes`).
    """
    check_shapes(network, {name: info.shape for name, info in reader.tensors.items()}, name=str(reader.source))
    return {name: reader.tensors[name] for name in network.state_dict() if name in reader.tensors}


def check_shapes(network: nn.Module, shapes: Shapes, *, name: str, architecture: Architecture | None = None) -> None:
    """Raise where tensors of these shapes are not the network's.

    Args:
        network: the float network, on any device.
        shapes: the checkpoint's tensors, by the network's names.
        name: what the user calls the checkpoint.
        architecture: how the network was built, so that other arguments can be tried for the message.

    Raises:
        CheckpointError: keys missing or unexpected, shapes that differ; the message lists them, or says which argument
            makes them fit.
    """
    expected = shapes_of(network)
    missing = [key for key in expected if key not in shapes and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in shapes if key not in expected]
    wrong = [key for key, shape in expected.items() if key in shapes and shapes[key] != shape]
    if not (missing or unexpected or wrong):
        return
    if architecture is not None and wrong and (change := architecture.fitting(network, shapes)):
        raise CheckpointError(f"{name} does not fit the network: {change}")
    faults = []
    if missing:
        faults.append(f"{len(missing)} keys missing ({shown(missing)})")
    if unexpected:
        faults.append(f"{len(unexpected)} keys unexpected ({shown(unexpected)})")
    if wrong:
        first = wrong[0]
        faults.append(
            f"{len(wrong)} shapes differ ({first!r}: {shapes[first]} in the checkpoint, "
            f"{expected[first]} in the network" + (", ..." if len(wrong) > 1 else "") + ")"
        )
    hint = nearest(missing[0], unexpected) if missing and unexpected else ""
    raise CheckpointError(
        f"{name} does not fit the network: {'; '.join(faults)}.{hint} Check model.arch and model.kwargs."
    )


@dataclass(frozen=True)
class Architecture:
    """What a network was built from: the library, its name there, the arguments."""

    library: str
    arch: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def fitting(self, network: nn.Module, shapes: Shapes) -> str:
        """Return in words which arguments would build a network that these shapes fit; empty where none do."""
        hints: list[str] = []
        arguments: dict[str, Any] = {}
        for argument, value, words in _guesses(self.library, network, shapes):
            arguments[argument] = value
            hints.append(words)
        if not arguments:
            return ""
        try:
            other = shapes_of(networks.build(self.library, self.arch, {**self.kwargs, **arguments}, meta=True))
        except WorkError:
            return ""
        if any(name in shapes and shapes[name] != shape for name, shape in other.items()) or set(shapes) - set(other):
            return ""
        text = ", ".join(f"{name}: {value}" for name, value in arguments.items())
        verb = "set" if set(arguments) & set(self.kwargs) else "add"
        return f"the checkpoint {' and '.join(hints)}; {verb} kwargs: {{{text}}}."


def _guesses(library: str, network: nn.Module, shapes: Shapes) -> list[tuple[str, int, str]]:
    """Return what the shapes that differ look like: (argument, value, what the checkpoint has, in words)."""
    wrong = [(shapes[name], shape) for name, shape in shapes_of(network).items() if shapes.get(name, shape) != shape]
    guesses = {}
    for actual, expected in wrong:
        if len(actual) != len(expected):
            continue
        differs = [axis for axis, (one, other) in enumerate(zip(actual, expected, strict=True)) if one != other]
        if differs == [0] and len(actual) in (1, 2, 4) and expected[0] == _classes(network):
            guesses["num_classes"] = (actual[0], f"has {actual[0]} classes")
        elif differs == [1] and len(actual) == 4 and expected[1] in (1, 3):
            name = "in_chans" if library == "timm" else "in_channels"
            guesses[name] = (actual[1], f"takes {actual[1]} channels")
        elif differs == [1] and len(actual) == 3 and (size := _image_size(network, actual[1])):
            guesses["img_size"] = (size, f"is for images of {size} pixels")
    return [(argument, value, words) for argument, (value, words) in guesses.items()]


def _classes(network: nn.Module) -> int | None:
    return getattr(network, "num_classes", None)


def _image_size(network: nn.Module, tokens: int) -> int | None:
    """Return the side of the square images whose patches, and a few tokens before them, are so many."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple):
        return None
    for prefix in (0 if getattr(network, "no_embed_class", False) else getattr(network, "num_prefix_tokens", 0), 0, 1):
        side = round(max(tokens - prefix, 0) ** 0.5)
        if side and side * side == tokens - prefix:
            return int(side * patch[0])
    return None
