"""Nothing is lost and nothing published twice: lost answers, kills at every step, many publishers at once."""

from __future__ import annotations

import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from storage.errors import AlreadyExists, StorageError, StoreUnavailable, WriteConflict
from storage.registry import Registry
from storage.retention import fsck
from storage.stores import capabilities
from storage.stores.blob_store import BlobStore
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore
from storage.stores.uri import open_store
from tests.servers.s3_server import S3Server
from tests.storage.artifacts import make_draft
from tests.storage.publishers import Dead, DiesAt, When, fork_server, publish_many, run_job, run_job_and_die
from tests.storage.wrappers import FailsAt, WatchedStore

# A fork server keeps the environment of its start, whichever test starts it.
pytestmark = pytest.mark.usefixtures("s3_credentials")
MANIFEST = "models/net/versions/00000001.json"


def check_whole(store: BlobStore, *, ended: bool = True) -> None:
    """Assert that a reader finds only whole versions, numbered without a gap.

    Where the job has not ended, the copy of a tag's entry may lag behind it until the next run.
    """
    registry = Registry(store)
    versions = registry.versions("net")
    assert versions == list(range(1, registry.newest_version("net") + 1))
    problems = fsck(store).problems
    assert [problem for problem in problems if ended or "the copy for older releases is missing" not in problem] == []


def check_completed_by_next_run(store: BlobStore) -> None:
    """Assert that the next run of the same job ends with one version and sends nothing that is there."""
    before = {info.key: store.get(info.key) for info in store.list() if not info.key.startswith("doctor/")}
    watched = WatchedStore(store)
    assert run_job(watched).version == 1
    mutable = {
        "models/net/tags/latest.json",
        "models/net/entries/latest/newest.json",
        "models/net/versions/00000001.accuracy.json",
    }
    assert before.keys() & set(watched.written()) - mutable == set()
    assert Registry(store).versions("net") == [1]
    assert Registry(store).resolve("net", "latest").version == 1
    assert all(store.get(key) == data for key, data in before.items() if key not in mutable)
    check_whole(store)


def steps_of_a_job() -> int:
    """Return how many operations the job sends to an empty store."""
    store = WatchedStore(MemoryStore("count"))
    run_job(store)
    return len(store.steps)


def test_the_job_is_as_many_steps_as_expected() -> None:
    # 5 blobs: HEAD, PUT, and HEAD at the check. The race: 2 rounds of 8 PUTs, GET, late PUT, DELETE.
    # Then the tag's GET, HEAD of version 1, PUT; for the tag GET of the manifest, of its copy, of the hint and of
    # entry 1, PUT of the entry and of both copies, HEAD of entry 2; PUT of the report.
    assert steps_of_a_job() == 5 * 3 + 2 * 11 + 3 + 4 + 3 + 1 + 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_death_at_every_step(when: When) -> None:
    for index in range(steps_of_a_job()):
        store = MemoryStore(f"death-{when}-{index}")
        with pytest.raises(Dead):
            run_job(DiesAt(store, index, when))
        check_whole(store, ended=False)
        check_completed_by_next_run(store)


@pytest.mark.parametrize("when", ["before", "after"])
def test_sigkill_at_every_step(when: When, tmp_path: Path) -> None:
    context = fork_server()
    for index in range(steps_of_a_job()):
        folder = tmp_path / str(index)
        process = context.Process(target=run_job_and_die, args=(str(folder), index, when))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        check_whole(LocalStore(folder), ended=False)
        check_completed_by_next_run(LocalStore(folder))


