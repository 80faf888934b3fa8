"""``nestquant tag`` as a person types it, on a store that nobody signs and on one whose devices trust."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from storage.device import Device, StoreSource
from storage.registry import Registry
from storage.stores.local import LocalStore
from tests.jobs.conftest import InitSigning, Run
from tests.storage.device.artifacts import publish


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Three versions of ``net``; ``latest`` names the third, moved as an older release moves it."""
    store = LocalStore(tmp_path / "store")
    for version in (1, 2, 3):
        publish(store, version=version, groups=1, fresh=[0])
    return store


def test_a_tag_from_the_first_move_to_the_undo(nestquant: Run, store: LocalStore) -> None:
    place = ("--store", store.root)
    assert nestquant("tag", "net@2", "stable", *place) == (
        0,
        "net: tag 'stable' names version 2 by its entry 1, unsigned.\n",
        "",
    )
    assert nestquant("tag", "net@latest", "stable", *place)[0] == 0
    code, out, err = nestquant("tag", "net@1", "stable", *place)
    assert (code, out) == (2, "")
    assert err.startswith(
        "nestquant: net: tag 'stable' names version 3; at version 1 devices would go back: say --back"
    )
    assert nestquant("tag", "net@1", "stable", "--back", *place)[0] == 0
    code, out, _ = nestquant("tag", "net", "stable", "--undo", "--json", *place)
    undone = json.loads(out)
    assert (code, undone["number"], undone["version"], undone["move"], undone["edition"]) == (0, 4, 3, "undo", None)
    code, out, _ = nestquant("tag", "net", "stable", "--history", *place)
    assert [(line.split()[0], line.split()[-2], line.split()[-1]) for line in out.splitlines()] == [
        ("1", "2", "forward"),
        ("2", "3", "forward"),
        ("3", "1", "back"),
        ("4", "3", "undo"),
    ]
    code, out, _ = nestquant("tag", "net", "stable", "--history", "--json", *place)
    assert [row["version"] for row in json.loads(out)] == [2, 3, 1, 3]
    assert Registry(store).tags("net") == {"latest": 3, "stable": 3}
    assert nestquant("tag", "net", "latest", "--history", *place)[1].startswith("No entries")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("net", "stable"), "which version? Write net@VERSION"),
        (("net@2", "stable", "--undo"), "--undo and --history stand alone"),
        (("net", "stable", "--undo", "--history"), "--undo and --history stand alone"),
        (("net@9", "stable"), "model 'net': no version 9 in"),
        (("net@2", "12"), "tag '12': expected 1 to 128 of a-z"),
        (("net", "stable", "--undo"), "no tag 'stable'"),
    ],
)
def test_mistakes_are_one_line(nestquant: Run, store: LocalStore, words: tuple[str, ...], told: str) -> None:
    code, out, err = nestquant("tag", *words, "--store", store.root)
    assert code in {1, 2}
    assert (out, len(err.splitlines())) == ("", 1)
    assert told in err


def test_a_move_of_a_signed_model_is_signed(
    nestquant: Run, signing: InitSigning, store: LocalStore, tmp_path: Path
) -> None:
    place, signer = ("--store", store.root), signing(store.root)
    keys = signer.options
    assert nestquant("tag", "net@2", "stable", *place, *keys)[1].endswith("by its entry 1, signed in edition 1.\n")
    device = Device(tmp_path / "cache", StoreSource(store), root_of_trust=signer.trust.read_bytes())
    assert device.pull("net", "stable").version == 2

    code, _, err = nestquant("tag", "net@3", "stable", *place)
    assert code == 2
    assert "net is signed, and devices follow the signed tag: give --key" in err
    assert Registry(store).tags("net")["stable"] == 2
    assert nestquant("tag", "net@3", "stable", "--no-sign", *place)[1].endswith("entry 2, the signed tag stays.\n")
    assert device.pull("net", "stable").version == 2
    assert nestquant("tag", "net@3", "stable", *place, *keys)[1].endswith("by its entry 2, signed in edition 2.\n")
    assert device.pull("net", "stable").version == 3
    assert nestquant("tag", "net", "stable", "--undo", *place, *keys)[1].endswith("entry 3, signed in edition 3.\n")
    assert device.pull("net", "stable").version == 2
