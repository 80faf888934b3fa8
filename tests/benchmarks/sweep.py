"""Every architecture of timm and pytorchcv through a whole job: ``python -m tests.benchmarks.sweep [PATTERN ...]``.

Random weights, recipe ``paper``, 8 over 4, the network's own input size: job, pull, part-bit, full-bit, each held
against the float network on eight images of noise (fewer, where they have more than four million pixels together). The
smallest architecture of every family comes first. A row is one line of ``docs/results/sweep.jsonl``, written as it
ends, so that the next run goes on behind it; ``sweep.md`` beside it is made of all rows. Each architecture runs in a
process of its own, which may take so many seconds and gigabytes.

``--survey`` runs no job: it asks which weights have data (``tests.benchmarks.survey``), in seconds an architecture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.benchmarks import survey
from tests.benchmarks.survey import Survey

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "sweep.jsonl"
SURVEYS = RESULTS.with_name("survey.jsonl")
MOST_WEIGHTS = 30_000_000
IMAGES = 8
MOST_PIXELS = 8 * 1024 * 512


@dataclass(frozen=True)
class Row:
    """What came of one architecture.

    ``share``: quantized weights among all parameters. ``part`` and ``full``: the relative error of the answers, the
    norm of the difference from the float network's over the norm of those. ``failure``: one line, or None.
    """

    library: str
    arch: str
    family: str
    parameters: int
    input: tuple[int, ...] | None = None
    layers: int = 0
    share: float | None = None
    part: float | None = None
    full: float | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    notes: tuple[str, ...] = ()
    failure: str | None = None


def main() -> None:
    """Run what has no row yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", default=["*"], help="library/architecture, with wildcards")
    parser.add_argument("--seconds", type=float, default=180, help="what one architecture may take")
    parser.add_argument("--gigabytes", type=float, default=10, help="memory of one process, at most")
    parser.add_argument("--minutes", type=float, default=60, help="start no further architecture after so long")
    parser.add_argument("--families", action="store_true", help="only the smallest of every family")
    parser.add_argument("--survey", action="store_true", help="only which weights have data, without jobs")
    parser.add_argument("--again", action="store_true", help="run what failed before once more")
    arguments = parser.parse_args()
    kind: type[Row] | type[Survey] = Survey if arguments.survey else Row
    results = SURVEYS if arguments.survey else RESULTS
    rows = {(row.library, row.arch): row for row in _load(results, kind)}
    order = list(_order(arguments.patterns, families_only=arguments.families))
    if arguments.again:
        asked = {one[:2] for one in order}
        rows = {key: row for key, row in rows.items() if row.failure is None or key not in asked}
    begin = time.monotonic()
    for library, arch, family, parameters in order:
        if (library, arch) in rows:
            continue
        if time.monotonic() - begin > 60 * arguments.minutes:
            break
        row = _apart(kind(library, arch, family, parameters), arguments.seconds, arguments.gigabytes)
        rows[library, arch] = row
        _save(results, rows.values())
        print(f"{library}/{arch} ({parameters / 1e6:.1f} M): {_outcome(row)}  {row.seconds:.0f} s", flush=True)
    page = survey.table(rows.values()) if arguments.survey else table(list(rows.values()))  # type: ignore[arg-type]
    results.with_suffix(".md").write_text(page)


def _outcome(row: Row | Survey) -> str:
    if row.failure is not None:
        return row.failure
    if isinstance(row, Survey):
        return f"{100 * row.share:.2f}% without data {row.without or ''}"
    return f"part {row.part:.3f}, full {row.full:.4f}"


def _order(patterns: Sequence[str], *, families_only: bool) -> Iterator[tuple[str, str, str, int]]:
    """Yield library, architecture, family and parameters: the smallest of each family, then the rest by size."""
    known = _catalogue()
    chosen = [one for one in known if any(fnmatchcase(f"{one[0]}/{one[1]}", pattern) for pattern in patterns)]
    chosen.sort(key=lambda one: one[3])
    firsts: dict[tuple[str, str], tuple[str, str, str, int]] = {}
    for one in chosen:
        firsts.setdefault((one[0], one[2]), one)
    yield from firsts.values()
    if not families_only:
        yield from (one for one in chosen if one not in set(firsts.values()))


