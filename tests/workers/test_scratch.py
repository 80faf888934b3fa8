"""Temporary folders: gone with their owner, found again where it was killed, and nothing else is touched."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from workers.errors import ScratchError, ScratchFull
from workers.scratch import MARK, scratch, sweep

HOLDER = """
import sys, time
from pathlib import Path
from workers.scratch import scratch
with scratch("measure") as folder:
    (folder / "deep").mkdir()
    (folder / "deep/weights").write_bytes(bytes(70_000))
    (folder / "link").symlink_to(sys.argv[1])
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of its own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A user's folder with a file."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("ten years")
    return folder


@pytest.fixture
def holder(place: Path, precious: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a folder with a file of 70,000 bytes and a link to the user's folder."""
    argv = [sys.executable, "-c", HOLDER, str(precious)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert Path(process.stdout.readline().strip()).parent == place
        yield process
        process.kill()


def listing(folder: Path) -> list[tuple[str, bytes]]:
    """Return every file below, links not followed, with its content."""
    return sorted(
        (str(path.relative_to(folder)), path.read_bytes() if path.is_file() and not path.is_symlink() else b"")
        for path in folder.rglob("*")
    )


def test_a_folder_is_gone_with_its_block(place: Path, precious: Path) -> None:
    with scratch("job") as folder:
        assert (folder.parent, folder.stat().st_mode & 0o777) == (place, 0o700)
        (folder / "link").symlink_to(precious)
        (folder / "deep/er").mkdir(parents=True)
        (folder / "deep/er/file").write_bytes(b"x")
    with pytest.raises(ZeroDivisionError), scratch("job"):
        raise ZeroDivisionError
    assert listing(place) == []
    assert listing(precious) == [("thesis.txt", b"ten years")]


def test_what_a_killed_process_left_goes_at_the_next_start(
    place: Path, precious: Path, holder: subprocess.Popen[str]
) -> None:
    told: list[str] = []
    before = listing(place)
    assert len(before) == 5
    with scratch("job", tell=told.append):
        assert [row for row in listing(place) if "nestquant-measure" in row[0]] == before  # its owner lives
    assert told == []
    holder.kill()
    holder.wait()
    assert listing(place) == before
    with scratch("job", tell=told.append):
        pass
    size = 70_000 + len(next(data for name, data in before if name.endswith(MARK)))
    assert told == [f"Removed 1 folders that killed jobs left in {place}: {size / 1e6:.1f} MB freed."]
    assert listing(place) == []
    assert listing(precious) == [("thesis.txt", b"ten years")]


def test_bytes_are_counted_to_the_last(place: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    mark = next(place.glob(f"*/{MARK}")).stat().st_size
    swept = sweep(place)
    assert (swept.folders, swept.freed_bytes) == (1, 70_000 + mark)


def decoys(place: Path, precious: Path) -> None:
    """Put what looks like a left folder, and is none, beside them."""
    (place / "nestquant-job-mythesis").mkdir()  # the name fits to the letter; no mark
    (place / "nestquant-job-mythesis/thesis.txt").write_text("ten years")
    os.utime(place / "nestquant-job-mythesis", (0, 0))
    (place / "nestquant-job-linkname").symlink_to(precious)
    (place / "nestquant-job-filename").write_text("a file")
    for name in ("nestquant-job-abc", "nestquant-other-abcdefgh", "nestquant-job-abcdefghi", "xnestquant-job-abcdefgh"):
        (place / name).mkdir()
        (place / name / MARK).write_bytes(b"A folder of a nestquant process. It is removed by the next one that finds")
        (place / name / "file").write_text("x")
    (place / "nestquant-job-wrongtxt").mkdir()
    (place / "nestquant-job-wrongtxt" / MARK).write_text("mine")
    (place / "nestquant-job-marklink").mkdir()
    (place / "nestquant-job-marklink" / MARK).symlink_to(precious / "thesis.txt")
    (place / "nestquant-job-markdirs").mkdir()
    (place / "nestquant-job-markdirs" / MARK).mkdir()
    os.mkfifo(place / "nestquant-job-marklink/fifo")
    (place / "nestquant-job-markfifo").mkdir()
    os.mkfifo(place / "nestquant-job-markfifo" / MARK)
    (place / "nestquant-job-new_made").mkdir()  # a process that has not begun yet


def test_nothing_else_is_touched(place: Path, precious: Path) -> None:
    decoys(place, precious)
    before = [listing(place), listing(precious)]
    told: list[str] = []
    with scratch("job", tell=told.append):
        pass
    assert told == []
    assert [listing(place), listing(precious)] == before


def test_an_old_empty_folder_of_our_name_goes(place: Path) -> None:
    (place / "nestquant-job-abcdefgh").mkdir()
    old = time.time() - 7200
    os.utime(place / "nestquant-job-abcdefgh", (old, old))
    assert sweep(place).folders == 0
    assert listing(place) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder away needs root")
def test_a_folder_of_another_user_stays(place: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    (left,) = place.iterdir()
    os.chown(left, 65534, 65534)
    assert sweep(place).folders == 0
    assert (left / MARK).exists()


def test_a_removal_that_was_killed_is_ended_by_the_next(place: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    (left,) = place.iterdir()
    (left / "deep/weights").unlink()  # where the mark went last, it is there until all the rest is gone
    assert sweep(place).folders == 1
    assert listing(place) == []


def test_two_that_sweep_at_once_remove_it_once(place: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    code = "import sys, pathlib, workers.scratch as s; print(s.sweep(pathlib.Path(sys.argv[1])).folders)"
    argv = [sys.executable, "-c", code, str(place)]
    pair = [subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sum(int(process.communicate()[0]) for process in pair) == 1
    assert listing(place) == []


def test_a_temporary_folder_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with (
        pytest.raises(ScratchError, match=rf"^TMPDIR={tmp_path}/gone: no such folder; make it, or name"),
        scratch("job"),
    ):
        pass
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    with pytest.raises(ScratchError, match=r"file: no such folder"), scratch("job"):
        pass


def test_errors_of_the_temporary_folder_are_one_line(tmp_path: Path) -> None:
    full = ScratchError.of(tmp_path, OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(full, ScratchFull)
    assert str(full) == f"No room in the temporary folder {tmp_path}; free some, or set TMPDIR to a larger one."
    other = ScratchError.of(tmp_path, OSError(errno.EIO, "Input/output error"))
    assert not isinstance(other, ScratchFull)
    assert str(other).startswith(f"The temporary folder {tmp_path}: Input/output error; set TMPDIR")
