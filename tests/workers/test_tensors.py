"""Range reads of safetensors: the library's own reader is the oracle."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from storage.digest import digest_file
from storage.stores.local import LocalStore
from workers.errors import CheckpointError
from workers.inputs.tensors import GAP_BYTES, MERGED_BYTES, TensorReader, open_tensors
from workers.tasks import TensorSource

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


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "F4"]) | VALUES,
        "shape": st.lists(st.integers(-2, 3), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(-8, 16), min_size=2, max_size=2) | VALUES,
    }
)


@given(st.dictionaries(st.text(max_size=8), ENTRIES | VALUES, max_size=3) | VALUES, st.binary(max_size=32))
def test_any_header_is_one_line_or_tensors_that_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, header: object, data: bytes
) -> None:
    source = written(tmp_path_factory.mktemp("header"), header, data)
    try:
        reader = TensorReader(source)
    except CheckpointError as error:
        told = str(error)
    else:
        told = ""
        for name, info in reader.tensors.items():
            with contextlib.suppress(CheckpointError):  # of values
                assert tuple(reader.read(name).shape) == info.shape
    assert told.isprintable()


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    with pytest.raises(CheckpointError, match="tensor 'w' has dtype F4; expected one of F64"):
        TensorReader(written(tmp_path, header, b"0"))


def test_a_file_cut_short_is_said_before_a_tensor_is_read(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path, _ = checkpoint
    whole, size = path.read_bytes(), path.stat().st_size
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=rf"cut short: {size - 10} bytes, its header accounts for {size}; copy"):
        TensorReader(TensorSource(None, str(cut)))
    cut.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match=r"is cut short: its header takes \d+ bytes, 92 are there; copy it anew"):
        TensorReader(TensorSource(None, str(cut)))
    cut.write_bytes(whole + b"more")
    with pytest.raises(CheckpointError, match=rf"holds more than its header names: {size + 4} bytes"):
        TensorReader(TensorSource(None, str(cut)))


def test_an_object_cut_short_names_the_tensor(checkpoint: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.put("cut", checkpoint[0].read_bytes()[:-10], mode="create")
    reader = TensorReader(TensorSource(store.uri, "cut"))
    last = max(reader.tensors, key=lambda name: reader.tensors[name].start + reader.tensors[name].size_bytes)
    with pytest.raises(CheckpointError, match=r"ends after \d+ of \d+ bytes: the file is cut short"):
        reader.read(last)


@pytest.mark.parametrize(
    ("offsets", "said"),
    [(([0, 4], [8, 12]), "tensor 'b' begins at byte"), (([0, 4], [2, 6]), "tensor 'b' begins at byte")],
    ids=["hole", "overlap"],
)
def test_a_hole_or_an_overlap_is_refused(tmp_path: Path, offsets: tuple[list[int], list[int]], said: str) -> None:
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": span} for name, span in zip("ab", offsets, strict=True)
    }
    with pytest.raises(CheckpointError, match=said):
        TensorReader(written(tmp_path, header, b"0" * 12))


def test_a_digest_is_that_of_the_file(checkpoint: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = checkpoint
    assert TensorReader(TensorSource(None, str(path))).checked_digest() == digest_file(path)


def test_a_digest_looks_at_every_piece_of_a_large_tensor(tmp_path: Path) -> None:
    path, weight = tmp_path / "large.safetensors", torch.zeros(3_000_000)
    save_file({"w": weight, "v": torch.ones(3)}, path)
    assert TensorReader(TensorSource(None, str(path))).checked_digest() == digest_file(path)
    weight[2_500_000] = math.nan
    save_file({"w": weight, "v": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="tensor 'w' holds NaN"):
        TensorReader(TensorSource(None, str(path))).checked_digest()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_are_looked_at_wherever_they_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.ones(4, 2, dtype=dtype)
    weight[3, 1] = -math.inf
    save_file({"bn.running_var": torch.tensor([1.0, -1e-3], dtype=dtype), "w": weight}, tmp_path / "bad.safetensors")
    reader = TensorReader(TensorSource(None, str(tmp_path / "bad.safetensors"), name="mine.pth"))
    assert reader.read_rows("w", 0, 3).sum() == 6
    for read in (lambda: reader.read("w"), lambda: reader.read_rows("w", 3, 4)):
        with pytest.raises(CheckpointError, match=r"^mine\.pth: tensor 'w' holds infinity"):
            read()
    with pytest.raises(CheckpointError, match=r"tensor 'bn\.running_var' holds a variance below zero, -0\.00"):
        reader.read("bn.running_var")


def rewritten(path: Path, **tensors: torch.Tensor) -> None:
    """Write a file again under its name, in place: the same inode, another time."""
    save_file(tensors, path.with_suffix(".new"))
    before = path.stat().st_mtime_ns
    path.write_bytes(path.with_suffix(".new").read_bytes())
    os.utime(path, ns=(before + 1, before + 1))  # the clock of files may be as coarse as 10 ms


def test_a_file_written_again_under_its_name_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(100), "b": torch.arange(6.0)}, path)
    source = TensorSource(None, str(path))
    first = open_tensors(source)
    assert open_tensors(source) is first
    rewritten(path, b=torch.arange(6.0) + 10)
    assert open_tensors(source).read("b").tolist() == [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
    for read in (lambda: first.read("b"), first.checked_digest, first.check_unchanged):
        with pytest.raises(CheckpointError, match=r"w\.safetensors was written to while it was read; wait"):
            read()
    with pytest.raises(CheckpointError, match="was written to while it was read"):
        open_tensors(first.pinned)


def test_a_file_of_the_same_length_put_in_its_place_is_another_one(tmp_path: Path) -> None:
    path, other = tmp_path / "w.safetensors", tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    save_file({"a": torch.ones(4)}, other)
    seen = path.stat()
    os.utime(other, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    reader = open_tensors(TensorSource(None, str(path)))
    other.replace(path)
    assert open_tensors(TensorSource(None, str(path))).read("a").tolist() == [1.0, 1.0, 1.0, 1.0]
    with pytest.raises(CheckpointError, match="was written to while it was read"):
        reader.read("a")


def test_an_object_written_again_is_another_one(tmp_path: Path) -> None:
    store, path = LocalStore(tmp_path / "store"), tmp_path / "w.safetensors"
    source = TensorSource(store.uri, "jobs/a/network.safetensors")
    for fill in (1.0, 2.0):
        save_file({"pad": torch.zeros(int(fill)), "w": torch.full((2,), fill)}, path)
        store.put_file(source.key, path)
        assert open_tensors(source).read("w").tolist() == [fill, fill]


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
