"""State files and signed metadata that lie: one line and nothing worse, and what is damaged can be removed."""

from __future__ import annotations

import copy
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.signing.metadata import SIGNED_AT_FIELD
from tests.fuzz import states
from tests.fuzz.test_hostile import EDITS, JSON, lie, mutate
from tests.fuzz.trusted import ROLES, bench, read_metadata, read_state, read_trusted

STATES = states.states()
KEPT = list(bench().kept)
fuzz = settings(max_examples=150, deadline=5000, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", STATES)
def test_states(name: str) -> None:
    hostile = STATES[name]
    said = [line for line in read_state(hostile.data) if line]
    assert re.search(hostile.message, said[0])


def test_the_bench_starts_from_what_is_accepted() -> None:
    said = read_state(json.dumps(states.good_state()).encode())
    assert ["missing" in line or "earlier" in line or not line for line in said] == [True] * 6
    for role in ROLES[:3]:
        document = bench().documents[role]
        assert read_metadata(role, document) == ""
        assert read_metadata(role, json.dumps(json.loads(document)["signed"]).encode(), sign_it=True) == ""
    for name in KEPT:
        assert read_trusted(name, bench().kept[name]) == ""


@fuzz
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()), EDITS)
def test_any_bytes_as_a_state(data: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    read_state(data)
    read_state(mutate(json.dumps(states.good_state()).encode(), edits))


@fuzz
@given(st.data())
def test_a_state_that_lies(data: st.DataObject) -> None:
    document = copy.deepcopy(states.good_state(previous=states.good_state()["current"]))
    for _ in range(data.draw(st.integers(1, 3))):
        lie(document, data.draw)
    read_state(json.dumps(document).encode("utf-8", "surrogatepass"))


@fuzz
@given(st.sampled_from(ROLES), st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()), EDITS)
def test_any_bytes_as_metadata(role: str, data: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    assert read_metadata(role, data) != ""
    read_metadata(role, mutate(bench().documents[role], edits))


@fuzz
@given(st.sampled_from(ROLES), st.data())
def test_signed_metadata_that_lies(role: str, data: st.DataObject) -> None:
    """With a signature that holds: a signer's mistake, or a stolen key."""
    document = json.loads(bench().documents[role])["signed"]
    for _ in range(data.draw(st.integers(1, 3))):
        lie(document, data.draw)
    read_metadata(role, json.dumps(document).encode("utf-8", "surrogatepass"), sign_it=True)


@pytest.mark.parametrize("value", ["soon", None, True, [], {}, -1, 1e300, 10**400])
def test_a_time_of_signing_that_is_none(value: object) -> None:
    document = json.loads(bench().documents["timestamp"])["signed"] | {SIGNED_AT_FIELD: value}
    said = read_metadata("timestamp", json.dumps(document).encode(), sign_it=True)
    assert said == "" if value == -1 else said


@fuzz
@given(st.sampled_from(KEPT), st.binary(max_size=200), EDITS)
def test_any_bytes_where_something_was_trusted(name: str, data: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    read_trusted(name, data)
    read_trusted(name, mutate(bench().kept[name], edits))
