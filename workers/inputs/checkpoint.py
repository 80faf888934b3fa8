"""Float weights made ready for range reads: one local safetensors file whose keys are those of the network's state
dict.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from storage.digest import file_version
from workers.errors import CheckpointError
from workers.inputs import networks, own
from workers.inputs.files import reading, require_room
from workers.inputs.fit import Shapes, check_fit
from workers.inputs.tensors import DTYPES, TensorInfo, TensorReader
from workers.inputs.torch_file import file_kind, load_pickled
from workers.inputs.wrapping import Choice, unwrap
from workers.inputs.writing import writing
from workers.tasks import NetworkRef, TensorSource

# torch's generator belongs to the process: two threads that draw from it at once would share out one sequence.
_SEEDED = threading.Lock()


@dataclass(frozen=True)
class Weights:
    """A network's weights as one safetensors file under the network's own names; ``notes`` tell people where they
    were found.
    """

    path: Path
    notes: tuple[str, ...] = ()


def to_safetensors(
    path: Path,
    folder: Path,
    keys: Collection[str],
    *,
    name: str | None = None,
    choice: Choice | None = None,
    check: Callable[[Shapes], None] = lambda _: None,
) -> Weights:
    """Return a checkpoint's weights as safetensors: the file itself where it is that already, else a copy in
    ``folder``.

    What counts is what the file holds, not how it is called. Pickles are read with ``weights_only``
    (`workers.inputs.torch_file`); where the weights are follows from the network's names (`workers.inputs.wrapping`).

    Args:
        path: the file.
        folder: where a copy goes.
        keys: the names in the network's state dict.
        name: what the user calls the file.
        choice: averaged weights or the model's own, where the file has both.
        check: raises where tensors of these shapes are not the network's: before any of them is copied.

    Raises:
        CheckpointError: it is no checkpoint, or holds no state dict.
    """
    name, copy = name or str(path), folder / "checkpoint.safetensors"
    with reading(name):
        before = file_version(path.stat())
        kind = file_kind(path, name)
        if kind == "safetensors":
            reader = TensorReader(TensorSource(None, str(path), name=name))
            infos = unwrap(reader.tensors, keys, TensorInfo, name=name, choice=choice)
            check({key: info.shape for key, info in infos.state.items()})
            if infos.plain:
                return Weights(path, infos.notes)
            require_room(folder, sum(info.size_bytes for info in infos.state.values()), f"A copy of {name}")
            return Weights(reader.copied(infos.state, copy), infos.notes)
        unwrapped = unwrap(load_pickled(path, name, kind), keys, torch.Tensor, name=name, choice=choice)
        for key, tensor in unwrapped.state.items():
            _check_kind(name, key, tensor)
        check({key: tuple(tensor.shape) for key, tensor in unwrapped.state.items()})
        require_room(folder, sum(tensor.nbytes for tensor in unwrapped.state.values()), f"A copy of {name}")
        with writing(folder):
            save_state(unwrapped.state, copy)
        if file_version(path.stat()) != before:
            raise CheckpointError(f"{name} was written to while it was read; wait for its writer and run again.")
    return Weights(copy, unwrapped.notes)


def _check_kind(name: str, key: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.dtype not in DTYPES.values():
        kind = (
            "quantized"
            if tensor.is_quantized
            else str(tensor.layout if tensor.layout is not torch.strided else tensor.dtype)
        )
        raise CheckpointError(
            f"{name}: tensor {key!r} is {kind.removeprefix('torch.')}; expected the float network's weights, dense."
        )


def save_state(state: Mapping[str, torch.Tensor], path: Path) -> Path:
    """Write a state dict as safetensors; tensors that share memory are written once each.

    Only those are copied for it: the format's library refuses to write one memory under two names.
    """
    storages: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        own = tensor.detach().contiguous()
        tensors[name] = own.clone() if memory in storages else own
        storages.add(memory)
    save_file(tensors, path)
    return path


def pretrained_state(library: str, arch: str, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the state dict of the library's own pretrained weights."""
    return networks.build(library, arch, kwargs, pretrained=True).state_dict()


def random_state(library: str, arch: str, kwargs: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Return a state dict as the architecture initialises itself from this seed: for size tables and load tests.

    Tensors that it leaves as memory came are initialised as `torch.nn.Linear` is, matrices uniformly by their inputs
    and vectors as zeros: the same seed gives the same bytes.
    """
    with _SEEDED:
        torch.manual_seed(seed)
        with _fresh_memory_is_nan():
            state = networks.build(library, arch, kwargs).state_dict()
        with torch.no_grad():
            for tensor in state.values():
                if tensor.is_floating_point() and bool(tensor.isnan().any()):
                    nn.init.zeros_(tensor) if tensor.ndim < 2 else nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
    return state


@contextlib.contextmanager
def _fresh_memory_is_nan() -> Iterator[None]:
    """Let torch fill what it allocates with NaN, which it does for deterministic runs alone, so that what a constructor
    never initialises can be told from what it does.
    """
    filling: Any = torch.utils.deterministic  # its attribute is made at run time
    before = filling.fill_uninitialized_memory
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        filling.fill_uninitialized_memory = before


def open_network(network: NetworkRef) -> nn.Module:
    """Build the float network that a task names and load its weights (`load_network`)."""
    if network.code is not None:
        own.use(network.code)
    return load_network(network.library, network.arch, network.kwargs, network.source)


def load_network(library: str, arch: str, kwargs: dict[str, Any], source: TensorSource) -> nn.Module:
    """Build the float network and load its weights from a source, tensor by tensor: beside the network, one of them is
    in memory.
    """
    network = networks.build(library, arch, kwargs)
    reader = TensorReader(source)
    names = reader.in_file_order(check_fit(network, reader))
    reader = reader.planned((name, None, None) for name in names)
    state = network.state_dict()
    with torch.no_grad():
        for name in names:
            state[name].copy_(reader.read(name))
    return network