def _catalogue() -> list[tuple[str, str, str, int]]:
    """Count the parameters of every architecture on the meta device, once; kept beside this machine's other caches."""
    import timm
    from pytorchcv.model_provider import _models
    from timm.models import _registry

    cache = Path(tempfile.gettempdir()) / f"nestquant-sweep-{timm.__version__}.json"
    if cache.exists():
        return [tuple(one) for one in json.loads(cache.read_text())]  # type: ignore[misc]
    entries = [("timm", arch, _registry._model_to_module[arch]) for arch in timm.list_models()]
    entries += [("pytorchcv", arch, builder.__module__.rpartition(".")[2]) for arch, builder in sorted(_models.items())]
    known: list[tuple[str, str, str, int]] = []
    for number, (library, arch, family) in enumerate(entries):
        if (count := _parameters(library, arch)) <= MOST_WEIGHTS:
            known.append((library, arch, family, count))
        if number % 200 == 0:
            print(f"counting parameters: {number} of {len(entries)}", file=sys.stderr, flush=True)
    cache.write_text(json.dumps(known))
    return known


def _parameters(library: str, arch: str) -> int:
    from workers.errors import ModelError
    from workers.inputs import networks

    try:
        outline = networks.build(library, arch, meta=True)
    except ModelError:
        return 0  # run, so that its row says why
    return sum(parameter.numel() for parameter in outline.parameters())


