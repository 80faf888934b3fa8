"""The command that makes a site of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import Json, Store, print_json
from storage.wording import size


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: nestquant catalog --store s3://models --out site/")(catalog)


def catalog(
    *,
    store: Store,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder: new, empty, or of an earlier run.")] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Write the site into the store, below catalog/, for its web server.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Where devices read the store, for the snippets; --store's by default.")
    ] = None,
    title: Annotated[str, typer.Option(help="The title of the first page.")] = "NestQuant models",
    as_json: Json = False,
) -> None:
    """Make a static site of a store: models, versions, accuracy, bytes, signatures, a card each; it asks no network.

    What cannot be read stands there as a line that says so, and the command still succeeds; a store out of reach fails.
    """
    from contextlib import nullcontext
    from dataclasses import asdict
    from datetime import UTC, datetime

    from jobs.catalog.destination import SiteFolder, StoreSite
    from jobs.catalog.site import build_site
    from storage.stores.uri import open_existing_store

    if (out is None) is not publish:
        raise typer.BadParameter("give one of --out and --publish.")
    opened = open_existing_store(store)
    with SiteFolder(out) if out is not None else nullcontext(StoreSite(opened)) as destination:
        summary = build_site(
            opened,
            destination,
            address=address or store,
            title=title,
            time=datetime.now(UTC),
        )
    if as_json:
        print_json(asdict(summary))
        return
    where = f"{out}/index.html" if out is not None else f"{opened.uri}: catalog/index.html"
    typer.echo(
        f"{where}: {summary.models} models, {summary.versions} versions, {summary.zoos} zoos; "
        f"{summary.files} files, {size(summary.size_bytes)}."
    )
    for fault in summary.faults:
        typer.echo(f"warning: {fault}", err=True)
