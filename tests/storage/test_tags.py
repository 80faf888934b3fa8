"""Tags move by numbered entries: forward by anyone, back by a person's word, and by no race."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.device import Device, StoreSource
from storage.device.resolve import resolve_unsigned
from storage.device.source import Documents
from storage.errors import InvalidManifest, NotFound, StoreUnavailable, WouldGoBack
from storage.layout import entry_key, newest_entry_key, tag_key
from storage.manifest import canonical_json
from storage.numbering import newest_number
from storage.references import TagRecord
from storage.registry import Registry
from storage.retention import fsck
from storage.stores.blob_store import BlobStore
from storage.stores.memory import MemoryStore
from storage.stores.uri import open_store
from tests.storage.artifacts import make_draft, publish_new
from tests.storage.wrappers import FailsAt, WatchedStore


@pytest.fixture
def registry() -> Registry:
    """Five versions of ``net``, no tag."""
    store = MemoryStore()
    for seed in range(5):
        publish_new(store, seed=seed)
    return Registry(store)


def plain(registry: Registry, version: int, tag: str = "stable") -> None:
    """Move a tag as a release without entries does: overwrite the one object."""
    record = TagRecord(name="net", version=version, digest=registry.resolve("net", version).digest)
    registry.store.put(tag_key("net", tag), canonical_json(record), mode="overwrite")


def told(registry: Registry, tag: str = "stable") -> list[tuple[int, int, str]]:
    """Return number, version and kind of each entry."""
    return [(entry.number, entry.version, entry.move) for entry, _ in registry.tag_log("net", tag).history()]


def device_sees(store: BlobStore, tag: str) -> int:
    return resolve_unsigned(Documents(StoreSource(store)), "net", tag).manifest.version


def test_a_tag_goes_back_on_a_persons_word_alone(registry: Registry) -> None:
    registry.tag("net", "stable", 3)
    with pytest.raises(WouldGoBack) as caught:
        registry.tag("net", "stable", 2)
    assert str(caught.value) == (
        "net: tag 'stable' names version 3; at version 2 devices would go back: say --back if that is meant"
    )
    assert registry.tags("net") == {"stable": 3}
    registry.tag("net", "stable", 2, back=True)
    registry.tag("net", "stable", 2)  # where it is: no further entry
    assert told(registry) == [(1, 3, "forward"), (2, 2, "back")]
    assert registry.read_tag("net", "stable").version == 2


def test_undo_takes_back_one_move_after_the_other(registry: Registry) -> None:
    for version in (1, 2, 4):
        registry.tag("net", "stable", version)
    log = registry.tag_log("net", "stable")
    assert [log.undo().version for _ in range(2)] == [2, 1]
    with pytest.raises(NotFound, match="tag 'stable' names version 1, and nothing stands before that"):
        log.undo()
    registry.tag("net", "stable", 5)
    assert log.undo().version == 1
    assert [version for _, version, _ in told(registry)] == [1, 2, 4, 2, 1, 5, 1]
    with pytest.raises(NotFound, match="model 'net': no tag 'none'"):
        registry.tag_log("net", "none").undo()


def test_a_job_that_ends_late_moves_nothing_back_and_undoes_no_person(registry: Registry) -> None:
    assert registry.tag_forward("net", "stable", 4) is not None
    assert registry.tag_forward("net", "stable", 3) is None
    registry.tag("net", "stable", 1, back=True)
    assert registry.tag_forward("net", "stable", 3) is None
    assert registry.tag_forward("net", "stable", 4) is None
    assert registry.read_tag("net", "stable").version == 1
    entry = registry.tag_forward("net", "stable", 5)
    assert entry is not None
    assert (entry.number, entry.version, entry.before) == (3, 5, 2)


def test_tags_of_older_releases_are_read_and_kept(registry: Registry) -> None:
    plain(registry, 2)
    assert registry.read_tag("net", "stable").version == device_sees(registry.store, "stable") == 2
    registry.tag("net", "stable", 3)
    assert told(registry) == [(1, 2, "adopted"), (2, 3, "forward")]
    plain(registry, 4)  # an older publisher goes on: what is ahead of all entries is its move
    assert registry.read_tag("net", "stable").version == device_sees(registry.store, "stable") == 4
    assert registry.tag_log("net", "stable").undo().version == 3
    assert told(registry)[2:] == [(3, 4, "adopted"), (4, 3, "undo")]
    plain(registry, 4)  # a straggler: version 4 was named, and taken back
    assert registry.read_tag("net", "stable").version == device_sees(registry.store, "stable") == 3


def test_a_copy_that_lags_is_named_by_fsck_and_mended_by_the_next_move(registry: Registry) -> None:
    registry.tag("net", "stable", 3)
    plain(registry, 1)
    assert fsck(registry.store).problems == (
        "net tag 'stable': entry 1 names version 3, and the copy for older releases says version 1; "
        "'nestquant tag net@3 stable' writes it anew",
    )
    registry.tag("net", "stable", 3)
    assert fsck(registry.store).problems == ()
    assert told(registry) == [(1, 3, "forward")]
    registry.store.delete(tag_key("net", "stable"))
    assert registry.tags("net") == {"stable": 3}
    assert fsck(registry.store).problems[0].endswith("is missing; 'nestquant tag net@3 stable' writes it anew")
    registry.store.put(tag_key("net", "stable"), b"{", mode="overwrite")
    assert registry.read_tag("net", "stable").version == 3
    assert "cannot be read" in fsck(registry.store).problems[0]
    registry.tag("net", "stable", 4)
    assert fsck(registry.store).problems == ()


def test_a_copy_that_names_no_version_does_not_stop_later_moves(registry: Registry) -> None:
    lie = TagRecord(name="net", version=77, digest=f"sha256:{'0' * 64}")
    registry.store.put(tag_key("net", "stable"), canonical_json(lie), mode="overwrite")
    assert registry.tag_forward("net", "stable", 2) is not None
    assert told(registry) == [(1, 2, "forward")]
    assert registry.read_tag("net", "stable").version == 2


def test_a_damaged_entry_is_named(registry: Registry) -> None:
    registry.tag("net", "stable", 3)
    key = entry_key("net", "stable", 1)
    whole = registry.store.get(key)
    registry.store.put(key, whole[:-1], mode="overwrite")
    with pytest.raises(InvalidManifest, match=r"entries/stable/00000001\.json: no entry of a tag"):
        registry.read_tag("net", "stable")
    registry.store.put(key, whole, mode="overwrite")
    registry.store.put(entry_key("net", "stable", 2), whole, mode="create")
    with pytest.raises(InvalidManifest, match="is entry 1 of net's tag 'stable'; it was stored under another number"):
        registry.read_tag("net", "stable")


def test_a_hint_that_lies_costs_reads_alone(registry: Registry) -> None:
    for version in range(1, 6):
        registry.tag("net", "stable", version)
    hint = newest_entry_key("net", "stable")
    for lie in (registry.store.get(hint).replace(b'"number":5', b'"number":99'), b"{", b"[]"):
        registry.store.put(hint, lie, mode="overwrite")
        assert registry.read_tag("net", "stable").version == 5
    registry.store.delete(hint)
    assert registry.read_tag("net", "stable").version == 5


def test_how_many_reads_a_tag_takes(registry: Registry) -> None:
    watched = WatchedStore(registry.store)
    for version in range(1, 6):
        registry.tag("net", "stable", version)
    assert Registry(watched).read_tag("net", "stable").version == 5
    assert len(watched.steps) == 4  # the copy, the hint, its entry, and none behind it
    plain(registry, 5, "old")
    watched.steps.clear()
    assert Registry(watched).read_tag("net", "old").version == 5
    assert len(watched.steps) == 3
    assert {step.operation for step in watched.steps} == {"get"}


@given(newest=st.integers(0, 5000), hint=st.integers(0, 10_000))
def test_the_newest_number_is_found_from_any_hint(newest: int, hint: int) -> None:
    asked: list[int] = []

    def there(number: int) -> bool:
        asked.append(number)
        return 1 <= number <= newest

    assert newest_number(there, hint) == newest
    assert len(asked) <= 2 + 2 * (newest + 2).bit_length()


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_at_any_step_of_a_move_leaves_the_old_or_the_new(registry: Registry, when: str) -> None:
    registry.tag("net", "stable", 1)
    clean = WatchedStore(registry.store)
    Registry(clean).tag("net", "other", 2)
    for index in range(len(clean.steps) + 2):
        registry.tag("net", f"t{index}", 1)
        failing = FailsAt(registry.store, index, when, StoreUnavailable("the network is down"))  # type: ignore[arg-type]
        try:
            Registry(failing).tag("net", f"t{index}", 2)
            expected = {2}
        except StoreUnavailable:
            expected = {1, 2}
        assert registry.read_tag("net", f"t{index}").version in expected
        assert device_sees(registry.store, f"t{index}") in expected
        registry.tag("net", f"t{index}", 2)
        assert fsck(registry.store).problems == ()


WRITERS = 32


@pytest.mark.parametrize("kind", ["local", "moto", "ceph"])
def test_publishers_and_taggers_at_once(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """32 that publish and tag, and a reader: nothing is lost, and no reader ever sees a tag go back."""
    uri = str(tmp_path / "store") if kind == "local" else request.getfixturevalue(f"{kind}_s3").uri()
    seen: dict[str, list[int]] = {"registry": [], "device": []}
    done = threading.Event()
    barrier = threading.Barrier(WRITERS)

    def publish(seed: int) -> tuple[int, bool]:
        registry = Registry(open_store(uri))
        draft = make_draft(registry, seed=seed, groups=1)
        barrier.wait(60)
        version = registry.publish(draft).version
        return version, registry.tag_forward("net", "latest", version) is not None

    def watch() -> None:
        registry = Registry(open_store(uri))
        while not done.wait(0.01):
            try:
                seen["registry"].append(registry.read_tag("net", "latest").version)
                seen["device"].append(device_sees(registry.store, "latest"))
            except NotFound:
                continue

    reader = threading.Thread(target=watch)
    reader.start()
    try:
        with ThreadPoolExecutor(WRITERS) as pool:
            published = list(pool.map(publish, range(WRITERS)))
    finally:
        done.set()
        reader.join()
    registry = Registry(open_store(uri))
    assert sorted(version for version, _ in published) == list(range(1, WRITERS + 1))
    assert registry.versions("net") == list(range(1, WRITERS + 1))
    assert registry.read_tag("net", "latest").version == WRITERS
    moves = told(registry, "latest")
    assert [number for number, _, _ in moves] == list(range(1, len(moves) + 1))
    versions = [version for _, version, _ in moves]
    assert versions == sorted(set(versions)), "an entry led back"
    assert set(versions) == {version for version, moved in published if moved}
    assert seen["registry"] == sorted(seen["registry"])
    assert seen["device"] == sorted(seen["device"])
    assert fsck(registry.store).problems == ()  # the copies that older releases read are in step, too
    print(f"{kind}: {len(moves)} moves of {WRITERS}, {len(seen['device'])} reads by a device in between")


@pytest.mark.parametrize("kind", ["local", "moto", "ceph"])
def test_a_persons_move_back_in_a_race_is_one_entry(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Sixteen who take one move back take back that one move; sixteen jobs of earlier versions change nothing."""
    uri = str(tmp_path / "store") if kind == "local" else request.getfixturevalue(f"{kind}_s3").uri()
    store = open_store(uri)
    for seed in range(3):
        publish_new(store, seed=seed)
    for version in (1, 2, 3):
        Registry(store).tag("net", "stable", version)
    barrier = threading.Barrier(WRITERS)
    newest = Registry(store).tag_log("net", "stable").state().entry
    assert newest is not None

    def work(number: int) -> int:
        registry = Registry(open_store(uri))
        log = registry.tag_log("net", "stable")
        barrier.wait(60)
        if number % 2:
            return 0 if registry.tag_forward("net", "stable", 2) is None else 1
        return log._append(newest, log._entry(2).record(), "undo", before=1) is not None  # all judged by one entry

    with ThreadPoolExecutor(WRITERS) as pool:
        outcomes = list(pool.map(work, range(WRITERS)))
    assert sum(outcomes[::2]) == WRITERS // 2  # identical bytes under one number: one move, and everybody's
    assert told(Registry(store))[3:] == [(4, 2, "undo")]
    assert Registry(store).read_tag("net", "stable").version == 2
    assert fsck(store).problems == ()


def test_an_older_device_reads_the_copy(registry: Registry, tmp_path: Path) -> None:
    """The copy has the very bytes that releases without entries write and read."""
    registry.tag("net", "stable", 4)
    digest = registry.resolve("net", 4).digest
    assert registry.store.get(tag_key("net", "stable")) == b'{"digest":"%s","name":"net","version":4}' % digest.encode()
    device = Device(tmp_path, StoreSource(registry.store), unsigned=True)
    assert device.pull("net", "stable").version == 4
