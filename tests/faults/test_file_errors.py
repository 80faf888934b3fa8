"""What the file system does to a job, for real: one line with the file, the right exit code, before work is done."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from jobs.cli.main import Exit, exit_code
from jobs.driver import run_job
from jobs.events import Event
from jobs.spec.file import parse_spec
from storage.device import Device, StoreSource
from storage.device.errors import CacheError
from storage.errors import NotFound, StorageError
from storage.stores.local import LocalStore
from storage.stores.uri import open_store
from workers.errors import CheckpointError, ScratchError, ScratchFull, WorkError
from workers.executor import InProcessExecutor
from workers.inputs.files import fetch, reading, require_room
from workers.inputs.tensors import TensorReader
from workers.inputs.writing import writing
from workers.tasks import TensorSource

Document = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a file system in memory on a folder; skip where that is not allowed."""
    folder.mkdir(exist_ok=True)
    try:
        argv = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        subprocess.run(argv, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting needs root: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def failure(document: dict[str, Any]) -> tuple[Exit, str, list[str]]:
    """Run a job that must fail; return its exit code, its one line, and the stages that it ended."""
    stages: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "finished":
            stages.append(event.stage)

    with pytest.raises((WorkError, StorageError)) as caught:
        run_job(parse_spec(document, where="test"), InProcessExecutor(), listen)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return exit_code(caught.value), message, stages


@pytest.fixture
def pickled(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    torch.save(load_file(tiny_checkpoint), tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


def test_a_full_temporary_folder_is_said_before_a_copy_is_made(
    tiny_document: Document, pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(tmp_path / "small", "size=1m") as small:
        monkeypatch.setenv("TMPDIR", str(small))
        code, message, stages = failure(tiny_document(model__checkpoint=str(pickled)))
        assert (code, stages) == (Exit.DISK, ["validate"])
        assert message.startswith(f"A copy of {pickled} needs 1.5 MB in the temporary folder {small}/nestquant-job-")
        assert message.endswith(" MB are free; free some, or set TMPDIR to a larger one.")
        assert list(small.iterdir()) == []


def test_a_folder_too_small_for_what_comes_back_is_said_before_anything_is_quantized(
    tiny_document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(tmp_path / "small", "size=128k") as small:
        monkeypatch.setenv("TMPDIR", str(small))
        code, message, stages = failure(tiny_document())
        assert (code, stages) == (Exit.DISK, ["validate", "stage"])
        assert message.startswith("The version, pulled back to be checked, needs 0.4 MB in the temporary folder")


def test_a_temporary_folder_without_one_free_byte(
    tiny_document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(tmp_path / "small", "size=64k") as small:
        with contextlib.suppress(OSError), (small / "filler").open("wb") as filler:
            filler.write(bytes(1 << 20))
        monkeypatch.setenv("TMPDIR", str(small))
        code, message, stages = failure(tiny_document())
        assert (code, stages) == (Exit.DISK, [])
        assert message == f"No room in the temporary folder {small}; free some, or set TMPDIR to a larger one."
        assert [path.name for path in small.iterdir()] == ["filler"]


def test_a_temporary_folder_that_fills_up_while_it_is_written(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=1m") as small:
        with pytest.raises(ScratchFull, match=r"^No room in the temporary folder .*small; free some"), writing(small):
            (small / "copy").write_bytes(bytes(2 << 20))
        from safetensors.torch import save_file

        with pytest.raises(ScratchFull, match=r"^No room in the temporary folder .*small; free some"), writing(small):
            save_file({"w": torch.zeros(1 << 20)}, small / "weights.safetensors")
        free = shutil.disk_usage(small).free
        require_room(small, free, "What fits")
        with pytest.raises(ScratchFull):
            require_room(small, free + 1, "What does not")


def test_a_read_only_temporary_folder(tiny_document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(tmp_path / "fixed", "ro") as fixed:
        monkeypatch.setenv("TMPDIR", str(fixed))
        assert failure(tiny_document()) == (
            Exit.FAILED,
            f"TMPDIR={fixed} cannot be written; name another folder.",
            [],
        )


def test_a_read_only_store_is_called_read_only(tiny_document: Document, tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "ro") as fixed:
        code, message, stages = failure(tiny_document(store__uri=str(fixed)))
        assert (code, stages) == (Exit.STORE, [])
        assert message == f"{fixed} is on a read-only file system; name a store that can be written"


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_a_store_that_is_a_file_or_a_dangling_link(tiny_document: Document, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, what in (("file", "a file"), ("link", "a link to nothing")):
        uri = f"{tmp_path}/{name}{below}"
        code, message, stages = failure(tiny_document(store__uri=uri))
        assert (code, stages) == (Exit.USAGE, [])
        assert message == f"store {uri!r}: {tmp_path}/{name} is {what}; expected a folder"
        with pytest.raises(StorageError, match="expected a folder"):
            open_store(Path(uri).as_uri())
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    (tmp_path / "there").symlink_to(tmp_path / "folder")
    assert list(open_store(tmp_path / "there").list()) == []


def refuse_locks(monkeypatch: pytest.MonkeyPatch, below: Path, number: int) -> None:
    """Let the system refuse to lock files below a folder."""
    flock = fcntl.flock

    def refuse(file: Any, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(below)):
            raise OSError(number, os.strerror(number))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)


NO_LOCKS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS]


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_store_without_locks_is_refused_before_work(
    tiny_document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = tmp_path / "store"
    refuse_locks(monkeypatch, store, number)
    code, message, stages = failure(tiny_document(store__uri=str(store)))
    assert (code, stages) == (Exit.FAILED, [])
    assert message == (
        f"{store}: this file system has no locks ({os.strerror(number)}); choose another folder, or mount it with locks"
    )


def test_a_full_store_is_a_full_disk(tiny_document: Document, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=256k") as small:
        code, message, _ = failure(tiny_document(store__uri=str(small), evaluate=None, calibration=None, quantize={}))
        assert code == Exit.DISK
        assert f"no space left in {small}; nothing was written, free some and try again" in message
        with pytest.raises(NotFound):
            LocalStore(small).head("models/tiny/versions/00000001.json")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_a_checkpoint_that_is_no_file(tiny_document: Document, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "mine.safetensors")
    code, message, stages = failure(tiny_document(model__checkpoint=str(tmp_path / "mine.safetensors")))
    assert (code, stages) == (Exit.FAILED, ["validate"])
    assert message.startswith(f"{tmp_path / 'mine.safetensors'} is ")


def test_a_checkpoint_that_is_cut_short(tiny_document: Document, tiny_checkpoint: Path, tmp_path: Path) -> None:
    mine, whole = tmp_path / "mine.safetensors", tiny_checkpoint.read_bytes()
    for length in (0, 3, 8, 40, 5000, len(whole) - 1):
        mine.write_bytes(whole[:length])
        code, message, stages = failure(tiny_document(model__checkpoint=str(mine)))
        assert (code, stages) == (Exit.FAILED, ["validate"])
        assert message.startswith(str(mine))


def test_a_worker_told_to_open_a_pipe_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe is no file; expected a checkpoint"):
        TensorReader(TensorSource(None, str(tmp_path / "pipe")))


class Odd(Exception):
    """An error whose own text fails."""

    def __str__(self) -> str:
        raise ValueError("no text")


texts = st.text(max_size=60)
ERRORS = st.one_of(
    texts.map(ValueError),
    texts.map(RuntimeError),
    texts.map(AssertionError),
    texts.map(KeyError),
    texts.map(UnicodeError),
    texts.map(OSError),
    st.builds(OSError, st.sampled_from(sorted(errno.errorcode)), texts),
    st.just(MemoryError()),
    st.just(RecursionError()),
    st.just(AssertionError()),
    st.just(EOFError()),
    st.just(Odd()),
)


@given(ERRORS)
def test_whatever_is_raised_while_a_checkpoint_is_read_is_one_line_with_its_name(error: Exception) -> None:
    with pytest.raises(CheckpointError) as caught, reading("mine.pth"):
        raise error
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "mine.pth" in message
    assert message.isprintable()
    assert caught.value.__cause__ is error
    assert exit_code(caught.value) == Exit.FAILED


@given(ERRORS)
def test_whatever_is_raised_while_a_temporary_file_is_written_is_one_line_with_its_folder(error: Exception) -> None:
    with pytest.raises(ScratchError) as caught, writing(Path("/somewhere")):
        raise error
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "the temporary folder /somewhere" in message.lower()
    assert message.isprintable()
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    assert exit_code(caught.value) == (Exit.DISK if full else Exit.FAILED)


@pytest.mark.parametrize(
    "error", [CheckpointError("ours"), NotFound("theirs"), KeyboardInterrupt(), ScratchFull("full")]
)
def test_what_says_what_it_is_passes_as_it_is(error: BaseException) -> None:
    for boundary in (reading("mine.pth"), writing(Path("/somewhere"))):
        with pytest.raises(type(error)) as caught, boundary:
            raise error
        assert caught.value is error


@pytest.mark.parametrize("number", [*NO_LOCKS, errno.EIO])
def test_a_cache_without_locks_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    cache = tmp_path / "cache"
    refuse_locks(monkeypatch, cache, number)
    device = Device(cache, StoreSource(open_store(tmp_path / "store")), unsigned=True, lock_timeout_s=0.5)
    with pytest.raises(CacheError) as caught:
        device.pull("tiny")
    no_locks = (
        f"this file system has no locks ({os.strerror(number)}); choose another folder for the cache, or mount it"
    )
    assert str(caught.value) == (
        f"{cache}/lock: {os.strerror(number)}" if number == errno.EIO else f"{cache}: {no_locks} with locks"
    )


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_temporary_folder_without_locks_shares_no_downloads_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    shared = tmp_path / f"nestquant-inputs-{os.geteuid()}"
    refuse_locks(monkeypatch, shared, number)
    with pytest.raises(ScratchError) as caught:
        fetch("s3://bucket/set.tar?endpoint_url=http://127.0.0.1:9&region=nowhere", tmp_path / "job")
    assert str(caught.value) == (
        f"The temporary folder {shared}: {os.strerror(number)}; set TMPDIR to a folder that can be written."
    )
