"""Commands of a device or gateway: pull, upgrade, downgrade, verify, rollback, remove.

They need neither torch nor ray.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cli.options import DEFAULT_CACHE, Cache, Json, mode_of, print_json, split_ref
from storage.wording import size, system_text

if TYPE_CHECKING:
    from storage.device import Device, Event, Moved
    from storage.device import Source as DeviceSource

Name = Annotated[str, typer.Argument(metavar="NAME", help="A model in the device's folder.")]
Source = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="NESTQUANT_STORE",
        help="Where to pull from: a folder, s3://..., https://... or oci://... (no keys on the device).",
    ),
]
Bundle = Annotated[
    Path | None,
    typer.Option("--from", help="A bundle ('nestquant bundle') to read in the place of a store; no network is asked."),
]
Level = Annotated[int | None, typer.Option("--level", min=0, help="0 is part-bit, the highest is full-bit.")]
AllowUnsigned = Annotated[bool, typer.Option("--allow-unsigned", help="Take the store's word for what a version is.")]
ReplaceSigned = Annotated[
    bool, typer.Option("--replace-signed", help="With --allow-unsigned: an unsigned version may replace a signed one.")
]
Trust = Annotated[
    Path | None, typer.Option("--trust", help="The publisher's root of trust (root.json); the folder remembers it.")
]
Explain = Annotated[bool, typer.Option("--explain", help="Say of each shard that came which way it came, and why.")]
Rate = Annotated[int | None, typer.Option("--max-rate", min=1, help="Bytes a second, at most.")]

DeviceId = Annotated[
    str | None,
    typer.Option(
        "--device-id",
        envvar="NESTQUANT_DEVICE_ID",
        help="Who this device is to rollouts, the machine's id by default; it is sent to nobody.",
    ),
]
Cohorts = Annotated[
    list[str] | None,
    typer.Option("--cohort", envvar="NESTQUANT_COHORTS", help="A cohort of this device, for rollouts. Repeatable."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        epilog="Example: nestquant pull resnet18@latest --store s3://models --cache /var/lib/models --allow-unsigned"
    )(pull)
    app.command(epilog="Example: nestquant upgrade resnet18 --store s3://models --cache /var/lib/models")(upgrade)
    app.command(epilog="Example: nestquant downgrade resnet18 --cache /var/lib/models")(downgrade)
    app.command(epilog="Example: nestquant verify resnet18 --cache /var/lib/models")(verify)
    app.command(epilog="Example: nestquant rollback resnet18 --cache /var/lib/models")(rollback)
    app.command(epilog="Example: nestquant remove resnet18 --cache /var/lib/models")(remove)


def pull(
    model: Annotated[
        str | None,
        typer.Argument(metavar="NAME[@REF]", help="As everywhere; of a bundle it may be left out.", show_default=False),
    ] = None,
    *,
    source: Source = None,
    bundle: Bundle = None,
    cache: Cache = DEFAULT_CACHE,
    level: Level = None,
    trust: Trust = None,
    allow_unsigned: AllowUnsigned = False,
    replace_signed: ReplaceSigned = False,
    device_id: DeviceId = None,
    cohort: Cohorts = None,
    max_rate: Rate = None,
    explain: Explain = False,
    as_json: Json = False,
) -> None:
    """Fetch a version's base and high shards, one by one; the model then runs part-bit.

    Goes on where an earlier pull stopped. Shards that are here already are hashed; damaged ones come anew. Where the
    version has deltas ('nestquant delta') from what is here, they come in the place of shards if they are shorter.
    """
    name, ref = _named_in(bundle, cache, model)
    opened = _open_source(source, bundle)
    device = _device(
        cache,
        opened,
        unsigned=allow_unsigned,
        replace_signed=replace_signed,
        root=_root_of_trust(trust),
        device_id=device_id or _machine_id(),
        cohorts=frozenset(cohort or ()),
        max_rate=max_rate,
        quiet=as_json,
    )
    _report(device, device.pull(name, ref, level=level), explain=explain, as_json=as_json)


def upgrade(
    name: Name,
    *,
    source: Source = None,
    bundle: Bundle = None,
    cache: Cache = DEFAULT_CACHE,
    level: Level = None,
    max_rate: Rate = None,
    explain: Explain = False,
    as_json: Json = False,
) -> None:
    """Fetch the low shards of the version in use; the model then runs full-bit.

    High shards never travel again, unless they are damaged.
    """
    # The manifest was trusted when it was pulled, and every shard is checked against it: nothing new is trusted here.
    device = _device(cache, _open_source(source, bundle), max_rate=max_rate, quiet=as_json)
    _report(device, device.upgrade(name, level), explain=explain, as_json=as_json)


def downgrade(
    name: Name,
    *,
    cache: Cache = DEFAULT_CACHE,
    level: Annotated[int, typer.Option("--level", min=0, help="Keep the levels up to this one.")] = 0,
    as_json: Json = False,
) -> None:
    """Delete the low shards; the model then runs part-bit.

    Works offline.
    """
    device = _device(cache, quiet=as_json)
    _report(device, device.downgrade(name, level), as_json=as_json)


def verify(
    name: Name,
    *,
    cache: Cache = DEFAULT_CACHE,
    discard: Annotated[
        bool, typer.Option("--discard", help="Delete damaged shards, so that the next pull fetches them again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Hash every shard again, of the version in use and of the one that 'rollback' goes back to.

    Works offline.
    """
    from storage.device.errors import ContentError

    result = _device(cache, quiet=as_json).verify(name, discard=discard)
    if as_json:
        print_json(asdict(result) | {"whole": result.whole})
    else:
        state = "whole" if result.whole else f"{len(result.damaged)} of {result.blobs} blobs damaged"
        back = "" if result.previous is None else f", and version {result.previous} to go back to"
        typer.echo(
            f"{result.name} version {result.version}, level {result.level}{back}: "
            f"{result.blobs} blobs, {size(result.size_bytes)}: {state}."
        )
    if not result.whole:
        advice = "Pull again." if discard else "Run 'nestquant verify --discard', then pull again."
        raise ContentError("\n".join([*result.damaged, advice]))


