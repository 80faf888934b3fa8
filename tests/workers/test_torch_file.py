"""Checkpoints by what they hold: what is none is called by its name, and nothing that a pickle names is run."""

from __future__ import annotations

import contextlib
import functools
import gzip
import os
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.workers.checkpoints.make import Net
from workers.errors import CheckpointError
from workers.inputs.checkpoint import to_safetensors
from workers.inputs.fit import check_shapes
from workers.inputs.torch_file import file_kind, load_pickled

ADVICE = "where you trust the file, load it in torch and save its tensors alone: torch.save(model.state_dict(), ...)."


def told(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        to_safetensors(path, path.parent, tuple(Net().state_dict()), name="mine")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def write_tar(path: Path) -> None:
    torch.save(Net().state_dict(), path.with_suffix(".inner"))
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_suffix(".inner"), "mine.pth")


def write_cut_zip(path: Path) -> None:
    torch.save(Net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])


def write_cut_legacy(path: Path) -> None:
    torch.save(Net().state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-20])


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (
        lambda path: path.write_bytes(b""),
        "mine is empty; expected .safetensors, or a state dict that torch.save",
    ),
    "text": (lambda path: path.write_text("hello"), "mine is no checkpoint; expected .safetensors, or a state dict"),
    "onnx": (lambda path: path.write_bytes(b"\x08\x07\x12\x07pytorch"), "mine is no checkpoint; expected .safetensors"),
    "zip": (write_zip, "mine is a zip archive without torch's data.pkl (it holds readme.txt); expected .safetensors"),
    "npz": (lambda path: np.savez(path.open("wb"), x=np.zeros(3)), "torch's data.pkl (it holds x.npy); expected"),
    "npy": (lambda path: np.save(path.open("wb"), np.zeros(3)), "mine is a numpy array: convert it to a state dict."),
    "tar": (write_tar, "mine is a tar archive: unpack it (torch.save's own .pth.tar is none, and is read)."),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 99)), "mine is compressed (gzip): unpack it."),
    "lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"),
        "mine is a pointer of git-lfs, not the file itself: run 'git lfs pull'.",
    ),
    "html": (
        lambda path: path.write_text("<!doctype html><p>Not found"),
        "mine is a web page or XML, not a checkpoint",
    ),
    "json": (lambda path: path.write_text('{"weight_map": {}}'), "mine is JSON: name the file with the weights"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "mine is an HDF5 file (Keras, TensorFlow): convert"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1}, 2)), "mine is a pickle that torch.save did not"),
    "script": (
        lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
        "mine is a TorchScript archive, code and all; save model.state_dict() instead.",
    ),
    "whole model": (
        lambda path: torch.save(nn.Sequential(nn.Linear(2, 2)), path),
        "mine holds a whole pickled model (",
    ),
    "whole model, old": (
        lambda path: torch.save({"model": Net()}, path, _use_new_zipfile_serialization=False),
        "mine holds a whole pickled model (",
    ),
    "cut": (write_cut_zip, "mine begins as torch's files do, but is cut short or damaged ("),
    "cut, old": (write_cut_legacy, "mine cannot be read as a state dict with weights_only: "),
    "protocol": (
        lambda path: torch.save(Net().state_dict(), path, pickle_protocol=4),
        f"mine was written with pickle protocol 4; expected torch.save's own, 2: {ADVICE}",
    ),
    "folder": (lambda path: path.mkdir(), "mine is a folder; name the file with the weights."),
    "pipe": (os.mkfifo, "mine is no regular file (a pipe, a socket or a device); expected .safetensors"),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_checkpoint_is_called_by_its_name(tmp_path: Path, case: str) -> None:
    write, said = OTHERS[case]
    path = tmp_path / "mine.safetensors"  # its suffix is nobody's promise
    write(path)
    assert said in told(path)


def test_a_folder_offers_what_lies_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    torch.save(Net().state_dict(), folder / "model.pth")
    assert told(folder) == "mine is a folder; name the file with the weights, such as mine/model.pth."


