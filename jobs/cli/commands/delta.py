"""The command ``delta``: let devices come from an earlier version to a later one in fewer bytes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from jobs.cli.options import Json, Store, console, mode_of, print_json
from storage.wording import size


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: nestquant delta resnet18 --from 6 --to 7 --store s3://models --tag latest")(delta)


def delta(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name.")],
    *,
    store: Store,
    source: Annotated[
        list[str], typer.Option("--from", metavar="REF", help="A version that devices are at; may be repeated.")
    ],
    target: Annotated[str, typer.Option("--to", metavar="REF", help="The version that they shall come to.")] = "latest",
    tag: Annotated[
        list[str] | None, typer.Option("--tag", help="Point this tag at the new version; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish a version once more, with deltas from earlier ones. Its shards are the same blobs.

    A delta that is not at least a fifth shorter than its shard is not published. Devices take whichever way is shorter,
    and the whole shard wherever a delta does not do. Devices of a release before deltas take the version without them.
    """
    from jobs.updates import publish_deltas
    from storage.registry import Registry
    from storage.stores.uri import open_existing_store

    registry = Registry(open_existing_store(store))
    aim = registry.resolve(name, target)
    update = publish_deltas(registry, aim, [registry.resolve(name, ref) for ref in source], tags=tuple(tag or ()))
    published = update.published
    if as_json:
        document = asdict(update) | {"name": name, "version": None if published is None else published.version}
        print_json(document)
        return
    from jobs.cli.tables import Column, WholeTable

    table = WholeTable([Column("from"), Column("level"), Column("whole", figures=True), Column("update", figures=True)])
    for row in update.levels:
        level = "shared" if row.level is None else mode_of(row.level, aim.manifest.level_count())
        table.add_row(str(row.source), level, size(row.whole_bytes), size(row.update_bytes))
    console().print(table)
    if published is None:
        typer.echo(f"{name} version {aim.version}: no delta is a fifth shorter than what it makes; nothing published.")
        return
    typer.echo(
        f"{name} version {published.version}: version {aim.version} with {update.deltas} deltas, "
        f"{size(update.delta_bytes)} more."
    )
