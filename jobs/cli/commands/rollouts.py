"""The command ``rollout``: give a version to a share of the devices that follow a tag."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.commands.tags import SigningKeys
from jobs.cli.options import Json, Model, Store, print_json
from jobs.stages.signing import load_keys


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        epilog="Example: nestquant rollout resnet18@7 --percent 10 --store s3://models --key publisher.pem "
        "--key online.pem"
    )(rollout)


def rollout(
    model: Model,
    *,
    store: Store,
    percent: Annotated[
        float | None, typer.Option(min=0.01, max=100, help="Begin, widen or go on: of so many of 100 devices.")
    ] = None,
    pause: Annotated[bool, typer.Option("--pause", help="Nobody new takes the version.")] = False,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Who took the version follows the tag again.")] = False,
    finish: Annotated[bool, typer.Option("--finish", help="Point the tag itself at the version.")] = False,
    tag: Annotated[str, typer.Option(help="The tag that the devices follow.")] = "latest",
    cohort: Annotated[str | None, typer.Option(help="Only the devices of this cohort.")] = None,
    seed: Annotated[str | None, typer.Option(help="Decides who comes first; the version's digest by default.")] = None,
    key: SigningKeys = None,
    as_json: Json = False,
) -> None:
    """Roll a version out to a share of the devices that follow a tag, signed; without a word, show what is under way.

    Which devices are taken follows from seed and device id alone; a share only grows, so nobody goes to and fro.
    """
    from storage.registry import Registry
    from storage.signing import staging
    from storage.stores.uri import open_existing_store

    name, at, ref = model.partition("@")
    words = [percent is not None, pause, withdraw, finish]
    if sum(words) > 1 or bool(at) is not (percent is not None) or (seed is not None and percent is None):
        raise typer.BadParameter(
            "write NAME@VERSION --percent P [--seed S], or NAME with one of --pause, --withdraw, --finish or none."
        )
    opened = open_existing_store(store)
    if any(words):
        if not key:
            raise typer.BadParameter("rollouts are signed: give --key, the publisher's and the online key.")
        signers = load_keys(key)
        if percent is not None:
            version = Registry(opened).resolve(name, ref).version
            staging.roll_out(
                opened, name, version, signers, share=round(100 * percent), tag=tag, cohort=cohort, seed=seed
            )
        else:
            act = staging.pause if pause else staging.withdraw if withdraw else staging.finish
            act(opened, name, signers, tag=tag, cohort=cohort)
    rows = staging.read_rollouts(opened, name, tag)
    if as_json:
        print_json([row.model_dump(mode="json") for row in rows])
        return
    for row in rows:
        whom = "devices" if row.cohort is None else f"devices of {row.cohort}"
        state = ", paused" if row.paused else ""
        typer.echo(f"{name}: version {row.version} to {row.share / 100:g} % of the {whom} that follow {tag!r}{state}.")
    if not rows:
        typer.echo(f"{name}: no rollout; every device follows {tag!r}.")