@pytest.mark.parametrize("when", ["before", "after"])
def test_death_at_every_write_on_ceph(when: When, ceph_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    race = capabilities.race_create(open_store(ceph_s3.uri()))
    assert race.holds
    monkeypatch.setattr(capabilities, "race_create", lambda _: race)  # the race is not what is killed here
    clean = WatchedStore(open_store(ceph_s3.uri()))
    run_job(clean, groups=1)
    writes = [index for index, step in enumerate(clean.steps) if step.operation == "put"]
    assert len(writes) == 8  # 3 blobs, manifest, the tag's entry and its two copies, report
    for index in writes:
        store = open_store(ceph_s3.uri())
        with pytest.raises(Dead):
            run_job(DiesAt(store, index, when), groups=1)
        check_whole(store, ended=False)
        watched = WatchedStore(store)
        there = {info.key for info in store.list("blobs/")}
        assert run_job(watched, groups=1).version == 1
        assert there & set(watched.written()) == set()
        check_whole(store)


@pytest.mark.parametrize("when", ["before", "after"])
def test_error_at_every_step_is_told_or_overcome(when: When) -> None:
    for index in range(steps_of_a_job()):
        store = MemoryStore(f"error-{when}-{index}")
        try:
            run_job(FailsAt(store, index, when, StoreUnavailable("the network is down")))
        except StorageError as error:
            assert str(error) == "the network is down"  # noqa: PT017 - some steps overcome it
        check_whole(store, ended=False)
        check_completed_by_next_run(store)


class CommitAnswer(WatchedStore):
    """Answers the commit with ``errors``, one a try; each try lands first where ``lands``."""

    def __init__(self, inner: BlobStore, errors: list[Exception], *, lands: bool) -> None:
        super().__init__(inner)
        self._errors, self._lands = errors, lands

    def put(self, key, data, *, mode):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        if key == MANIFEST and self._errors:
            if self._lands:
                self.inner.put(key, data, mode=mode)
            raise self._errors.pop(0)
        return super().put(key, data, mode=mode)


@pytest.mark.parametrize("error", [StoreUnavailable("timed out"), WriteConflict("409"), AlreadyExists("412")])
def test_lost_answer_to_the_commit_ends_as_success_exactly_once(error: StorageError) -> None:
    store = MemoryStore("lost")
    lying = CommitAnswer(store, [error], lands=True)
    published = Registry(lying).publish(make_draft(Registry(store)))
    assert (published.version, published.created) == (1, True)
    assert (published.lost_races, published.retries) == (0, 1)
    assert Registry(store).resolve("net", 1).digest == published.digest
    assert Registry(store).newest_version("net") == 1


@pytest.mark.parametrize("error", [StoreUnavailable("timed out"), WriteConflict("409")])
def test_a_commit_that_did_not_land_is_tried_again(error: StorageError) -> None:
    store = MemoryStore("again")
    lying = CommitAnswer(store, [error] * 4, lands=False)
    published = Registry(lying).publish(make_draft(Registry(store)))
    assert (published.version, published.lost_races, published.retries) == (1, 0, 4)
    assert Registry(store).versions("net") == [1]


def test_a_commit_that_never_lands_is_an_error() -> None:
    store = MemoryStore("never")
    lying = CommitAnswer(store, [StoreUnavailable(f"try {number}") for number in range(9)], lands=False)
    with pytest.raises(StoreUnavailable, match="try 4"):
        Registry(lying).publish(make_draft(Registry(store)))
    assert Registry(store).versions("net") == []


def test_a_number_taken_meanwhile_is_left_alone() -> None:
    store = MemoryStore("taken")
    theirs = make_draft(Registry(store), seed=1)
    ours = make_draft(Registry(store), seed=2)

    class Overtaken(WatchedStore):
        def before(self, index, step):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            if (step.operation, step.key) == ("put", MANIFEST):
                Registry(self.inner).publish(theirs)

    published = Registry(Overtaken(store)).publish(ours)
    assert (published.version, published.lost_races, published.retries) == (2, 1, 0)
    assert Registry(store).resolve("net", 1).manifest.recipe == {"seed": 1}
    assert Registry(store).resolve("net", 2).manifest.recipe == {"seed": 2}


@pytest.mark.parametrize("kind", ["local", "ceph"])
def test_many_publishers_of_one_name(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    publishers, count = 8, 10
    uri = str(tmp_path) if kind == "local" else request.getfixturevalue("ceph_s3").uri()
    with ProcessPoolExecutor(publishers, mp_context=fork_server()) as pool:
        futures = [pool.submit(publish_many, uri, publisher, count) for publisher in range(publishers)]
        published = [pair for future in futures for pair in future.result()]
    registry = Registry(open_store(uri))
    assert sorted(version for _, version in published) == list(range(1, publishers * count + 1))
    assert registry.versions("net") == list(range(1, publishers * count + 1))
    for seed, version in published:
        assert registry.resolve("net", version).manifest.recipe == {"seed": seed}
    assert Counter(seed for seed, _ in published) == Counter(range(publishers * count))
    report = fsck(registry.store)
    assert (report.versions, report.problems) == (80, ())
