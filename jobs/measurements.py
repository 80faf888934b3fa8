"""What a job measured of a version, as its report in the store tells it: read leniently, without torch.

A report is no part of what is signed, and one of an older or a later release still counts for what is known of it here.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from storage.document import parse_json
from storage.errors import NotFound, StorageError
from storage.layout import JOB_REPORT
from storage.registry import Registry

_Count = Annotated[int, Field(ge=0, le=1 << 60)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class InvalidReport(StorageError):
    """The report beside a version is not one; the message names the field."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Mode(_Part):
    """Right answers of one mode. ``level`` None is the float network; ``seconds`` count the images alone."""

    mode: str
    level: int | None
    activations: bool
    correct: _Count
    total: Annotated[int, Field(ge=1, le=1 << 60)]
    resident_bytes: _Count | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _within(self) -> Self:
        if self.correct > self.total:
            raise ValueError(f"{self.correct} right answers of {self.total} images")
        return self

    @property
    def top1(self) -> float:
        """Top-1 in percent."""
        return 100 * self.correct / self.total

    @property
    def error(self) -> float:
        """One standard error of ``top1`` in points: that of a share of independent images."""
        share = self.correct / self.total
        return 100 * math.sqrt(share * (1 - share) / self.total)


class Damage(_Part):
    """What the network lost when one layer alone ran part-bit (`jobs.result.LayerDamage`)."""

    images: _Count
    noise: bool
    divergence: _Finite
    same: _Finite
    drop: _Finite | None = None


class LayerMeasured(_Part):
    """Signal to noise of a layer's weights in dB, part-bit first; None where nothing was lost."""

    name: str
    bits: tuple[int, ...] = ()
    weights: _Count = 0
    sqnr_db: Annotated[tuple[_Finite | None, ...], Field(min_length=1)]
    damage: Damage | None = None


class Measurements(_Part):
    """The parts of a job's report that are shown."""

    measured: tuple[Mode, ...] = ()
    layers: tuple[LayerMeasured, ...] = ()
    notes: tuple[str, ...] = ()
    gate: str | None = None
    seconds: dict[str, float] = Field(default_factory=dict)

    @field_validator("seconds")
    @classmethod
    def _finite(cls, seconds: dict[str, float]) -> dict[str, float]:
        return {stage: value for stage, value in seconds.items() if math.isfinite(value)}

    def mode(self, level: int | None, *, activations: bool) -> Mode | None:
        """Return what was measured of a level, with or without quantized activations."""
        fitting = (one for one in self.measured if one.level == level and one.activations is activations)
        return next(fitting, None)


def read_measurements(registry: Registry, name: str, version: int) -> Measurements | None:
    """Return what the job of a version measured; None where it left no report.

    Raises:
        InvalidReport: there is a report, and it is none.
        storage.StorageError: the store refuses.
    """
    try:
        raw = registry.get_report(name, version, JOB_REPORT)
    except NotFound:
        return None
    where = f"the job's report of {name} version {version}"
    try:
        document: Any = parse_json(raw)
        return Measurements.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "document"
        raise InvalidReport(f"{where}: field {field}: {first['msg']} ({error.error_count()} errors in all)") from error
    except ValueError as error:
        raise InvalidReport(f"{where}: {error}") from error
