"""What the catalogue says, apart from how it looks. Bytes are counts, top-1 and errors percent, times seconds.

Words of strangers (architecture, recipe, notes) are kept as they came, cut to a length that a page can show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from jobs.measurements import Damage, Mode
from storage.signing.rollouts import Rollout

SignatureState = Literal["signed", "unsigned", "broken"]


@dataclass(frozen=True, slots=True)
class Level:
    """One level. ``fetch_bytes``: what a device fetches to run it from nothing; ``step_bytes``: what it adds to the
    level below. ``plain`` and ``quantized``: measured with float and with quantized activations.
    """

    index: int
    name: str
    bits: str
    fetch_bytes: int
    step_bytes: int
    plain: Mode | None = None
    quantized: Mode | None = None

    @property
    def best(self) -> Mode | None:
        """What a device reaches: with quantized activations, where the version has ranges and they were measured."""
        return self.quantized or self.plain


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantized layer. ``sqnr_db[k]`` of level k, None where nothing was lost; empty where it was not measured."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    bits: tuple[int, ...]
    sqnr_db: tuple[float | None, ...]
    damage: Damage | None


@dataclass(frozen=True, slots=True)
class Run:
    """How fast an engine ran a mode, and in how much memory; None where it was not measured."""

    engine: str
    mode: str
    activations: bool
    seconds_per_image: float | None
    resident_bytes: int | None
    images: int


@dataclass(frozen=True, slots=True)
class Update:
    """What a device moves from an earlier version to this one, by level: shards that both share stay where they are."""

    version: int
    level_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """What is signed of a version. ``signers`` and ``ends`` by role; ``problem``: why a signature does not count."""

    state: SignatureState
    edition: int | None = None
    signers: tuple[tuple[str, tuple[str, ...]], ...] = ()
    ends: tuple[tuple[str, datetime], ...] = ()
    problem: str | None = None

    @property
    def end(self) -> datetime | None:
        """When the first of its roles ends."""
        return min((end for _, end in self.ends), default=None)


@dataclass(frozen=True, slots=True)
class Version:
    """One version that can be read."""

    name: str
    version: int
    digest: str
    manifest_bytes: int
    tags: tuple[str, ...]
    library: str
    arch: str
    parameters: int
    weights: int
    float_bytes: int
    float_top1: Mode | None
    levels: tuple[Level, ...]
    layers: tuple[Layer, ...]
    kept_float: tuple[tuple[str, str], ...]
    runs: tuple[Run, ...]
    update: Update | None
    signature: Signature
    provenance: tuple[tuple[str, str], ...]
    engines: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether any level's accuracy was measured."""
        return any(level.best for level in self.levels)

    @property
    def part(self) -> Level:
        """The level that a device fetches first."""
        return self.levels[0]

    @property
    def full(self) -> Level:
        """The highest level."""
        return self.levels[-1]

    @property
    def nesting(self) -> str:
        """The bits from full to part: ``8 over 4``."""
        return " over ".join(level.bits for level in reversed(self.levels))


@dataclass(frozen=True, slots=True)
class Broken:
    """A version that cannot be read, and why."""

    version: int
    problem: str


@dataclass(frozen=True, slots=True)
class VersionRow:
    """A version as its model's page and the index show it."""

    version: int
    tags: tuple[str, ...]
    library: str
    arch: str
    parameters: int
    nesting: str
    float_bytes: int
    part_bytes: int
    full_bytes: int
    step_bytes: int
    update: Update | None
    float_top1: Mode | None
    part_top1: Mode | None
    full_top1: Mode | None
    signature: SignatureState
    signature_end: datetime | None

    @classmethod
    def of(cls, version: Version) -> VersionRow:
        """Return the row of a version."""
        return cls(
            version=version.version,
            tags=version.tags,
            library=version.library,
            arch=version.arch,
            parameters=version.parameters,
            nesting=version.nesting,
            float_bytes=version.float_bytes,
            part_bytes=version.part.fetch_bytes,
            full_bytes=version.full.fetch_bytes,
            step_bytes=version.full.fetch_bytes - version.part.fetch_bytes,
            update=version.update,
            float_top1=version.float_top1,
            part_top1=version.part.best,
            full_top1=version.full.best,
            signature=version.signature.state,
            signature_end=version.signature.end,
        )


@dataclass(slots=True)
class Model:
    """A model's name: rows of its versions, newest first, and what cannot be read of it."""

    name: str
    rows: list[VersionRow] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    deleted: int = 0
    tags: dict[str, int] = field(default_factory=dict)
    rollouts: list[tuple[str, Rollout]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def front(self) -> VersionRow | None:
        """The version that the index shows: the one that ``latest`` names, else the newest that can be read."""
        latest = self.tags.get("latest")
        return next((row for row in self.rows if row.version == latest), self.rows[0] if self.rows else None)

    @property
    def faults(self) -> Sequence[str]:
        """Everything that is wrong with it, one line each."""
        return [*self.problems, *(f"version {one.version}: {one.problem}" for one in self.broken)]
