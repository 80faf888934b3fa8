"""The command ``tag``: which version devices follow, its history, and the way back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cli.options import Json, Model, Store, print_json
from jobs.stages.signing import load_keys

if TYPE_CHECKING:
    from storage.references import TagEntry

SigningKeys = Annotated[
    list[str] | None, typer.Option("--key", help="A key that signs it: a PEM file, or env:NAME. Repeatable.")
]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        epilog="Example: nestquant tag resnet18@3 stable --store s3://models --key publisher.pem --key online.pem"
    )(tag)


def tag(
    model: Model,
    name: Annotated[str, typer.Argument(metavar="TAG", help="The tag, such as stable.")],
    *,
    store: Store,
    back: Annotated[bool, typer.Option("--back", help="Let it go back to an earlier version.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take its last move back.")] = False,
    history: Annotated[bool, typer.Option("--history", help="Only show where it has been.")] = False,
    key: SigningKeys = None,
    no_sign: Annotated[
        bool, typer.Option("--no-sign", help="Of a signed model, move the store's tag alone: devices that trust stay.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Point a tag at a version. It moves forward; back is a word of its own, and every move can be undone."""
    from storage.registry import Registry
    from storage.signing.metadata import newest_edition, sign
    from storage.stores.uri import open_existing_store

    model_name, at, ref = model.partition("@")
    if ((undo or history) and at) or (undo and (history or back)):
        raise typer.BadParameter("--undo and --history stand alone, with NAME and TAG and no version.")
    opened = open_existing_store(store)
    registry = Registry(opened)
    log = registry.tag_log(model_name, name)
    if history:
        _print_history(log.history(), as_json=as_json)
        return
    if not undo and not ref:
        raise typer.BadParameter(f"which version? Write {model_name}@VERSION, a number, a tag or a digest.")
    signed = bool(key) or newest_edition(opened, model_name) > 0
    if signed and not key and not no_sign:
        raise typer.BadParameter(
            f"{model_name} is signed, and devices follow the signed tag: give --key (publisher and online), "
            "or say --no-sign to move the store's tag alone."
        )
    keys = load_keys(key or ())
    entry = log.undo() if undo else registry.tag(model_name, name, registry.resolve(model_name, ref).version, back=back)
    edition = sign(opened, model_name, keys, moves=[entry]).edition if keys else None
    if as_json:
        print_json(entry.model_dump(mode="json") | {"edition": edition})
        return
    signature = (
        f", signed in edition {edition}" if edition else ", unsigned" if not signed else ", the signed tag stays"
    )
    typer.echo(f"{model_name}: tag {name!r} names version {entry.version} by its entry {entry.number}{signature}.")


def _print_history(entries: list[tuple[TagEntry, float]], *, as_json: bool) -> None:
    rows: list[dict[str, Any]] = [entry.model_dump(mode="json") | {"moved_s": moved_s} for entry, moved_s in entries]
    if as_json:
        print_json(rows)
        return
    for entry, moved_s in entries:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(moved_s))
        typer.echo(f"{entry.number:4}  {when} UTC  version {entry.version:<6} {entry.move}")
    if not rows:
        typer.echo("No entries: the tag was never moved, or by an older release alone.")
