"""Commands that do the work: quantize and evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cli.options import DEFAULT_CACHE, Code, Factory, Json, Model, print_json, split_ref, trust_factory
from jobs.errors import GateError, SpecError

if TYPE_CHECKING:
    from jobs.spec.job import JobSpec

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The job's spec, YAML or JSON.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the spec, as in quantize.bits=[8,5]."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: nestquant quantize resnet18.yaml --store s3://models --set quantize.bits=[8,5]")(
        quantize
    )
    app.command(epilog="Example: nestquant evaluate resnet18@3 --store ./store --data val.tar --limit 500")(evaluate)


def quantize(
    spec: SpecPath,
    *,
    store: Annotated[str | None, typer.Option("--store", envvar="NESTQUANT_STORE", help="Overrides store.uri.")] = None,
    change: Changes = None,
    mean_bits: Annotated[
        float | None, typer.Option(help="Choose high bits layer by layer, at most so many on average.")
    ] = None,
    target_bytes: Annotated[
        int | None, typer.Option(help="Choose high bits layer by layer, level-0 shards of at most so many bytes.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Choose high bits layer by layer, fewest bytes at so many points of top-1 below float."),
    ] = None,
    local: Annotated[
        bool,
        typer.Option("--local", help="Work in this process, without Ray; the artifact is the same, byte for byte."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; publish nothing.")
    ] = False,
    single_writer: Annotated[
        bool, typer.Option("--single-writer", help="Nobody else publishes to this store, which has no put-if-absent.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model, publish it, pull it back and measure it."""
    from jobs.cli import console
    from jobs.executors import open_executor
    from jobs.spec.file import load_spec

    changes = parse_changes(change)
    changes |= _mixed(mean_bits=mean_bits, target_bytes=target_bytes, max_drop=max_drop)
    if store is not None:
        changes["store.uri"] = store
    if single_writer:
        changes["store.single_writer"] = True
    job = load_spec(spec, changes=changes)
    if dry_run:
        _dry_run(job, as_json=as_json)
        return
    from jobs.driver import run_job

    with console.listener(quiet=as_json) as listen, open_executor(job.cluster, local=local) as executor:
        result = run_job(job, executor, listen)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        console.print_result(result)
    if result.gate is not None:
        raise GateError(f"{result.name} version {result.version} is stored, but not tagged: {result.gate}.")


def _mixed(**targets: float | None) -> dict[str, Any]:
    """Return the target of ``quantize.mixed`` that the command line gives, in the place of the spec's own."""
    names = [name for name, value in targets.items() if value is not None]
    if not names:
        return {}
    if len(names) > 1:
        raise typer.BadParameter("give one of --mean-bits, --target-bytes and --max-drop.")
    return {f"quantize.mixed.{name}": value for name, value in targets.items()}


def parse_changes(texts: list[str] | None) -> dict[str, Any]:
    """Return what ``--set KEY=VALUE`` asks for, as dotted keys and YAML values."""
    return dict(_change(text) for text in texts or ())


def _change(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SpecError(f"--set {text!r}: expected KEY=VALUE, such as --set quantize.bits=[8,5].")
    from jobs.spec.document import parse_yaml

    return key, parse_yaml(value, f"--set {key}: the value")


def _dry_run(job: JobSpec, *, as_json: bool) -> None:
    from jobs.cli import console
    from jobs.events import StageClock
    from jobs.stages.preparation import prepare
    from workers.executor import InProcessExecutor
    from workers.scratch import scratch

    with scratch("job", tell=lambda text: typer.echo(f"note: {text}", err=True)) as folder:
        prepared = prepare(job, InProcessExecutor(), folder, StageClock(lambda _: None))
    if as_json:
        print_json(console.plan_document(prepared))
    else:
        console.print_plan(prepared)


def evaluate(
    model: Model,
    *,
    data: Annotated[str, typer.Option(help="Labelled images: a folder, a tar or an npz.")],
    store: Annotated[
        str | None,
        typer.Option("--store", envvar="NESTQUANT_STORE", help="Pull from this store into a scratch folder."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help=f"Measure what a device's folder holds, offline (such as {DEFAULT_CACHE})."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    factory: Factory = None,
    code: Code = None,
    as_json: Json = False,
) -> None:
    """Measure a published version's top-1 in every mode that is there."""
    from jobs.cli import console
    from jobs.published import measure_published

    if (store is None) == (cache is None):
        raise typer.BadParameter("give one of --store and --cache.")
    trust_factory(factory, code)
    name, ref = split_ref(model)
    with console.listener(quiet=as_json) as listen:
        manifest, measured = measure_published(
            name, ref, store=store, cache=cache, data=data, limit=limit, batch_size=batch_size, listen=listen
        )
    if as_json:
        print_json(
            {
                "name": manifest.name,
                "version": manifest.version,
                "measured": [one.model_dump(mode="json") for one in measured],
            }
        )
    else:
        console.print_measured(manifest, measured)
