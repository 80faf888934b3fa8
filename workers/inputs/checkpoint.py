"""Float weights made ready for range reads: one local safetensors file whose keys are those of the network's state
dict.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from storage.stores.blob_store import is_key
from storage.stores.s3 import S3Store
from storage.stores.uri import open_store
from workers.errors import CheckpointError, nearest, shown
from workers.inputs import networks
from workers.inputs.tensors import TensorInfo, TensorReader, TensorSource
from workers.tasks import NetworkRef

PICKLED_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
# torch's generator belongs to the process: two threads that draw from it at once would share out one sequence.
_SEEDED = threading.Lock()
_NESTED_KEYS = ("state_dict", "model", "model_state", "model_state_dict", "net", "module", "params")


def fetch(uri: str, folder: Path) -> Path:
    """Return a local path for a checkpoint or an image set: the path itself, or what an s3:// URI names, downloaded.

    What ``stored_file`` names is downloaded from any store.

    Raises:
        CheckpointError: there is no such file.
        storage.StorageError: the store refused.

    """
    store_uri, mark, key = uri.rpartition("#")
    if mark and "://" in store_uri and is_key(key) and not Path(uri.removeprefix("file://")).exists():
        path = folder / key.rpartition("/")[2]
        path.write_bytes(open_store(store_uri).get(key))
        return path
    if not uri.startswith("s3://"):
        path = Path(uri.removeprefix("file://")).expanduser()
        if not path.exists():
            raise CheckpointError(f"No file at {uri}: expected a local path or an s3:// URI.")
        return path.resolve()
    store = open_store(uri)
    if not isinstance(store, S3Store) or not store.prefix:
        raise CheckpointError(f"{uri} names a bucket; expected s3://bucket/path/to/file.")
    return store.download(folder / Path(store.prefix.rstrip("/")).name)


def stored_file(store_uri: str, key: str) -> str:
    """Return a URI that ``fetch`` reads: an object of a store that is no bucket of plain files (no URI has a ``#``)."""
    return f"{store_uri}#{key}"


def to_safetensors(path: Path, folder: Path) -> Path:
    """Return a safetensors file with the checkpoint's tensors: ``path`` itself, or a conversion of a pickled state
    dict in ``folder``.

    Pickles are read with ``weights_only=True``: tensors and plain containers, no code. A state dict one level down
    (``state_dict``, ``model`` ...) and the ``module.`` prefix of data-parallel training are unwrapped.
    """
    if path.suffix == ".safetensors":
        return path
    if path.suffix not in PICKLED_SUFFIXES:
        raise CheckpointError(
            f"{path.name}: expected a checkpoint ending in .safetensors, {', '.join(PICKLED_SUFFIXES)}."
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises pickle, zip, runtime and value errors alike
        raise CheckpointError(
            f"{path.name} cannot be read as a state dict with weights_only: {str(error).splitlines()[0]}"
        ) from error
    return save_state(_unwrap(loaded, path.name), folder / "checkpoint.safetensors")


def save_state(state: Mapping[str, torch.Tensor], path: Path) -> Path:
    """Write a state dict as safetensors; tensors that share memory are written once each.

    Only those are copied for it: the format's library refuses to write one memory under two names.
    """
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        own = tensor.detach().contiguous()
        tensors[name] = own.clone() if memory in seen else own
        seen.add(memory)
    save_file(tensors, path)
    return path


def _unwrap(loaded: Any, name: str) -> dict[str, torch.Tensor]:
    document = loaded
    while isinstance(document, dict) and not all(isinstance(value, torch.Tensor) for value in document.values()):
        inner = next((key for key in _NESTED_KEYS if isinstance(document.get(key), dict)), None)
        if inner is None:
            raise CheckpointError(
                f"{name} holds no state dict: its keys are {shown([str(key) for key in document])}; "
                "expected tensors by name."
            )
        document = document[inner]
    if not isinstance(document, dict) or not document:
        raise CheckpointError(f"{name} holds a {type(document).__name__}; expected a state dict, tensors by name.")
    prefix = "module." if all(key.startswith("module.") for key in document) else ""
    return {key.removeprefix(prefix): tensor for key, tensor in document.items()}


def pretrained_state(library: str, arch: str, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the state dict of the library's own pretrained weights."""
    return networks.build(library, arch, kwargs, pretrained=True).state_dict()


def random_state(library: str, arch: str, kwargs: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Return a state dict as the architecture initialises itself from this seed: for size tables and load tests."""
    with _SEEDED:
        torch.manual_seed(seed)
        return networks.build(library, arch, kwargs).state_dict()


def check_fit(network: nn.Module, reader: TensorReader) -> dict[str, TensorInfo]:
    """Return the checkpoint's tensors that the network uses, in the network's order.

    Raises:
        CheckpointError: keys missing or unexpected, shapes that differ; the message lists them.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing = [name for name in wanted if name not in reader.tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in reader.tensors if name not in wanted]
    wrong = [name for name, shape in wanted.items() if name in reader.tensors and reader.tensors[name].shape != shape]
    if not (missing or unexpected or wrong):
        return {name: reader.tensors[name] for name in wanted if name in reader.tensors}
    faults = []
    if missing:
        faults.append(f"{len(missing)} keys missing ({shown(missing)})")
    if unexpected:
        faults.append(f"{len(unexpected)} keys unexpected ({shown(unexpected)})")
    if wrong:
        first = wrong[0]
        faults.append(
            f"{len(wrong)} shapes differ ({first!r}: {reader.tensors[first].shape} in the checkpoint, "
            f"{wanted[first]} in the network" + (", ..." if len(wrong) > 1 else "") + ")"
        )
    hint = nearest(missing[0], unexpected) if missing and unexpected else ""
    raise CheckpointError(
        f"{reader.source} does not fit the network: {'; '.join(faults)}.{hint} Check model.arch and model.kwargs."
    )


def open_network(network: NetworkRef) -> nn.Module:
    """Build the float network that a task names and load its weights (`load_network`)."""
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
