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


PLAIN = {"size": 224, "resize": 256, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": 60_000}, "'size' is 60000; expected 1 to 8192 pixels"),
        ({"size": 0}, "'size' is 0;"),
        ({"size": True}, "'size' is True;"),
        ({"size": [224, 10**9]}, "'size' is [224, 1000000000];"),
        ({"size": None}, "'size' is None;"),
        ({"resize": -1}, "'resize' is -1;"),
        ({"mean": [0.5] * 2000, "std": [0.5] * 2000}, "'mean' is [0.5, "),
        ({"std": [0.2, 0.2, 0]}, "'std' above 0"),
        ({"std": [0.2]}, "as long as each other"),
        ({"mean": ["x", 0, 0]}, "'mean' is ['x', 0, 0];"),
        ({"interpolation": "sinc"}, "'interpolation' is 'sinc'; expected nearest, bilinear, bicubic, lanczos"),
        ({"crop": 1}, "unknown key 'crop'; known are interpolation, mean, resize, size, std"),
    ],
)
def test_preprocessing_that_no_network_has_is_refused(changes: dict[str, object], told: str) -> None:
    draft = make_draft(Registry(MemoryStore("preprocessing")), groups=1).model_dump(mode="json")
    draft |= {"version": 1, "preprocessing": PLAIN}
    assert parse_manifest(canonical_json(draft), name="net", version=1).preprocessing == PLAIN
    draft["preprocessing"] = {**PLAIN, **changes}
    with pytest.raises(InvalidManifest) as caught:
        parse_manifest(canonical_json(draft), name="net", version=1)
    assert str(caught.value).startswith("manifest of net version 1: field preprocessing: Value error, ")
    assert told in str(caught.value)
