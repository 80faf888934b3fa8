"""One row of a zoo's results: a model, a recipe, what came of them."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field

from jobs.cluster.request import revision
from jobs.events import Stage
from jobs.result import JobResult, LayerQuality, stored_bits_per_weight
from jobs.spec.zoo import ZooJob
from jobs.versions import tool_versions
from storage.manifest import Record

Status = Literal["done", "below gate", "failed"]

_TOOLS = ("nestquant-service", "torch", "timm", "pytorchcv", "ray")
STAGES: tuple[Stage, ...] = get_args(Stage)


class ZooRow(Record):
    """Accuracies in percent with their standard errors, sizes in bytes, times in seconds; None where not measured.

    ``*_activations`` are with quantized activations too. ``layers`` is kept in the ledger and ``rows.jsonl``, and left
    out of the tables.
    """

    model: str
    library: str
    revision: str
    recipe: str
    status: Status
    error: str | None = None
    top1_float: float | None = None
    top1_float_err: float | None = None
    top1_full: float | None = None
    top1_full_err: float | None = None
    top1_part: float | None = None
    top1_part_err: float | None = None
    top1_full_activations: float | None = None
    top1_full_activations_err: float | None = None
    top1_part_activations: float | None = None
    top1_part_activations_err: float | None = None
    images: int | None = None
    weights: int | None = None
    float_bytes: int | None = None
    base_bytes: int | None = None
    high_bytes: int | None = None
    low_bytes: int | None = None
    bits_per_weight: float | None = None
    name: str
    version: int | None = None
    digest: str | None = None
    job: str | None = None
    request: str
    seconds: float
    seconds_by_stage: dict[str, float] = Field(default_factory=dict)
    attempts: int
    tool_versions: dict[str, str]
    layers: tuple[LayerQuality, ...] = ()
    traceback: str | None = None

    def cells(self) -> dict[str, Any]:
        """Return the row as the tables hold it: one plain value a column."""
        row = self.model_dump(exclude={"layers", "traceback", "seconds_by_stage", "tool_versions"})
        row |= {f"seconds_{stage}": self.seconds_by_stage.get(stage) for stage in STAGES}
        row["tool_versions"] = " ".join(f"{tool}={version}" for tool, version in self.tool_versions.items())
        return row


def finished_row(job: ZooJob, request: str, result: JobResult, *, attempts: int, seconds: float) -> ZooRow:
    """Return the row of a job that was published."""
    levels = result.sizes.level_bytes
    return ZooRow.model_validate(
        {
            **_common(job, request, attempts=attempts, seconds=seconds),
            **_accuracies(result),
            "status": "done" if result.gate is None else "below gate",
            "error": result.gate,
            "weights": result.sizes.weights,
            "float_bytes": result.sizes.float_bytes,
            "base_bytes": result.sizes.base_bytes,
            "high_bytes": levels[0],
            "low_bytes": sum(levels[1:]),
            "bits_per_weight": stored_bits_per_weight(result.sizes),
            "version": result.version,
            "digest": result.digest,
            "job": result.job,
            "seconds_by_stage": result.seconds,
            "layers": result.layers,
        }
    )


def failed_row(
    job: ZooJob, request: str, error: BaseException, traceback: str, *, attempts: int, seconds: float
) -> ZooRow:
    """Return the row of a job that failed: what failed in one line, and the traceback for the ledger."""
    line = " ".join(str(error).split()) or type(error).__name__
    common = _common(job, request, attempts=attempts, seconds=seconds)
    return ZooRow.model_validate({**common, "status": "failed", "error": line, "traceback": traceback})


def _common(job: ZooJob, request: str, *, attempts: int, seconds: float) -> dict[str, Any]:
    return {
        "model": job.spec.model.arch,
        "library": job.spec.model.library,
        "revision": _revision(job),
        "recipe": job.recipe,
        "name": job.spec.name,
        "request": request,
        "attempts": attempts,
        "seconds": seconds,
        "tool_versions": tool_versions(_TOOLS),
    }


def _revision(job: ZooJob) -> str:
    """A failed row must come out even where it is the weights' file that is missing."""
    try:
        return revision(job.spec)
    except Exception as error:
        return f"unknown ({type(error).__name__})"


def _accuracies(result: JobResult) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for one in result.measured:
        mode = {"float": "float", "full-bit": "full", "part-bit": "part"}.get(one.mode)
        if mode is not None:
            column = f"top1_{mode}_activations" if one.activations else f"top1_{mode}"
            cells |= {column: one.accuracy.top1, f"{column}_err": one.accuracy.standard_error, "images": one.total}
    return cells
