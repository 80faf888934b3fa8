"""A manifest of a stranger's making costs no more than its size."""

from __future__ import annotations

import pytest

from storage.errors import InvalidManifest
from storage.manifest import canonical_json, first_repeated, parse_manifest
from storage.registry import Registry
from storage.stores.memory import MemoryStore
from tests.storage.artifacts import make_draft


def document(layers: int, *, twice: bool) -> bytes:
    draft = make_draft(Registry(MemoryStore("large")), groups=1).model_dump(mode="json")
    layer, group = draft["layers"][0], draft["groups"][0]
    names = [f"layer{number}" for number in range(layers)]
    if twice:
        names[-1] = names[0]
    draft["layers"] = [{**layer, "name": name, "parameter": f"{name}.weight"} for name in names]
    for shard in group["levels"]:
        shard["decoded_bytes"] *= layers
    draft["version"] = 1
    return canonical_json(draft)


def test_a_name_that_stands_twice_among_60000_is_found() -> None:
    with pytest.raises(InvalidManifest, match="layer 'layer0' stands twice"):
        parse_manifest(document(60_000, twice=True), name="net", version=1)


class Counted(str):
    """A name that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return super().__eq__(other)

    __hash__ = str.__hash__


def test_names_are_compared_as_often_as_there_are_names() -> None:
    names = [Counted(f"layer{number}") for number in range(60_000)]
    Counted.compared = 0
    assert first_repeated([*names, Counted("layer59999")]) == "layer59999"
    assert Counted.compared < 60_000  # the pair, and what hashes alike in a slot; all pairs would be 1.8 billion


def test_as_many_layers_with_names_of_their_own_are_read() -> None:
    assert len(parse_manifest(document(20_000, twice=False), name="net", version=1).layers) == 20_000


def test_the_first_repeated_name() -> None:
    assert first_repeated([]) is None
    assert first_repeated(["a", "b", "c"]) is None
    assert first_repeated(iter(["a", "b", "a", "b"])) == "a"
    assert first_repeated(["a", "b", "b", "a"]) == "b"
