"""Range reads of safetensors: the library's own reader is the oracle."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from storage.local import LocalStore
from workers.errors import CheckpointError
from workers.tensors import TensorReader, TensorSource

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (5, 3, 2), generator=generator).to(dtype) for dtype in DTYPES}
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 4)
    path = tmp_path_factory.mktemp("tensors") / "all.safetensors"
    save_file(tensors, path, metadata={"arch": "none"})
    return path, tensors


def test_every_dtype_and_shape_reads_back(checkpoint: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = checkpoint
    reader = TensorReader(TensorSource(None, str(path)))
    assert reader.metadata == {"arch": "none"}
    assert reader.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor), name
        assert reader.read(name).dtype == tensor.dtype


def test_a_store_serves_the_same_rows_as_the_file(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path, tensors = checkpoint
    store = LocalStore(tmp_path / "store")
    store.put("weights/all.safetensors", path.read_bytes(), mode="create")
    reader = TensorReader(TensorSource(store.uri, "weights/all.safetensors"))
    assert torch.equal(reader.read_rows("torch.float32", 1, 4), tensors["torch.float32"][1:4])


@given(st.integers(0, 5), st.integers(0, 5))
def test_rows_are_slices(checkpoint: tuple[Path, dict[str, torch.Tensor]], one: int, other: int) -> None:
    path, tensors = checkpoint
    start, stop = sorted((one, other))
    rows = TensorReader(TensorSource(None, str(path))).read_rows("torch.float16", start, stop)
    assert torch.equal(rows, tensors["torch.float16"][start:stop])


def written(tmp_path: Path, header: object, data: bytes = b"") -> TensorSource:
    text = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return TensorSource(None, str(path))


def test_what_is_no_safetensors_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"PK\x03\x04 a zip archive")
    with pytest.raises(CheckpointError, match=r"is not a safetensors file \(header length"):
        TensorReader(TensorSource(None, str(tmp_path / "bad.safetensors")))
    (tmp_path / "bad.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        TensorReader(TensorSource(None, str(tmp_path / "bad.safetensors")))


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_named(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}}
    with pytest.raises(CheckpointError, match=r"tensor 'w' holds 12 bytes; shape \(2, 2\) needs 16"):
        TensorReader(written(tmp_path, header, b"0" * 12))


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    with pytest.raises(CheckpointError, match="tensor 'w' has dtype F4; expected one of F64"):
        TensorReader(written(tmp_path, header, b"0"))


def test_a_file_cut_short_names_the_tensor(checkpoint: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    path, _ = checkpoint
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-10])
    reader = TensorReader(TensorSource(None, str(cut)))
    last = max(reader.tensors, key=lambda name: reader.tensors[name].start + reader.tensors[name].size_bytes)
    with pytest.raises(CheckpointError, match=r"ends after \d+ of \d+ bytes: the file is cut short"):
        reader.read(last)


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(CheckpointError, match=r"Cannot read the checkpoint /nowhere/x: No such file or directory\."):
        TensorReader(TensorSource(None, "/nowhere/x"))