def rollback(name: Name, *, cache: Cache = DEFAULT_CACHE, as_json: Json = False) -> None:
    """Go back to the version that was in use before, if it is still whole.

    Works offline.
    """
    device = _device(cache, quiet=as_json)
    _report(device, device.rollback(name), as_json=as_json)


def remove(name: Name, *, cache: Cache = DEFAULT_CACHE, as_json: Json = False) -> None:
    """Delete a model from the device's folder; shards that another model shares stay."""
    freed = _device(cache, quiet=as_json).remove(name)
    if as_json:
        print_json({"name": name, "freed_bytes": freed})
    else:
        typer.echo(f"{name}: removed, {size(freed)} freed.")


def _device(
    cache: Path,
    source: DeviceSource | None = None,
    *,
    unsigned: bool = False,
    replace_signed: bool = False,
    root: bytes | None = None,
    device_id: str | None = None,
    cohorts: frozenset[str] = frozenset(),
    max_rate: int | None = None,
    quiet: bool = True,
) -> Device:
    from storage.device import Device, Pace

    return Device(
        cache,
        source,
        unsigned=unsigned,
        replace_signed=replace_signed,
        root_of_trust=root,
        device_id=device_id,
        cohorts=cohorts,
        pace=Pace(max_rate) if max_rate else Pace(),
        on_event=(lambda _: None) if quiet else _Progress(),
    )


def _open_source(store: str | None, bundle: Path | None) -> DeviceSource:
    from storage.device import open_source
    from storage.device.bundle import BundleSource

    if bundle is not None:
        return BundleSource(bundle)
    if store is None:
        raise typer.BadParameter("Missing option '--store': a folder, s3://... or https://...; or --from a bundle.")
    return open_source(store)


def _named_in(bundle: Path | None, cache: Path, model: str | None) -> tuple[str, str]:
    """Return name and reference to pull: where a bundle is read and nothing else is said, what it says that it holds.

    Then it takes no device back: going back to an earlier version is said by its number.
    """
    from storage.device import Device
    from storage.device.bundle import BundleSource
    from storage.device.errors import Untrusted

    if bundle is None:
        if model is None:
            raise typer.BadParameter("Missing argument 'NAME[@REF]'.")
        return split_ref(model)
    contents = BundleSource(bundle).contents()
    name, at, ref = (model or contents.name).partition("@")
    if name != contents.name:
        raise typer.BadParameter(f"{bundle} holds {contents.name}, not {name}.")
    if at:
        return name, ref or "latest"
    current = Device(cache).status(name).state.current
    if current is not None and current.version > contents.version:
        raise Untrusted(
            f"{bundle} holds {name} version {contents.version}, and version {current.version} is here; "
            f"write {name}@{contents.version} if going back is meant"
        )
    return name, str(contents.version)


def _root_of_trust(path: Path | None) -> bytes | None:
    from storage.device.errors import Untrusted

    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise Untrusted(
            f"--trust {path}: {system_text(error)}; 'nestquant keys init' writes a root of trust."
        ) from error


def _machine_id() -> str | None:
    """Return the id that systemd gave this machine, None where it has none (machine-id(5))."""
    try:
        return Path("/etc/machine-id").read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None


class _Progress:
    """One bar of bytes on a terminal; retries and warnings as lines, on standard error."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        from jobs.cli.terminal import PlainConsole

        self.console = PlainConsole(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.bar = self.progress.add_task("shards", total=None)

    def __call__(self, event: Event) -> None:
        if event.kind in ("retry", "warning"):
            self.console.print(f"{event.kind}: {event.message}", highlight=False)
            return
        self.progress.start()
        self.progress.update(
            self.bar,
            description=f"shard {event.index + 1} of {event.count}",
            completed=event.done_bytes,
            total=event.total_bytes,
        )
        if event.kind == "blob" and event.index + 1 == event.count:
            self.progress.stop()


def _report(device: Device, moved: Moved, *, explain: bool = False, as_json: bool) -> None:
    if as_json:
        print_json(asdict(moved))
        return
    for line in moved.ways if explain else ():
        typer.echo(line)
    count = device.manifest(moved.name).level_count()
    mode = mode_of(moved.level, count)
    parts = [f"{moved.blobs_moved} blobs, {size(moved.received_bytes)} received"]
    figures: list[tuple[str, Any]] = [
        ("resumed", moved.resumed_bytes),
        ("already here", moved.saved_bytes),
        ("freed", moved.freed_bytes),
    ]
    parts += [f"{size(count)} {word}" for word, count in figures if count]
    if moved.deltas:
        parts.append(f"{moved.deltas} by delta, which spared {size(moved.spared_bytes)}")
    if moved.damaged:
        parts.append(f"{len(moved.damaged)} that were damaged here came anew")
    if moved.retries:
        parts.append(f"{moved.retries} retries")
    typer.echo(
        f"{moved.name} version {moved.version} runs {mode}{'' if moved.signed else ' (unsigned)'}: {', '.join(parts)}."
    )
