"""Staged rollouts: a signed target that gives a share of the devices that follow a tag another version.

    models/<name>/rollouts/<tag>             among the targets of an edition: for every device
    models/<name>/rollouts/<tag>/<cohort>    for the devices of a cohort

Each device has a place from 0 to 9,999, from the rollout's seed and the device's id alone, and takes the version where
its place is below the share. A share only ever grows, so a device that has taken the version keeps it until a person
withdraws the rollout. Devices of releases without rollouts follow the tag.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from storage.document import as_record
from storage.layout import check_tag, manifest_key, model_prefix
from storage.manifest import Record

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile

WHOLE = 10_000
"""The share of all devices: shares are hundredths of a percent, since signed metadata holds no fractions."""


class Rollout(Record):
    """A version on its way to the devices that follow a tag. ``share``: of 10,000; ``paused``: nobody new takes it."""

    version: int = Field(ge=1)
    share: int = Field(ge=0, le=WHOLE)
    seed: str = Field(max_length=128)
    paused: bool = False
    cohort: str | None = None

    def takes(self, device: Member) -> bool:
        """Tell whether a device runs this version."""
        if self.cohort is not None and self.cohort not in device.cohorts:
            return False
        if self.paused and device.holds != self.version:
            return False
        return place(self.seed, device.device_id) < self.share


@dataclass(frozen=True, slots=True)
class Member:
    """A device, as rollouts see it. ``holds``: the version in use; without an id it comes last, at the whole share."""

    device_id: str | None = None
    cohorts: frozenset[str] = frozenset()
    holds: int | None = None


def place(seed: str, device_id: str | None) -> int:
    """Return a device's place from 0 to 9,999: the same wherever and whenever it is asked; the last without an id."""
    if device_id is None:
        return WHOLE - 1
    first = hashlib.sha256(f"{seed}\n{device_id}".encode()).digest()[:8]
    return int.from_bytes(first, "big") * WHOLE >> 64


def rollout_target(name: str, tag: str, cohort: str | None = None) -> str:
    """Return the path of a rollout among the targets. Raises ``BadKey``."""
    path = f"{model_prefix(name)}rollouts/{check_tag(tag)}"
    return path if cohort is None else f"{path}/{check_tag(cohort)}"


def custom_of(rollout: Rollout) -> dict[str, object]:
    """Return what stands in a target's ``custom`` of a rollout; the cohort stands in its path."""
    return {"version": rollout.version, "rollout": rollout.model_dump(exclude={"version", "cohort"})}


def rollouts_of(targets: Mapping[str, TargetFile], name: str, tag: str) -> Iterator[Rollout]:
    """Yield the rollouts of a tag. Raises ``ValueError`` with one line for one that is signed but makes no sense."""
    whole = rollout_target(name, tag)
    for path, file in targets.items():
        if path == whole or path.startswith(f"{whole}/"):
            cohort = None if path == whole else path.removeprefix(f"{whole}/")
            custom = file.custom if isinstance(file.custom, dict) else {}
            said = custom.get("rollout")
            try:
                if not isinstance(said, dict):
                    raise ValueError("it names no rollout")
                yield as_record({"version": custom.get("version"), **said, "cohort": cohort}, Rollout)
            except ValueError as error:
                raise ValueError(f"the signed rollout {path} is none: {error}") from error


def chosen_version(rollouts: Iterator[Rollout], tagged: int, device: Member) -> int:
    """Return the version that a device runs: the latest of the tag's and of those of the rollouts that take it."""
    return max([tagged, *(rollout.version for rollout in rollouts if rollout.takes(device))])


def chosen_target(targets: Mapping[str, TargetFile], name: str, tag: str, tagged: int, device: Member) -> str | None:
    """Return the path of the manifest that a rollout gives a device; None where it follows the tag."""
    version = chosen_version(rollouts_of(targets, name, tag), tagged, device)
    return None if version == tagged else manifest_key(name, version)
