"""The doctor's findings on each store, as a table that must come out exactly so."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from storage.errors import NotFound, StoreUnavailable
from storage.stores import capabilities
from storage.stores.blob_store import BlobStore, ObjectInfo
from storage.stores.doctor import diagnose
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore
from storage.stores.uri import open_store
from tests.servers.s3_server import S3Server
from tests.storage.wrappers import WatchedStore

ALL = ["reachable", "read after write", "clock", "range reads", "list after write", "create-only", "compare-and-swap"]
S3_ONLY = ["checksums", "multipart"]


@pytest.mark.parametrize(
    ("kind", "names", "short"),
    [
        ("memory", ALL, {}),
        ("local", ALL, {}),
        ("moto", ALL + S3_ONLY, {"checksums": "warn"}),
        ("ceph", ALL + S3_ONLY, {"compare-and-swap": "warn"}),
        ("rclone", ALL + S3_ONLY, {"create-only": "fail", "compare-and-swap": "warn"}),
    ],
)
def test_findings(
    kind: str, names: list[str], short: dict[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    here: dict[str, BlobStore] = {"memory": MemoryStore("doctor"), "local": LocalStore(tmp_path)}
    store = here.get(kind) or open_store(request.getfixturevalue(f"{kind}_s3").uri())
    checks = diagnose(store)
    assert [check.name for check in checks] == names
    assert {check.name: check.status for check in checks if check.status != "ok"} == short
    assert all(check.detail and "\n" not in check.detail for check in checks)
    listed = [info.key for info in store.list()]
    # rclone lists names from its directory cache for minutes: of an object that was overwritten by several at once and
    # deleted, the name may stay, with no file and no bytes behind it.
    left = [key for key in listed if is_there(store, key)] if kind == "rclone" else listed
    assert left == []


def is_there(store: BlobStore, key: str) -> bool:
    try:
        store.get(key)
    except NotFound:
        return False
    return True


def test_missing_bucket(moto_s3: S3Server) -> None:
    (check,) = diagnose(open_store(moto_s3.uri().replace(moto_s3.bucket, "no-such-bucket")))
    assert (check.name, check.status) == ("reachable", "fail")
    assert "NoSuchBucket: no such bucket; create it or correct the URI" in check.detail


@pytest.mark.parametrize(
    ("skew_s", "status"), [(30, "ok"), (-30, "ok"), (120, "warn"), (1200, "fail"), (-1200, "fail")]
)
def test_clock_that_differs(skew_s: int, status: str) -> None:
    class Skewed(WatchedStore):
        def head(self, key: str) -> ObjectInfo:
            found = super().head(key)
            return replace(found, modified_s=found.modified_s + skew_s)

    found = {check.name: check for check in diagnose(Skewed(MemoryStore("clock")))}
    seen_s = int(found["clock"].detail.split()[2])
    assert found["clock"].status == status
    assert abs(seen_s - abs(skew_s)) <= 1


def test_the_race_is_run_once_a_process() -> None:
    store = WatchedStore(MemoryStore("once"))
    assert capabilities.has_create_only(store)
    asked = len(store.steps)
    assert asked == 2 * (8 + 3)
    assert capabilities.has_create_only(store)
    assert len(store.steps) == asked


def test_a_race_that_cannot_be_run_is_an_error_and_not_remembered() -> None:
    class Down(WatchedStore):
        down = True

        def before(self, index, step):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            if self.down:
                raise StoreUnavailable("down")

    store = Down(MemoryStore("down"))
    with pytest.raises(StoreUnavailable):
        capabilities.has_create_only(store)
    store.down = False
    assert capabilities.has_create_only(store)


def test_a_store_that_lets_two_win_is_found_out() -> None:
    """Checks the condition and then writes without holding on to it: what several servers did."""

    class Racy(WatchedStore):
        def put(self, key, data, *, mode):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            if mode == "create" and self.inner.exists(key):
                return self.inner.put(key, data, mode="create")
            time.sleep(0.05)
            return self.inner.put(key, data, mode="overwrite")

    race = capabilities.race_create(Racy(MemoryStore("racy")))
    assert not race.holds
    assert race.detail == "8 of 8 writers won"
