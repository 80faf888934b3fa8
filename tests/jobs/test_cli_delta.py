"""``nestquant delta`` as a person types it, and the device that updates by what it published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from storage.registry import Registry
from storage.stores.local import LocalStore
from tests.jobs.conftest import Run
from tests.storage.device.updates import publish


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    for step in (0, 1):
        publish(store, step)
    return store


def test_from_two_versions_to_a_device_that_updates(nestquant: Run, store: LocalStore, tmp_path: Path) -> None:
    place, cache = ("--store", store.root), ("--cache", tmp_path / "cache")
    assert nestquant("pull", "net@1", "--allow-unsigned", *place, *cache)[0] == 0
    code, out, err = nestquant("delta", "net", "--from", 1, "--to", 2, "--tag", "latest", *place)
    assert (code, err) == (0, "")
    third = Registry(store).resolve("net").manifest
    assert third.version == 3
    assert out.splitlines()[-1].startswith("net version 3: version 2 with 5 deltas, ")
    assert [line.split()[1] for line in out.splitlines() if "kB" in line and "version" not in line] != []
    code, out, _ = nestquant("pull", "net", "--allow-unsigned", "--explain", *place, *cache)
    assert code == 0
    assert [" 1 delta from sha256:" in line for line in out.splitlines()] == [True, True, True, False]
    assert "3 by delta, which spared " in out
    code, out, _ = nestquant("delta", "net", "--from", 1, "--to", 2, "--json", *place)
    document = json.loads(out)
    assert (code, document["version"], document["deltas"]) == (0, 3, 5)  # the newest version is this one already
    assert [(row["source"], row["level"]) for row in document["levels"]] == [(1, None), (1, 0), (1, 1)]
    moved = [delta.descriptor.size_bytes for delta in third.deltas]
    assert sum(row["update_bytes"] for row in document["levels"]) == sum(moved)
    whole = sum(blob.size_bytes for blob in third.descriptors())
    assert sum(row["whole_bytes"] for row in document["levels"]) == whole > 10 * sum(moved)


def test_nothing_is_published_where_no_delta_is_worth_it(nestquant: Run, store: LocalStore) -> None:
    code, out, _ = nestquant("delta", "net", "--from", 2, "--to", 2, "--store", store.root)
    assert code == 0
    assert out.splitlines()[-1] == ("net version 2: no delta is a fifth shorter than what it makes; nothing published.")
    assert Registry(store).newest_version("net") == 2
    code, _, err = nestquant("delta", "net", "--from", 9, "--store", store.root)
    assert (code, err.partition(";")[0]) == (1, f"nestquant: model 'net': no version 9 in {store.uri}")
