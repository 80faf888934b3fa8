"""Commands that look after a store: doctor, fsck, gc, delete-version."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from jobs.cli.options import Json, Store, console, print_json
from storage.wording import size

_DAY_S = 86_400.0
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: nestquant doctor --store 's3://models?endpoint_url=http://gateway:9000'")(doctor)
    app.command(epilog="Example: nestquant fsck --store s3://models")(fsck)
    app.command(epilog="Example: nestquant gc --store s3://models --grace-days 7 --remove")(gc)
    app.command(name="delete-version", epilog="Example: nestquant delete-version resnet18 3 --store s3://models")(
        delete_version
    )


def doctor(*, store: Store, as_json: Json = False) -> None:
    """Try what publishing and pulling rely on: access, clock, ranges, listing, create-only under a race, checksums."""
    from storage.errors import UnsafeStore
    from storage.stores.doctor import diagnose
    from storage.stores.uri import open_store

    checks = diagnose(open_store(store))
    failed = [check for check in checks if check.status == "fail"]
    if as_json:
        print_json({"store": store, "healthy": not failed, "checks": [asdict(check) for check in checks]})
    else:
        from rich.text import Text

        from jobs.cli.tables import Column, WholeTable

        table = WholeTable([Column("check"), Column("holds"), Column("what was seen")])
        for check in checks:
            table.add_row(check.name, Text(check.status, style=_COLOURS[check.status]), check.detail)
        console().print(table)
    if failed:
        raise UnsafeStore(f"{store}: {len(failed)} of {len(checks)} checks failed, {failed[0].name!r} first.")


def fsck(
    *,
    store: Store,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One model; all of them by default.")] = None,
    as_json: Json = False,
) -> None:
    """Read every blob of every version again and compare lengths and digests."""
    from storage.errors import Damaged
    from storage.retention import fsck as check
    from storage.stores.uri import open_existing_store

    report = check(open_existing_store(store), name)
    if as_json:
        print_json(asdict(report))
    else:
        typer.echo(
            f"{report.models} models, {report.versions} versions, {report.blobs} blobs, "
            f"{size(report.bytes_read)} read: {len(report.problems)} problems."
        )
    if report.problems:
        raise Damaged(
            "\n".join(report.problems)
            + f"\n{store}: {len(report.problems)} problems; run the job of a damaged version again: what is damaged is "
            "sent anew"
        )


def gc(
    *,
    store: Store,
    grace_days: Annotated[float, typer.Option(min=0, help="Spare what no version names for so long.")] = 7,
    remove: Annotated[bool, typer.Option("--remove", help="Do it; without it, only say what would be done.")] = False,
    as_json: Json = False,
) -> None:
    """Remove blobs that no version names, in two runs at least the age of grace apart. A dry run unless --remove."""
    from storage.retention import gc as collect
    from storage.stores.uri import open_existing_store

    report = collect(open_existing_store(store), grace_s=grace_days * _DAY_S, dry_run=not remove)
    if as_json:
        print_json(asdict(report))
        return
    did = "removed" if remove else "would be removed"
    marked = "marked for a later run" if remove else "would be marked for a later run"
    typer.echo(
        f"{report.versions} versions name {report.kept_blobs} blobs. {len(report.removed)} blobs "
        f"({size(report.removed_bytes)}) {did}, {len(report.condemned)} {marked}."
    )
    if not remove:
        typer.echo("Nothing was changed: say --remove to do it.")


def delete_version(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1)],
    *,
    store: Store,
    as_json: Json = False,
) -> None:
    """Take a version back: its number is never used again, its blobs go with the next gc."""
    from storage.retention import delete_version as delete
    from storage.stores.uri import open_existing_store

    deleted = delete(open_existing_store(store), name, version)
    if as_json:
        print_json(asdict(deleted))
        return
    typer.echo(f"{deleted.name} version {deleted.version} deleted ({deleted.digest}); 'nestquant gc' frees its blobs.")
    if deleted.dangling_tags:
        typer.echo(f"These tags still point at it: {', '.join(deleted.dangling_tags)}.")
