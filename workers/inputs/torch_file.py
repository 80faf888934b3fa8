"""What kind of file a checkpoint is, by its content, and torch's pickles read without running anything that they name.

A pickle names functions and classes. Tensors come from torch's own list (``weights_only``); what trainers put beside
them (arguments, configurations, metrics) is named in a list here, and an inert stand-in takes its place: nothing of it
is imported or called. Any other name is refused.
"""

from __future__ import annotations

import io
import pickletools
import stat
import threading
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch

from workers.errors import CheckpointError, one_line, shown

FileKind = Literal["safetensors", "torch zip", "torch legacy"]

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
EXPECTED = "expected .safetensors, or a state dict that torch.save wrote (.pth, .pt, .bin, .ckpt, .pth.tar)"

_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number that torch.save began with until 1.5

# What begins like this, at this byte, is something else: what it is, and what to do.
_OTHERS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "is a pointer of git-lfs, not the file itself: run 'git lfs pull'"),
    (0, b"\x1f\x8b", "is compressed (gzip): unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "is compressed (zstd): unpack it"),
    (0, b"BZh", "is compressed (bzip2): unpack it"),
    (0, b"\xfd7zXZ", "is compressed (xz): unpack it"),
    (0, b"7z\xbc\xaf", "is a 7z archive: unpack it"),
    (0, b"\x89HDF", "is an HDF5 file (Keras, TensorFlow): convert it to a state dict"),
    (0, b"\x93NUMPY", "is a numpy array: convert it to a state dict"),
    (0, b"<", "is a web page or XML, not a checkpoint: perhaps the download was refused"),
    (0, b"{", "is JSON: name the file with the weights themselves; an index of several files is not read"),
    (257, b"ustar", "is a tar archive: unpack it (torch.save's own .pth.tar is none, and is read)"),
)

_ADVICE = "where you trust the file, load it in torch and save its tensors alone: torch.save(model.state_dict(), ...)"


class _Unread:
    """Stands for an object that is not read."""

    def __new__(cls, *_: Any) -> _Unread:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        """Forget it."""


class _UnreadMapping:
    """Stands for an object with keys or attributes: torch's reader sets those of few types, a counter among them."""

    def __new__(cls, *_: Any) -> Any:
        return Counter()


# Names of what trainers save beside tensors, and what stands for it.
_STAND_INS: tuple[tuple[str, type], ...] = (
    ("numpy.*", _Unread),  # scalars: best_acc1, metric
    ("pathlib.*", _Unread),
    ("datetime.*", _Unread),
    ("decimal.Decimal", _Unread),
    ("uuid.UUID", _Unread),
    ("torch.torch_version.TorchVersion", _Unread),
    ("argparse.Namespace", _UnreadMapping),  # args
    ("types.SimpleNamespace", _UnreadMapping),
    ("collections.defaultdict", _UnreadMapping),
    ("copyreg._reconstructor", _UnreadMapping),
    *((f"builtins.{name}", _Unread) for name in ("bool", "dict", "float", "int", "list", "object", "str", "tuple")),
    ("typing.*", _Unread),
    ("torch.optim.*", _UnreadMapping),  # schedulers that were saved whole
    ("pytorch_lightning.*", _UnreadMapping),
    ("lightning.*", _UnreadMapping),
    ("lightning_fabric.*", _UnreadMapping),
    ("torchmetrics.*", _UnreadMapping),
    ("omegaconf.*", _UnreadMapping),
    ("yacs.config.CfgNode", _UnreadMapping),
    ("easydict.EasyDict", _UnreadMapping),
    ("addict.*", _UnreadMapping),
    ("munch.*", _UnreadMapping),
    ("ml_collections.*", _UnreadMapping),
    ("mmcv.*", _UnreadMapping),
    ("mmengine.*", _UnreadMapping),
    ("fvcore.*", _UnreadMapping),
)

# What torch's own list may hold, which has the last word.
_TORCHS = (
    "torch.*",
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    *(f"builtins.{name}" for name in ("bytearray", "complex", "set")),
)
_MODULES = "torch.nn.modules."

_LONGEST_PICKLE = 100_000_000  # of containers and names, without a byte of a tensor; as safetensors caps its header

# torch keeps its list of names for the whole process: two threads would take each other's away.
_LISTED = threading.Lock()


