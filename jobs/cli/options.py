"""Options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 140
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Store = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="NESTQUANT_STORE",
        help="A folder, file:///path or s3://bucket/prefix?endpoint_url=...&region=...&addressing_style=path&profile=...",
        show_default=False,
    ),
]
Cache = Annotated[Path, typer.Option("--cache", envvar="NESTQUANT_CACHE", help="The device's folder.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="NAME[@REF]", help="A model's name, and a tag, a version number or a digest; @latest by default."
    ),
]
Factory = Annotated[
    str | None,
    typer.Option(
        "--factory", metavar="MODULE:FUNCTION", help="What builds the network, where its architecture is your own."
    ),
]
Code = Annotated[
    str | None,
    typer.Option("--code", metavar="FILE", help="The factory's .py file, package or .zip, if not installed."),
]
Engine = Literal["onnx"]  # that of ``storage.manifest``, which loads pydantic: '--help' does without
DEFAULT_CACHE = Path("nestquant-cache")


def console(*, stderr: bool = False) -> Console:
    """Return a console that never breaks a sentence, and is wide where nobody watches, so that logs keep whole rows."""
    from jobs.cli.terminal import PlainConsole

    result = PlainConsole(stderr=stderr, soft_wrap=True)
    return result if result.is_terminal else PlainConsole(stderr=stderr, soft_wrap=True, width=PLAIN_WIDTH)


def split_ref(model: str) -> tuple[str, str]:
    """Return ``(name, ref)`` of ``name@ref``; the tag ``latest`` where none is given."""
    name, _, ref = model.partition("@")
    return name, ref or "latest"


def trust_factory(factory: str | None, code: str | None) -> None:
    """Let this process build an architecture of the user's own, on the user's word."""
    if factory is None:
        if code is not None:
            raise typer.BadParameter("--code is that of a --factory MODULE:FUNCTION; give both.")
        return
    from jobs.stages.code import trust_entry

    trust_entry(factory, code)


def mode_of(level: int, count: int) -> str:
    """Return what runs at a level of so many: ``part-bit``, ``full-bit`` or ``level 1 of 2``."""
    from storage.manifest import level_name

    word = level_name(level, count)
    return word if level in (0, count - 1) else f"{word} of {count - 1}"


def print_json(document: Any) -> None:
    """Print one JSON document on standard output."""
    typer.echo(json.dumps(document, indent=2, sort_keys=True))
