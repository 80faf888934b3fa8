"""What people see: live progress while a job runs, tables when it is done.

Everything here goes through rich.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from jobs.cli.options import console as new_console
from jobs.cli.tables import Column, WholeTable
from jobs.cli.terminal import title
from jobs.events import Event, Listener
from jobs.result import JobResult
from jobs.spec.quantize import QuantizeSpec
from jobs.stages.job import Job
from jobs.stages.plan import has_own_bits
from storage.manifest import LayerRecord, Manifest, level_name
from storage.wording import size
from workers.measure import Measured

_WORDS = {
    "validate": "check the spec, the store and the images",
    "stage": "bring the weights",
    "plan": "plan layers, shards and tasks",
    "trace": "look for the layers in the engine's graph",
    "sensitivity": "measure each layer alone",
    "calibrate": "calibrate activation ranges",
    "synthesize": "make images without any",
    "equalize": "even out channels",
    "reconstruct": "choose integers and biases, layer after layer",
    "quantize": "quantize, pack and store",
    "export": "make the engine's graph and layout",
    "publish": "publish the manifest",
    "pull": "pull it back as a device",
    "evaluate": "measure what was pulled",
}


@contextmanager
def listener(*, quiet: bool) -> Iterator[Listener]:
    """Yield a listener: live bars on a terminal, one line a stage elsewhere, nothing where ``quiet``.

    All of it on standard error.
    """
    console = new_console(stderr=True)
    if quiet:
        yield lambda _: None
    elif console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),  # as wide as the terminal leaves it: the counts behind it stay whole
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as progress:
            yield _Bars(progress)
    else:
        yield _lines(console)


class _Bars:
    """One bar a stage."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.bars: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        if event.kind == "note":
            self.progress.console.print(f"note: {event.message}")
            return
        if event.stage not in self.bars:
            self.bars[event.stage] = self.progress.add_task(_WORDS[event.stage], total=1)
        bar = self.bars[event.stage]
        if event.kind == "progress":
            self.progress.update(bar, completed=event.done, total=event.total)
        elif event.kind == "finished":
            total = self.progress.tasks[bar].total or 1
            self.progress.update(bar, completed=total)
            self.progress.stop_task(bar)


def _lines(console: Console) -> Listener:
    def listen(event: Event) -> None:
        if event.kind == "finished":
            console.print(f"{_WORDS[event.stage]}: {event.seconds:.1f} s", highlight=False)
        elif event.kind == "note":
            console.print(f"note: {event.message}", highlight=False)

    return listen


def print_result(result: JobResult) -> None:
    """Print what a job found as one table, a column for each mode, and a line for what else is worth knowing."""
    console = new_console()
    state = "published" if result.created else "was published already"
    tags = f", tagged {', '.join(result.tags)}" if result.tags else ", not tagged"
    console.print()
    console.print(title(result.name, f" version {result.version} {state}{tags}"))
    console.print(_summary(result))
    if result.work.reused:
        console.print(f"{result.work.reused} of {result.work.units} units of work were found done by an earlier run")
    if result.kept_float:
        console.print(
            f"{len(result.kept_float)} layers or parameters stay float: "
            f"'nestquant inspect {result.name}@{result.version}' lists them"
        )
    for name, reason in result.skipped_images[:5]:
        console.print(f"skipped image {name}: {reason}")
    if len(result.skipped_images) > 5:
        console.print(f"... and {len(result.skipped_images) - 5} more skipped images")


def _summary(result: JobResult) -> WholeTable:
    """One column for float and each level, full-bit first."""
    levels = list(range(len(result.sizes.level_bytes)))[::-1]
    stages = "  ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.seconds.items())
    modes = ["float", *(level_name(level, len(levels)) for level in levels)]
    table = WholeTable(
        [Column(""), *(Column(mode, figures=True) for mode in modes)],
        title=f"{result.library} {result.arch}, {' over '.join(map(str, result.bits))} bits",
        caption=f"seconds by stage: {stages}",
    )
    for label, activations in (("top-1 %, weights quantized", False), ("top-1 %, activations too", True)):
        if any(one.activations is activations for one in result.measured if one.level is not None):
            of = [None, *levels]
            table.add_row(label, *(_top1(result.measured, level, activations=activations) for level in of))
    sizes, weights = result.sizes, result.sizes.weights
    stored = [sizes.base_bytes + sum(sizes.level_bytes[: level + 1]) for level in levels]
    bits = [8 * sum(sizes.level_bytes[: level + 1]) / weights for level in levels]
    moved = [result.pull.level_bytes[level] for level in levels]
    table.add_row("bytes stored", size(sizes.float_bytes), *map(size, stored))
    table.add_row("bits per weight, with scales", "", *(f"{value:.2f}" for value in bits))
    table.add_row("bytes moved to get there", size(sizes.float_bytes), *map(size, moved))
    if result.measured:
        resident = [
            next((one.resident_bytes for one in result.measured if one.level == level), None) for level in levels
        ]
        table.add_row("bytes in memory, packed", "", *(size(value) if value is not None else "" for value in resident))
    return table


