"""Slips of one word that no other test told from the code: each has a test that fails on it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tuf.api.metadata import TargetFile

from storage import layout
from storage.digest import digest_bytes, digest_pieces
from storage.errors import InvalidManifest, TooLarge
from storage.manifest import MAX_MANIFEST_BYTES
from storage.preprocessing import check_preprocessing
from storage.references import entry_key, parse_entry
from storage.registry import Registry
from storage.signing.keys import SigningError, load_public_key
from storage.signing.rollouts import Rollout, custom_of, rollout_target
from storage.signing.statement import Statement
from storage.stores.memory import MemoryStore
from storage.tags import no_tag
from storage.tensor_file import is_shape
from tests.storage.artifacts import publish_new

ROLLOUT = Rollout(version=2, share=50, seed="s", cohort="kitchen")


def statement(path: str, raw: bytes, custom: dict[str, object]) -> Statement:
    file = TargetFile.from_data(path, raw, ["sha256"])
    file.unrecognized_fields["custom"] = custom
    return Statement(name="net", edition=1, signers={}, ends={}, targets={path: file})


def test_the_length_of_pieces_is_that_of_all() -> None:
    assert digest_pieces([b"ab", b"cde"]) == (f"sha256:{hashlib.sha256(b'abcde').hexdigest()}", 5)


def test_a_shape_has_nine_sizes_at_most() -> None:
    assert is_shape([1] * 9)
    assert not is_shape([1] * 10)


def test_an_image_has_a_pixel_at_least() -> None:
    check_preprocessing({"size": 1, "resize": 1})
    with pytest.raises(ValueError, match="'size' is 0; expected 1 to"):
        check_preprocessing({"size": 0})


def test_the_error_of_a_missing_tag_has_its_key() -> None:
    assert no_tag(MemoryStore("no-tag"), "net", "beta").key == layout.tag_key("net", "beta")


def test_the_error_of_an_entry_under_another_number_has_its_key() -> None:
    store = MemoryStore("entry")
    publish_new(store, seed=1)
    Registry(store).tag("net", "latest", 1)
    raw = store.get(entry_key("net", "latest", 1))
    with pytest.raises(InvalidManifest, match="another number") as caught:
        parse_entry(raw, "net", "latest", 2)
    assert caught.value.key == entry_key("net", "latest", 2)


def test_a_manifest_is_not_read_beyond_its_limit() -> None:
    store = MemoryStore("large")
    publish_new(store, seed=1)
    store.put(layout.manifest_key("net", 1), bytes(MAX_MANIFEST_BYTES + 1), mode="overwrite")
    with pytest.raises(TooLarge):
        Registry(store).resolve("net", 1)


def test_what_is_signed_of_a_rollout_names_its_version_once() -> None:
    assert custom_of(ROLLOUT) == {"version": 2, "rollout": {"share": 50, "seed": "s", "paused": False}}


def test_a_statement_vouches_for_the_length_too() -> None:
    signed = statement(layout.manifest_key("net", 2), b"raw", {})
    assert signed.vouches_for(2, digest_bytes(b"raw"), 3)
    assert not signed.vouches_for(2, digest_bytes(b"raw"), 4)


def test_a_statement_has_its_own_models_rollouts() -> None:
    signed = statement(rollout_target("net", "latest", "kitchen"), b"raw", custom_of(ROLLOUT))
    assert signed.rollouts("latest") == (ROLLOUT,)


def test_a_public_key_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SigningError, match=r"missing\.pub: "):
        load_public_key(tmp_path / "missing.pub")