def _apart(row: Row | Survey, seconds: float, gigabytes: float) -> Row | Survey:
    """Run one architecture in a process of its own: forked, with everything imported."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(row, there, int(gigabytes * 1e9)))
    begin = time.monotonic()
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(seconds) else {"failure": f"took more than {seconds:.0f} s"}
    except EOFError:
        found = {"failure": "its process died"}
    process.kill()
    process.join()
    return type(row)(**{**asdict(row), **found, "seconds": round(time.monotonic() - begin, 1)})


def _child(row: Row | Survey, answer: Connection, most_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
    try:
        found: dict[str, Any]
        if isinstance(row, Survey):
            found = survey.survey(row.library, row.arch)
        else:
            with tempfile.TemporaryDirectory(prefix="nestquant-sweeps-") as folder:
                found = _run(row, Path(folder))
    except BaseException as error:
        found = {"failure": _why(error)}
    status = Path("/proc/self/status").read_text()
    answer.send({**found, "peak_bytes": 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])})
    answer.close()


def _run(row: Row, folder: Path) -> dict[str, Any]:
    import torch

    from jobs.driver import run_job
    from jobs.spec.file import parse_spec
    from storage.device import Device, StoreSource
    from storage.stores.uri import open_store
    from workers import runtime
    from workers.errors import WorkError
    from workers.executor import InProcessExecutor
    from workers.forward import input_fault, run_network
    from workers.inputs import networks
    from workers.inputs.checkpoint import random_state

    torch.set_num_threads(1)
    document = {
        "name": re.sub(r"[^a-z0-9._-]+", "-", row.arch.lower()).strip("._-"),
        "model": {"library": row.library, "arch": row.arch, "random_seed": 0},
        "quantize": {"recipe": "paper"},
        "store": {"uri": str(folder / "store")},
    }
    result = run_job(parse_spec(document, where=row.arch), InProcessExecutor())
    device = Device(folder / "device", StoreSource(open_store(folder / "store")), unsigned=True)
    device.pull(result.name)
    device.upgrade(result.name)
    manifest = device.manifest(result.name)
    float_network = networks.build(row.library, row.arch)
    float_network.load_state_dict(random_state(row.library, row.arch, {}, 0))
    preprocessing = networks.default_preprocessing(row.library, float_network)
    size = preprocessing.size if isinstance(preprocessing.size, tuple) else (preprocessing.size,) * 2
    shape = (len(preprocessing.mean), *size)
    count = max(1, min(IMAGES, MOST_PIXELS // (size[0] * size[1])))
    inputs = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {
        "input": shape,
        "layers": len(manifest.layers),
        "share": manifest.sizes.weights / max(1, manifest.model.parameters),
        "notes": result.notes,
    }
    if fault := input_fault(float_network):
        return {**found, "failure": f"published by its weights alone; not run, as {fault}"}
    with torch.inference_mode():
        try:
            expected = run_network(float_network.eval(), inputs, f"{row.library} {row.arch}")
        except WorkError as error:  # published all the same: a job without images never runs its network
            return {**found, "failure": f"published, but {_why(error)}"}
        model = runtime.load(manifest, device.blob_path)
        for level, mode in ((0, "part"), (1, "full")):
            model.to_level(level)
            found[mode] = _error(model.network(inputs), expected)
    return found


def _why(error: BaseException) -> str:
    """Return why an architecture has no figures: errors of ours as they are, others in one line with their kind."""
    from jobs.errors import JobError
    from workers.errors import WorkError, one_line

    return (str(error) if isinstance(error, JobError | WorkError) else one_line(error))[:300]


def _error(answers: Any, expected: Any) -> float:
    import torch

    if not isinstance(answers, torch.Tensor):
        ours, theirs = list(_tensors(answers)), list(_tensors(expected))
        if [one.shape for one in ours] != [one.shape for one in theirs]:
            raise ArithmeticError(
                "it ran in both modes; the shapes of its answers follow from the values, not compared"
            )
        answers, expected = (torch.cat([one.reshape(-1) for one in value]) for value in (ours, theirs))
    for name, values in (("the network", answers), ("the float network", expected)):
        if not torch.isfinite(values).all():
            raise ArithmeticError(f"{name} answers NaN or infinity")
    return float((answers - expected).norm() / expected.norm().clamp_min(1e-12))


def _tensors(value: Any) -> Iterator[Any]:
    from torch.utils._pytree import tree_leaves

    yield from (leaf for leaf in tree_leaves(value) if hasattr(leaf, "flatten"))


def _load(results: Path, kind: type[Any]) -> list[Any]:
    if not results.exists():
        return []
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return [
        kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}) for row in rows
    ]


def _save(results: Path, rows: Iterable[Row | Survey]) -> None:
    ordered = sorted(rows, key=lambda row: (row.library, row.arch))
    temporary = results.with_suffix(".new")
    temporary.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in ordered))
    temporary.replace(results)


def table(rows: list[Row]) -> str:
    """Return the page: counts, failures by reason, then a row for each architecture that ran."""
    ordered = sorted(rows, key=lambda row: (row.library, row.family, row.parameters))
    failed = [row for row in ordered if row.failure is not None]
    families = {(row.library, row.family) for row in rows}
    head = [
        "architecture",
        "family",
        "parameters, M",
        "input",
        "layers",
        "quantized",
        "error part-bit",
        "full-bit",
        "s",
    ]
    head += ["GB", "notes"]
    lines = [
        "# A sweep over timm and pytorchcv",
        "",
        "Random weights, recipe `paper`, 8 over 4, through job, pull and both modes (`make sweep`).",
        "*error*: norm of the difference of the answers from the float network's over the norm of those, eight images",
        "of noise: random weights tell whether a network comes through whole, not how accurate it stays.",
        "",
        f"{len(rows)} architectures of {len(families)} families up to {MOST_WEIGHTS // 10**6} M parameters: "
        f"{len(rows) - len(failed)} ran, {len(failed)} did not.",
        "",
        "| did not run | parameters, M | why |",
        "| --- | ---: | --- |",
        *(f"| {row.library}/{row.arch} | {row.parameters / 1e6:.2f} | {_cell(row.failure or '')} |" for row in failed),
        "",
        f"| {' | '.join(head)} |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        *(_line(row) for row in ordered if row.failure is None),
    ]
    return "\n".join([*lines, ""])


def _line(row: Row) -> str:
    cells = [
        f"{row.library}/{row.arch}",
        row.family,
        f"{row.parameters / 1e6:.2f}",
        "x".join(map(str, row.input or ())),
    ]
    cells += [str(row.layers), f"{100 * (row.share or 0):.1f}%", f"{row.part:.3f}", f"{row.full:.4f}"]
    cells += [f"{row.seconds:.0f}", f"{row.peak_bytes / 1e9:.1f}", _cell("; ".join(row.notes))]
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:160]


if __name__ == "__main__":
    main()