def file_kind(path: Path, name: str) -> FileKind:
    """Return what a file is, by its first bytes; its suffix is nobody's promise.

    Args:
        path: the file.
        name: what the user calls it.

    Raises:
        CheckpointError: it is no checkpoint that can be read; the message says what it is, where that shows.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        inside = sorted(one.name for one in path.iterdir() if one.suffix in _SUFFIXES)
        offer = f", such as {name.rstrip('/')}/{inside[0]}" if inside else ""
        raise CheckpointError(f"{name} is a folder; name the file with the weights{offer}.")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{name} is no regular file (a pipe, a socket or a device); {EXPECTED}.")
    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise CheckpointError(f"{name} is empty; {EXPECTED}.")
    if head.startswith(b"PK"):
        return _zip_kind(path, name)
    if head.startswith(_LEGACY):
        return "torch legacy"
    if head[8:9] == b"{":
        return "safetensors"
    for offset, magic, title in _OTHERS:
        if head[offset:].startswith(magic):
            raise CheckpointError(f"{name} {title}.")
    if head[:1] == b"\x80":
        raise CheckpointError(f"{name} is a pickle that torch.save did not write; {_ADVICE}.")
    raise CheckpointError(f"{name} is no checkpoint; {EXPECTED}.")


def _zip_kind(path: Path, name: str) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # what zipfile raises of bytes that are no zip
        raise CheckpointError(
            f"{name} begins as torch's files do, but is cut short or damaged ({error}); copy it anew."
        ) from error
    inner = {entry.partition("/")[2] for entry in names}
    if "constants.pkl" in inner:
        raise CheckpointError(f"{name} is a TorchScript archive, code and all; save model.state_dict() instead.")
    if "data.pkl" not in inner:
        contents = f"it holds {shown(names, most=3)}" if names else "it is empty"
        raise CheckpointError(f"{name} is a zip archive without torch's data.pkl ({contents}); {EXPECTED}.")
    return "torch zip"


def load_pickled(path: Path, name: str, kind: FileKind) -> Any:
    """Return what torch.save wrote: containers and tensors; see the module for what stands in for all else.

    Tensors of a zip are mapped, not read. The file must not be cut short meanwhile.

    Raises:
        CheckpointError: it names what is not read, or is damaged.
    """
    names = _named(path, name, kind)
    stand_ins = [(stand_in, one) for one in names for stand_in in [_stand_in(one)] if stand_in is not None]
    strange = names.difference(one for _, one in stand_ins)
    strange = {one for one in strange if not any(fnmatchcase(one, own) for own in _TORCHS) or one.startswith(_MODULES)}
    if strange:
        raise CheckpointError(_refusal(name, sorted(strange)))
    with _LISTED, torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.simplefilter("ignore")  # of old storages and protocols
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch zip")
        except Exception as error:  # torch.load raises pickle, zip, runtime and value errors alike
            raise CheckpointError(
                f"{name} cannot be read as a state dict with weights_only: {one_line(error).rstrip('.')}; {_ADVICE}."
            ) from error


def _stand_in(name: str) -> type | None:
    return next((stand_in for pattern, stand_in in _STAND_INS if fnmatchcase(name, pattern)), None)


def _refusal(name: str, strange: list[str]) -> str:
    if any(one.startswith((_MODULES, "timm.", "torchvision.", "pytorchcv.", "__main__.")) for one in strange):
        contents = shown(strange, most=3)
        return f"{name} holds a whole pickled model ({contents}), which cannot be read without its code: {_ADVICE}."
    return f"{name} names {shown(strange, most=3)}, which is not read, as a pickle can run code that way: {_ADVICE}."


def _named(path: Path, name: str, kind: FileKind) -> set[str]:
    """Return the functions and classes that the file's pickles name; nothing of them is loaded."""
    try:
        if kind == "torch legacy":
            with path.open("rb") as stream:
                # A number, the protocol, the machine, then the object: four pickles, and the tensors' bytes.
                return set().union(*(_globals(stream, name) for _ in range(4)))
        with zipfile.ZipFile(path) as archive:
            entry = next(one for one in archive.infolist() if one.filename.partition("/")[2] == "data.pkl")
            if entry.file_size > _LONGEST_PICKLE:
                raise CheckpointError(
                    f"{name} is cut short or damaged ({entry.file_size} bytes of names alone, at most "
                    f"{_LONGEST_PICKLE} expected); copy it anew."
                )
            with archive.open(entry) as stream:  # which ends where the archive says
                return _globals(io.BytesIO(stream.read(_LONGEST_PICKLE)), name)
    except CheckpointError:
        raise
    except Exception as error:  # of bytes that are no pickle: values, lengths beyond memory, what zipfile raises
        raise CheckpointError(f"{name} is cut short or damaged ({one_line(error)}); copy it anew.") from error


def _globals(stream: BinaryIO, name: str) -> set[str]:
    names: set[str] = set()
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name == "PROTO" and argument != 2:
            raise CheckpointError(
                f"{name} was written with pickle protocol {argument}; expected torch.save's own, 2: {_ADVICE}."
            )
        if operation.name == "GLOBAL":
            module, _, attribute = str(argument).partition(" ")
            module, attribute = NAME_MAPPING.get((module, attribute), (IMPORT_MAPPING.get(module, module), attribute))
            names.add(f"{module}.{attribute}")
    return names