class Evil:
    """Would run code when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "named"),
    [(os.system, "posix.system"), (eval, "builtins.eval"), (subprocess.call, "subprocess.call"), (getattr, "getattr")],
    ids=["system", "eval", "subprocess", "getattr"],
)
def test_what_would_run_code_is_named_and_not_run(tmp_path: Path, function: Any, named: str, *, zipped: bool) -> None:
    ran = tmp_path / "ran"
    argument = {"eval": f"open({str(ran)!r}, 'w')", "call": ["touch", str(ran)]}.get(function.__name__, f"touch {ran}")
    document = {"state_dict": Net().state_dict(), "args": Evil(function, argument)}
    torch.save(document, tmp_path / "mine.pth", _use_new_zipfile_serialization=zipped)
    message = told(tmp_path / "mine.pth")
    assert message.startswith("mine names ")
    assert named in message
    assert message.endswith(f", which is not read, as a pickle can run code that way: {ADVICE}")
    assert not ran.exists()


@pytest.mark.parametrize("module", ["numpy", "torch.optim", "omegaconf", "pathlib"])
def test_a_name_of_the_list_is_never_called(tmp_path: Path, module: str) -> None:
    """A pickle may name any function of a listed package, with any arguments: a stand-in takes them."""
    torch.save({"state_dict": Net().state_dict(), "args": 0}, tmp_path / "mine.pth")
    pickled = b"\x80\x02}X\x04\x00\x00\x00evilc" + module.encode() + b"\nload\nX\x04\x00\x00\x00file\x85Rs."
    with zipfile.ZipFile(tmp_path / "mine.pth") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, pickled if name.endswith("/data.pkl") else data)
    path = tmp_path / "evil.pth"
    assert list(load_pickled(path, "mine", file_kind(path, "mine"))) == ["evil"]


def test_a_pickle_that_unpacks_without_end_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mine.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mine/data.pkl", bytes(200_000_000))
    assert (tmp_path / "mine.pth").stat().st_size < 300_000
    assert told(tmp_path / "mine.pth") == (
        "mine is cut short or damaged (200000000 bytes of names alone, at most 100000000 expected); copy it anew."
    )


def test_a_tensor_that_claims_more_than_it_holds_is_not_copied(tmp_path: Path) -> None:
    """A view without strides is a terabyte in a few bytes."""
    torch.save({**Net().state_dict(), "fc.weight": torch.zeros(1).expand(1 << 20, 1 << 18)}, tmp_path / "mine.pth")
    network = Net()
    with pytest.raises(CheckpointError, match=r"1 shapes differ \('fc\.weight': \(1048576, 262144\) in the checkpoint"):
        to_safetensors(
            tmp_path / "mine.pth",
            tmp_path,
            tuple(network.state_dict()),
            check=functools.partial(check_shapes, network, name="mine"),
        )


def test_names_in_messages_are_printable(tmp_path: Path) -> None:
    torch.save({"\x1b[31mred\n\u202e": 1, "a": {"b": 2}}, tmp_path / "mine.pth")
    assert told(tmp_path / "mine.pth").isprintable()
    network, state = Net(), Net().state_dict()
    torch.save({**state, "\x1b[31mred\n": torch.zeros(1)}, tmp_path / "mine.pth")
    with pytest.raises(CheckpointError) as caught:
        to_safetensors(
            tmp_path / "mine.pth", tmp_path, tuple(state), check=functools.partial(check_shapes, network, name="mine")
        )
    assert str(caught.value).isprintable()


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x08" + b"\0" * 7]),
)
def test_any_bytes_end_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "mine"
    path.write_bytes(start + data)
    assert told(path).startswith("mine ")


@given(st.data())
def test_a_damaged_file_is_one_line_or_the_same_tensors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "mine.pth"
    torch.save(
        {"state_dict": Net().state_dict(), "epoch": 1}, path, _use_new_zipfile_serialization=data.draw(st.booleans())
    )
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(whole[: data.draw(st.integers(len(whole) // 2, len(whole)))]))
    with contextlib.suppress(CheckpointError):
        to_safetensors(path, path.parent, tuple(Net().state_dict()), name="mine")