def _top1(measured: Sequence[Measured], level: int | None, *, activations: bool) -> str:
    result = next((one for one in measured if one.level == level and one.activations == activations), None)
    return "" if result is None else f"{result.accuracy.top1:.2f} ± {result.accuracy.standard_error:.2f}"


def print_measured(manifest: Manifest, measured: Sequence[Measured]) -> None:
    """Print accuracy by mode."""
    console = new_console()
    console.print(title(manifest.name, f" version {manifest.version}"))
    console.print(_accuracy_table(measured))


def _accuracy_table(measured: Sequence[Measured]) -> WholeTable:
    figures = (Column(name, figures=True) for name in ("top-1 %", "± s.e.", "right / images", "resident"))
    table = WholeTable([Column("mode"), Column("activations"), *figures])
    for one in measured:
        resident = "" if one.resident_bytes is None else size(one.resident_bytes)
        accuracy = one.accuracy
        table.add_row(
            one.mode,
            "quantized" if one.activations else "float",
            f"{accuracy.top1:.2f}",
            f"{accuracy.standard_error:.2f}",
            f"{one.correct} / {one.total}",
            resident,
        )
    return table


def plan_document(job: Job) -> dict[str, Any]:
    """Return the plan as JSON values."""
    plan, quantize = job.plan, job.spec.quantize
    return {
        "job": job.digest,
        "layers": [layer.model_dump(mode="json") for layer in plan.layers],
        "kept_float": [record.model_dump(mode="json") for record in plan.kept_float],
        "weights": plan.weights,
        "shard_groups": len(plan.groups),
        "base_blobs": len(plan.base),
        "tasks": len(plan.tasks),
        "memory_bytes": {stage: need.memory_bytes for stage, need in job.needs.items()},
        # Where these are several, the job chooses for each layer without bits of its own in quantize.overrides.
        "high_choices": list(quantize.high_choices),
    }


def print_plan(job: Job) -> None:
    """Print the plan: layers in execution order, shards, tasks, memory, and what stays float."""
    plan, quantize, console = job.plan, job.spec.quantize, new_console()
    table = WholeTable(
        [
            Column("layer"),
            Column("kind"),
            Column("shape", figures=True),
            Column("bits", figures=True),
            Column("scheme"),
            Column("shard groups", figures=True),
        ]
    )
    for layer in plan.layers:
        groups = (
            f"{layer.pieces[0].group}-{layer.pieces[-1].group}" if len(layer.pieces) > 1 else str(layer.pieces[0].group)
        )
        table.add_row(
            layer.name,
            layer.kind,
            "x".join(map(str, layer.shape)),
            _bits(layer, quantize),
            layer.scheme,
            groups,
        )
    console.print(table)
    if quantize.mixed is not None:
        console.print("High bits in the plural are for the job to choose, once it has measured each layer alone.")
    for record in plan.kept_float:
        console.print(f"stays float: {record.name} ({record.reason})")
    console.print(
        f"{plan.weights:,} weights in {len(plan.layers)} layers -> "
        f"{len(plan.groups)} shard groups and {len(plan.base)} base blobs in "
        f"{len(plan.tasks)} tasks; job {job.digest}"
    )
    needs = ", ".join(f"{stage} {size(need.memory_bytes)}" for stage, need in job.needs.items())
    console.print(f"memory of a task, at most: {needs}")


def _bits(layer: LayerRecord, quantize: QuantizeSpec) -> str:
    """Return ``8|4``, or ``8|3,4,5`` where the job has yet to choose."""
    if quantize.mixed is None or has_own_bits(layer.name, quantize):
        return "|".join(map(str, layer.bits))
    return "|".join([*map(str, layer.bits[:-1]), ",".join(map(str, quantize.high_choices))])
