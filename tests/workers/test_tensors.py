"""Range reads of safetensors: the library's own reader is the oracle."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from storage.local import LocalStore
from workers.errors import CheckpointError
from workers.tensors import GAP_BYTES, MERGED_BYTES, TensorReader, TensorSource

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


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> TensorReader:
    """In the order of the file: 3 small tensors, one beyond the gap that is read along, 2 small, one beyond the cap."""
    sizes = {"a": 10, "b": 0, "c": 100, "d": GAP_BYTES, "e": 7, "f": 9, "g": MERGED_BYTES + 1}
    tensors = {name: torch.randint(0, 255, (size,), dtype=torch.uint8) for name, size in sizes.items()}
    store = LocalStore(tmp_path_factory.mktemp("layered"))
    save_file(tensors, store.root / "layered")
    return TensorReader(TensorSource(store.uri, "layered"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all range requests from now on."""
    lengths: list[int] = []
    read = LocalStore.get_range

    def counted(store: LocalStore, key: str, start: int, length: int) -> bytes:
        lengths.append(length)
        return read(store, key, start, length)

    monkeypatch.setattr(LocalStore, "get_range", counted)
    return lengths


@pytest.mark.parametrize(
    ("names", "lengths"),
    [
        ("abc", [110]),
        ("cab", [110]),  # in any order
        ("abcef", [110 + GAP_BYTES + 16]),  # what lies between is read along
        ("abcdef", [110 + GAP_BYTES + 16]),
        ("efg", [16, MERGED_BYTES + 1]),
        ("gf", [MERGED_BYTES + 1, 9]),
        ("aa", [10, 10]),
    ],
)
def test_neighbours_come_with_one_request(
    layered: TensorReader, names: str, lengths: list[int], asked: list[int]
) -> None:
    expected = {name: layered.read(name) for name in names}
    asked.clear()
    planned = layered.planned((name, None, None) for name in names)
    for name in names:
        assert torch.equal(planned.read(name), expected[name])
    assert asked == lengths


def test_a_gap_longer_than_a_request_is_worth_is_not_read(asked: list[int], tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    tensors = {"a": torch.ones(8), "b": torch.zeros(GAP_BYTES // 4 + 1), "c": torch.full((8,), 2.0)}
    save_file(tensors, store.root / "gap")
    planned = TensorReader(TensorSource(store.uri, "gap")).planned([("a", None, None), ("c", None, None)])
    asked.clear()
    assert [planned.read(name).tolist() for name in "ac"] == [[1.0] * 8, [2.0] * 8]
    assert asked == [32, 32]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from("abcdefg"), max_size=8),
    st.lists(st.tuples(st.sampled_from("abcdefg"), st.integers(0, 9), st.integers(0, 9)), max_size=6),
)
def test_whatever_was_planned_the_same_is_read(
    layered: TensorReader, whole: list[str], rows: list[tuple[str, int, int]]
) -> None:
    reads = [(name, *sorted((one, other))) for name, one, other in rows if layered.tensors[name].shape[0] >= 9]
    planned = layered.planned([*((name, None, None) for name in whole), *reads[::2]])
    for _ in range(2):  # more often than planned, too
        for name, start, stop in reads:
            assert torch.equal(planned.read_rows(name, start, stop), layered.read_rows(name, start, stop))
        for name in whole:
            assert torch.equal(planned.read(name), layered.read(name))
