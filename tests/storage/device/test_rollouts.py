"""Staged rollouts: who takes a version, and that nobody goes to and fro."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.device import Device
from storage.device.errors import Untrusted
from storage.registry import Registry
from storage.signing.keys import SigningError
from storage.signing.metadata import Signed, amend
from storage.signing.rollouts import WHOLE, Member, Rollout, chosen_version, place, rollout_target
from storage.signing.staging import finish, pause, read_rollouts, roll_out, withdraw
from tests.storage.device.artifacts import publish
from tests.storage.device.signed import Publisher


@pytest.fixture
def fleet(publisher: Publisher) -> Publisher:
    """Versions 1 to 3 of ``net``, the tag ``latest`` at 1."""
    for version in (1, 2, 3):
        publish(publisher.store, version=version, groups=1, fresh=[0], shard_bytes=1000, base_bytes=100)
    publisher.sign(tags={"latest": 1})
    return publisher


def rolled(fleet: Publisher, version: int, percent: float, **options: str) -> Signed:
    keys = [fleet.publisher, fleet.online]
    return roll_out(fleet.store, "net", version, keys, share=round(100 * percent), **options)  # type: ignore[arg-type]


def device(fleet: Publisher, folder: Path, device_id: str | None, *cohorts: str) -> Device:
    made = fleet.device(folder / str(device_id))
    made.device_id, made.cohorts = device_id, frozenset(cohorts)
    return made


def at(percent: float, seed: str) -> str:
    """Return the id of a device whose place is just below a share."""
    return next(f"d{n}" for n in range(200_000) if place(seed, f"d{n}") == round(100 * percent) - 1)


def test_a_rollout_from_its_beginning_to_its_end(fleet: Publisher, tmp_path: Path) -> None:
    keys = [fleet.publisher, fleet.online]
    first, second, third = (device(fleet, tmp_path, at(percent, "s")) for percent in (10, 50, 100))
    nobody = device(fleet, tmp_path, None)

    def versions() -> list[int]:
        return [one.pull("net").version for one in (first, second, third, nobody)]

    assert versions() == [1, 1, 1, 1]
    rolled(fleet, 2, 9.99, seed="s")
    assert versions() == [1, 1, 1, 1]
    rolled(fleet, 2, 10)
    assert versions() == [2, 1, 1, 1]
    assert first.upgrade("net").version == 2
    pause(fleet.store, "net", keys)
    assert versions() == [2, 1, 1, 1]
    rolled(fleet, 2, 50)
    pause(fleet.store, "net", keys)
    assert versions() == [2, 1, 1, 1], "nobody new takes what is paused"
    rolled(fleet, 2, 50)
    assert versions() == [2, 2, 1, 1]
    rolled(fleet, 2, 100)
    assert versions() == [2, 2, 2, 2]
    assert read_rollouts(fleet.store, "net") == [Rollout(version=2, share=WHOLE, seed="s")]
    finish(fleet.store, "net", keys)
    assert read_rollouts(fleet.store, "net") == []
    assert versions() == [2, 2, 2, 2]
    assert Registry(fleet.store).tags("net")["latest"] == 3, "where somebody had left the store's own tag"


def test_a_withdrawn_rollout_leads_back_to_the_tag(fleet: Publisher, tmp_path: Path) -> None:
    rolled(fleet, 2, 100)
    one = device(fleet, tmp_path, "a")
    assert one.pull("net").version == 2
    withdraw(fleet.store, "net", [fleet.publisher, fleet.online])
    assert one.pull("net").version == 1
    assert one.pull("net", "2").version == 2, "the version itself still counts"


def test_a_cohort_goes_first_and_the_latest_version_wins(fleet: Publisher, tmp_path: Path) -> None:
    rolled(fleet, 2, 100)
    rolled(fleet, 3, 100, cohort="kitchen")
    cook, other = device(fleet, tmp_path, "a", "kitchen", "beta"), device(fleet, tmp_path, "b", "beta")
    assert (cook.pull("net").version, other.pull("net").version) == (3, 2)
    withdraw(fleet.store, "net", [fleet.publisher, fleet.online], cohort="kitchen")
    assert (cook.pull("net").version, other.pull("net").version) == (2, 2)


def test_a_tag_that_moves_past_a_rollout_ends_it(fleet: Publisher, tmp_path: Path) -> None:
    rolled(fleet, 2, 100)
    fleet.sign(tags={"latest": 3})
    assert read_rollouts(fleet.store, "net") == []
    one = device(fleet, tmp_path, "a")
    assert one.pull("net").version == 3
    fleet.sign(tags={"latest": 1}, backwards="allow")
    assert one.pull("net").version == 1


def test_a_device_that_takes_the_stores_word_follows_the_plain_tag(fleet: Publisher, tmp_path: Path) -> None:
    rolled(fleet, 2, 100)
    unsigned = device(fleet, tmp_path, "b")
    unsigned.unsigned = True
    assert unsigned.pull("net").version == 3  # which the artifacts moved without a signature


@pytest.mark.parametrize(
    ("version", "percent", "options", "told"),
    [
        (1, 10, {}, "tag 'latest' is signed for version 1; roll out a later one"),
        (3, 60, {}, "version 2 is being rolled out to 50 %; finish or withdraw it first"),
        (2, 40, {}, "version 2 is at 50 % with the seed 's'; with a smaller share or another seed devices would leave"),
        (2, 60, {"seed": "t"}, "with a smaller share or another seed"),
        (2, 60, {"tag": "stable"}, "tag 'stable' is not signed"),
        (2, 0, {}, "a share of 0 %: expected above 0 and up to 100"),
    ],
)
def test_what_would_send_devices_to_and_fro_is_refused(
    fleet: Publisher, version: int, percent: float, options: dict[str, str], told: str
) -> None:
    rolled(fleet, 2, 50, seed="s")
    with pytest.raises(SigningError, match=told):
        rolled(fleet, version, percent, **options)
    assert read_rollouts(fleet.store, "net") == [Rollout(version=2, share=5000, seed="s")]
    for act in (pause, withdraw, finish):
        with pytest.raises(SigningError, match="no rollout of tag 'latest' for the cohort 'none'"):
            act(fleet.store, "net", [fleet.publisher, fleet.online], cohort="none")


def test_a_signed_rollout_that_makes_no_sense_is_one_line(fleet: Publisher, tmp_path: Path) -> None:
    rolled(fleet, 2, 100)

    def spoil(before):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        before[rollout_target("net", "latest")].unrecognized_fields["custom"] = {"version": 2, "rollout": {"share": -1}}
        return before

    amend(fleet.store, "net", [fleet.publisher, fleet.online], spoil)
    with pytest.raises(Untrusted, match=r"net: the signed rollout models/net/rollouts/latest is none: field share"):
        device(fleet, tmp_path, "a").pull("net")


seeds = st.text(max_size=8)
ids = st.text(min_size=1, max_size=12)
shares = st.lists(st.integers(1, WHOLE), min_size=1, max_size=8).map(sorted)


@given(seed=seeds, device_id=ids, steps=shares, pauses=st.lists(st.booleans(), min_size=8, max_size=8), data=st.data())
def test_no_device_flips_as_a_rollout_widens(
    seed: str, device_id: str, steps: list[int], pauses: list[bool], data: st.DataObject
) -> None:
    """Widened and paused in any order, asked at any moment: one change at most, from the tag's version to the new."""
    runs = [1]
    for share, paused in zip(steps, pauses, strict=False):
        rollout = Rollout(version=2, share=share, seed=seed, paused=paused)
        for _ in range(data.draw(st.integers(0, 3))):
            runs.append(chosen_version(iter([rollout]), 1, Member(device_id, holds=runs[-1])))
    assert runs == sorted(runs)
    whole = Rollout(version=2, share=WHOLE, seed=seed)
    assert chosen_version(iter([whole]), 1, Member(device_id, holds=runs[-1])) == 2
    assert chosen_version(iter([whole]), 1, Member(None)) == 2


@given(seed=seeds, device_id=ids, one=shares, other=shares)
def test_two_rollouts_that_widen_lead_forward_alone(
    seed: str, device_id: str, one: list[int], other: list[int]
) -> None:
    runs = [1]
    steps = [(2, share) for share in one] + [(3, share) for share in other]
    at: dict[int, int] = {2: 0, 3: 0}
    for version, share in sorted(steps, key=lambda step: step[1]):
        at[version] = share
        rollouts = (
            Rollout(version=v, share=s, seed=f"{seed}{v}", cohort="k" if v == 3 else None) for v, s in at.items()
        )
        runs.append(chosen_version(rollouts, 1, Member(device_id, frozenset({"k"}), runs[-1])))
    assert runs == sorted(runs)


def test_shares_are_what_they_say() -> None:
    """Of 100,000 devices, 10 % within four standard errors; places follow from SHA-256, so the figure never changes."""
    below = sum(place("seed", f"device-{n}") < 1000 for n in range(100_000))
    assert abs(below - 10_000) < 4 * (100_000 * 0.1 * 0.9) ** 0.5
    first = int.from_bytes(hashlib.sha256(b"seed\ndevice-0").digest()[:8], "big")
    assert place("seed", "device-0") == first * 10_000 // 2**64
