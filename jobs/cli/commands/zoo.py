"""Commands on many models: ``nestquant zoo zoo.yaml`` runs them, ``nestquant zoo report`` shows what came of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jobs.cli.commands.jobs import Changes, parse_changes
from jobs.cli.options import Json, print_json
from jobs.errors import GateError, SpecError
from workers.errors import WorkError


class _RunByDefault(TyperGroup):
    """``zoo zoo.yaml`` means ``zoo run zoo.yaml``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    zoo = typer.Typer(
        rich_markup_mode=None,
        cls=_RunByDefault,
        no_args_is_help=True,
        help="Quantize many models with many recipes, and report on them.",
        epilog="Example: nestquant zoo zoo.yaml",
    )
    zoo.command(epilog="Example: nestquant zoo zoo.yaml --results nightly")(run)
    zoo.command(epilog="Example: nestquant zoo report nightly --html nightly.html")(report)
    app.add_typer(zoo, name="zoo")


def run(
    spec: Annotated[Path, typer.Argument(metavar="ZOO", help="The zoo's spec, YAML or JSON.")],
    *,
    results: Annotated[
        Path | None, typer.Option("--results", help="Folder for the tables; the zoo's name by default.")
    ] = None,
    change: Changes = None,
    local: Annotated[
        bool, typer.Option("--local", help="Work in this process, one model after the other, without Ray.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the jobs and run none.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document a line: events, then rows.")] = False,
) -> None:
    """Run every model with every recipe; what an earlier run finished is skipped. This is what ZOO alone does."""
    from jobs.cli.show_zoo import results_table, zoo_listener
    from jobs.cli.terminal import PlainConsole
    from jobs.executors import open_executor
    from jobs.spec.zoo import load_zoo
    from jobs.zoo.run import run_zoo

    zoo, jobs = load_zoo(spec, changes=parse_changes(change))
    if dry_run:
        _print_jobs([(job.spec.name, job.recipe, job.priority) for job in jobs], as_json=as_json)
        return
    if local:
        zoo = zoo.model_copy(update={"max_models": 1})
    folder = results or Path(zoo.name)
    with zoo_listener(jobs, as_json=as_json) as listen, open_executor(zoo.cluster, local=local) as executor:
        rows = run_zoo(zoo, jobs, executor, results=folder, listen=listen)
    failed = [row for row in rows if row.status == "failed"]
    short = [row for row in rows if row.status == "below gate"]
    if not as_json:
        terminal = PlainConsole()
        terminal.print(results_table(rows, title=f"{zoo.name}: {len(rows)} jobs, tables in {folder}"))
        for row in (*failed, *short):
            terminal.print(f"{row.name}: {row.status}: {row.error}", highlight=False, markup=False, soft_wrap=True)
    if failed:
        raise WorkError(f"{len(failed)} of {len(rows)} jobs failed; {failed[0].name}: {failed[0].error}")
    if short:
        raise GateError(
            f"{len(short)} of {len(rows)} versions are stored, but not tagged; {short[0].name}: {short[0].error}"
        )


def report(
    results: Annotated[
        Path, typer.Argument(metavar="RESULTS", help="A run's folder of tables, or the zoo's spec (reads the store).")
    ],
    *,
    html: Annotated[Path, typer.Option("--html", help="The file to write.")] = Path("zoo.html"),
    as_json: Json = False,
) -> None:
    """Write a report as one static HTML file: sortable table, accuracy against bytes, sensitivity of each layer."""
    from jobs.zoo.ledger import ROWS, ZooLedger, parse_rows
    from jobs.zoo.report import render

    if results.is_dir():
        path = results / ROWS
        if not path.is_file():
            raise SpecError(f"{results}: no {ROWS} in this folder; 'nestquant zoo' writes one.")
        title, rows = results.resolve().name, parse_rows(path.read_bytes())
    else:
        if not results.exists():
            raise SpecError(f"No {results}: expected a run's folder of tables, or the zoo's spec.")
        from jobs.spec.zoo import load_zoo
        from storage.stores.uri import open_existing_store

        zoo, _ = load_zoo(results)
        title, rows = zoo.name, ZooLedger(open_existing_store(zoo.store.uri), zoo.name).read_rows()
    html.write_text(render(title, rows), encoding="utf-8")
    if as_json:
        print_json({"html": str(html), "rows": len(rows)})
    else:
        typer.echo(f"{html}: {len(rows)} rows.")


def _print_jobs(jobs: list[tuple[str, str, int]], *, as_json: bool) -> None:
    if as_json:
        print_json([{"name": name, "recipe": recipe, "priority": priority} for name, recipe, priority in jobs])
        return
    for name, recipe, priority in jobs:
        typer.echo(f"{name}  recipe {recipe}, priority {priority}")
    typer.echo(f"{len(jobs)} jobs.")
