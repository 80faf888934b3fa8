"""A bucket's inputs are fetched once a machine, whoever asks, and are always those that the bucket holds now."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.errors import NotFound, StoreUnavailable
from storage.stores.s3 import S3Store
from storage.stores.uri import open_store
from tests.faults.proxy import Fault, Request, cut_body, faulty
from tests.servers.s3_server import S3Server
from workers.inputs.files import fetch
from workers.inputs.node_cache import LIMIT_VARIABLE, NodeCache, node_cache

BODY = bytes(range(256)) * 4096


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"nestquant-inputs-{os.geteuid()}"


def put(server: S3Server, data: bytes, name: str = "set.tar", uri: str | None = None) -> str:
    """Put an object, and return its URI."""
    place, _, query = (uri or server.uri()).partition("?")
    named = place if uri else f"{place}/{name}"
    store = open_store(f"{named}?{query}")
    assert isinstance(store, S3Store)
    store.client.put_object(Bucket=store.bucket, Key=store.prefix.rstrip("/"), Body=data)
    return f"{named}?{query}"


def test_many_tasks_fetch_one_body(moto_s3: S3Server, place: Path, tmp_path: Path) -> None:
    sent: list[bool] = []

    def look(request: Request) -> Fault | None:
        if request.method == "GET":
            sent.append("if-none-match" in {name.lower() for name in request.headers})
        return None

    with faulty(moto_s3.endpoint_url, look) as proxy:
        direct = put(moto_s3, BODY)
        uri = direct.replace(moto_s3.endpoint_url.rpartition(":")[2], proxy.url.rpartition(":")[2])
        with ThreadPoolExecutor(8) as pool:
            paths = list(pool.map(lambda i: fetch(uri, tmp_path / f"task{i}"), range(8)))
    assert sent == [False] + [True] * 7  # one asks for the bytes, the others whether they are new
    assert {path.read_bytes() for path in paths} == {BODY}
    assert len({path.stat().st_ino for path in paths}) == 1
    assert {path.name for path in paths} == {"set.tar"}


def test_an_object_that_was_replaced_is_fetched_anew_and_whoever_reads_the_old_one_goes_on(
    moto_s3: S3Server, place: Path, tmp_path: Path
) -> None:
    uri = put(moto_s3, BODY)
    before = fetch(uri, tmp_path / "a")
    put(moto_s3, BODY[::-1], uri=uri)
    assert fetch(uri, tmp_path / "b").read_bytes() == BODY[::-1]
    assert before.read_bytes() == BODY
    assert fetch(uri, tmp_path / "a").read_bytes() == BODY  # one job sees the same bytes throughout


def test_bytes_that_changed_under_their_name_are_not_believed(moto_s3: S3Server, place: Path, tmp_path: Path) -> None:
    uri = put(moto_s3, BODY)
    fetch(uri, tmp_path / "a")
    (kept,) = place.glob("*/object")
    kept.chmod(0o600)
    kept.write_bytes(b"x" * len(BODY))
    assert fetch(uri, tmp_path / "b").read_bytes() == BODY
    (kept.parent / "record.json").write_text("{")
    assert fetch(uri, tmp_path / "c").read_bytes() == BODY


def test_what_was_used_longest_ago_goes_first(
    moto_s3: S3Server, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "2500")
    uris = [put(moto_s3, bytes([i]) * 1000, f"{i}.npz") for i in range(3)]
    paths = []
    for i in (0, 1, 0, 2):
        paths.append(fetch(uris[i], tmp_path / f"{len(paths)}"))
        time.sleep(0.01)
    assert sorted(path.read_bytes()[0] for path in place.glob("*/object")) == [0, 2]
    assert [path.read_bytes()[0] for path in paths] == [0, 1, 0, 2]  # links of tasks outlive it
    large = put(moto_s3, BODY, "large.npz")
    assert fetch(large, tmp_path / "large").read_bytes() == BODY
    assert sorted(path.read_bytes()[0] for path in place.glob("*/object")) == [0, 2]  # it never went in


def test_no_limit_is_no_cache_and_a_folder_of_somebody_elses_is_left_alone(
    moto_s3: S3Server, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put(moto_s3, BODY)
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    assert node_cache() is None
    assert fetch(uri, tmp_path / "a").read_bytes() == BODY
    assert not place.exists()
    monkeypatch.delenv(LIMIT_VARIABLE)
    (tmp_path / "theirs").mkdir()
    place.symlink_to(tmp_path / "theirs")
    assert fetch(uri, tmp_path / "b").read_bytes() == BODY
    assert list((tmp_path / "theirs").iterdir()) == []
    place.unlink()
    place.mkdir()
    place.chmod(0o777)
    assert node_cache() is None


def test_what_is_not_there_or_breaks_off_leaves_nothing_that_is_believed(
    moto_s3: S3Server, place: Path, tmp_path: Path
) -> None:
    uri = put(moto_s3, BODY)
    with pytest.raises(NotFound, match=r"no such object"):
        fetch(uri.replace("set.tar", "none.tar"), tmp_path / "none")
    with faulty(
        moto_s3.endpoint_url, lambda request: cut_body(1000, reset=True) if request.method == "GET" else None
    ) as proxy:
        through = uri.replace(moto_s3.endpoint_url.rpartition(":")[2], proxy.url.rpartition(":")[2])
        with pytest.raises(StoreUnavailable, match=r"set\.tar: the body ended at byte \d+ of 1048576"):
            fetch(f"{through}&max_attempts=1", tmp_path / "cut")
    assert list(place.glob("*/object")) == []
    assert list(place.glob("*/record.json")) == []


def test_a_task_killed_while_it_downloads_hinders_nobody(moto_s3: S3Server, place: Path, tmp_path: Path) -> None:
    """The lock dies with its holder; what it had written is not taken for the object."""
    uri = put(moto_s3, BODY)
    script = (
        "import sys, time, workers.inputs.node_cache as c\n"
        "from pathlib import Path\n"
        "from workers.inputs.files import fetch\n"
        "def slow(pieces, path):\n"
        "    path.with_name('object.partial').write_bytes(b'half'); print('begun', flush=True); time.sleep(60)\n"
        "c.write_pieces = slow\n"
        "fetch(sys.argv[1], Path(sys.argv[2]))\n"
    )
    words = [sys.executable, "-c", script, uri, str(tmp_path / "killed")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"begun\n"
        killed.send_signal(signal.SIGKILL)
    assert fetch(uri, tmp_path / "next").read_bytes() == BODY


def test_an_entry_in_use_is_not_removed(tmp_path: Path) -> None:
    from filelock import FileLock

    cache = NodeCache(tmp_path, 10)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "object").write_bytes(b"12345678")
        (tmp_path / name / "record.json").write_text("{}")
    with FileLock(f"{tmp_path / 'a'}.lock"):
        cache.trim(0)
    assert sorted(path.parent.name for path in tmp_path.glob("*/object")) == ["a"]
