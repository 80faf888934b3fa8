"""The command ``agent``: the device decides which level runs. It needs neither torch nor ray."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli.options import Json, print_json

if TYPE_CHECKING:
    from storage.agent.events import AgentEvent
    from storage.agent.policy import Decision


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: nestquant agent agent.yaml --explain")(agent)


def agent(
    settings: Annotated[Path, typer.Argument(metavar="FILE", help="The agent's settings, YAML or JSON.")],
    *,
    once: Annotated[bool, typer.Option("--once", help="Look once, act, and end; for a timer.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and tell; change and fetch nothing.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print what every rule says now and which decided; change nothing.")
    ] = False,
    root: Annotated[
        Path, typer.Option("--root", help="What /proc and /sys lie below, for a container that sees its host's.")
    ] = Path("/"),
    as_json: Json = False,
) -> None:
    """Run models part-bit or full-bit as memory, power, temperature, disk and network allow, and tell engines which.

    Ends with SIGTERM or Ctrl-C; models go on as they are. With --json a line for each event.
    """
    import signal
    import threading

    from jobs.spec.file import parse_as, read_document
    from storage.agent.agent import Agent
    from storage.agent.settings import AgentSettings

    parsed = parse_as(AgentSettings, read_document(settings, {}), where=str(settings))
    service = Agent(parsed, root=root, on_event=lambda event: _tell(event, as_json=as_json), dry_run=dry_run or explain)
    if explain:
        _explain(service.explain(), as_json=as_json)
        return
    if once:
        service.once()
        return
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    service.run(stop)


def _tell(event: AgentEvent, *, as_json: bool) -> None:
    import json

    from storage.wording import printable, without_secrets

    if as_json:
        print(json.dumps(asdict(event), sort_keys=True), flush=True)
        return
    text = printable(without_secrets(event.reason))
    version = f" version {event.version}" if event.version else ""
    print(f"{event.at} {event.name}{version} level {event.level}: {event.kind} by {event.rule}: {text}", flush=True)


def _explain(decisions: dict[str, Decision], *, as_json: bool) -> None:
    if as_json:
        print_json({name: asdict(decision) for name, decision in decisions.items()})
        return
    for name, decision in decisions.items():
        typer.echo(f"{name}: {decision.action}, level {decision.level}, decided by {decision.rule}: {decision.reason}")
        for verdict in decision.verdicts:
            typer.echo(f"  {verdict.rule:12} {verdict.stance:5} {verdict.reason}")
    if not decisions:
        typer.echo("No model of the file is on this device yet.")
