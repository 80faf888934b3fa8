"""The command ``analyze``: what each layer loses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.commands.jobs import Changes, parse_changes
from jobs.cli.options import Json, print_json, split_ref
from jobs.errors import SpecError


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: nestquant analyze resnet18.yaml --bits 2,3,4,5,6,8 --samples 64")(analyze)


def analyze(
    what: Annotated[
        str, typer.Argument(metavar="SPEC|NAME[@REF]", help="A job's spec, to measure; or a version, to read about.")
    ],
    *,
    store: Annotated[
        str | None, typer.Option("--store", envvar="NESTQUANT_STORE", help="The version's store, or the spec's.")
    ] = None,
    bits: Annotated[
        str | None, typer.Option(metavar="B,B,...", help="Further widths to run each layer at; full bits included.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration images that damage is measured on.")] = None,
    change: Changes = None,
    local: Annotated[bool, typer.Option("--local", help="Work in this process, without Ray.")] = False,
    as_json: Json = False,
) -> None:
    """Show what each layer loses: noise, flips and bytes, and the network's answers when it alone runs part-bit.

    Of a spec, layers are measured and nothing is published; of a version, its job's report is read.
    """
    from jobs.analysis import analyze_spec, analyze_version
    from jobs.cli import console
    from jobs.cli.show_analysis import print_analysis
    from jobs.executors import open_executor

    if Path(what).suffix.lower() in (".yaml", ".yml", ".json"):
        from jobs.spec.file import load_spec

        changes = parse_changes(change)
        if store is not None:
            changes["store.uri"] = store
        job = load_spec(what, changes=changes)
        with console.listener(quiet=as_json) as listen, open_executor(job.cluster, local=local) as executor:
            analysis = analyze_spec(job, executor, listen, more_bits=_widths(bits), samples=samples)
    else:
        if bits is not None or samples is not None or change:
            raise typer.BadParameter("--bits, --samples and --set are for a spec; a version is what it is.")
        if store is None:
            raise typer.BadParameter("give --store for a version, or a spec that ends in .yaml or .json.")
        from storage.registry import Registry
        from storage.stores.uri import open_existing_store

        analysis = analyze_version(Registry(open_existing_store(store)), *split_ref(what))
    if as_json:
        print_json(analysis.model_dump(mode="json"))
    else:
        print_analysis(analysis)


def _widths(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        widths = tuple(int(word) for word in text.split(","))
    except ValueError:
        widths = (0,)
    if not all(1 <= width <= 8 for width in widths):
        raise SpecError(f"--bits {text!r}: expected widths from 1 to 8, such as 3,4,5,8.")
    return widths
