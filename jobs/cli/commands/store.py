"""Commands on a store: list, inspect."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cli.options import Code, Factory, Json, Model, Store, console, print_json, split_ref, trust_factory
from storage.wording import size


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(name="ls", epilog="Example: nestquant ls --store ./store")(ls)
    app.command(epilog="Example: nestquant inspect resnet18@3 --store ./store")(inspect)
    app.command(epilog="Example: nestquant presign resnet18@3 --store s3://models --hours 24 -o index.json")(presign)
    app.command(epilog="Example: nestquant bundle resnet18@3 --level full --store s3://models -o usb.tar")(bundle)
    app.command(epilog="Example: nestquant push resnet18@3 oci://registry.example/vision/resnet18 --store s3://models")(
        push
    )
    app.command(name="export-hf", epilog="Example: nestquant export-hf resnet18@3 ./resnet18 --store s3://models")(
        export_folder
    )


def ls(*, store: Store, as_json: Json = False) -> None:
    """List the models in a store, their versions and tags."""
    from storage.registry import Registry
    from storage.stores.uri import open_existing_store

    registry = Registry(open_existing_store(store))
    rows = [
        {"name": name, "versions": registry.versions(name), "tags": registry.tags(name)} for name in registry.models()
    ]
    if as_json:
        print_json(rows)
        return
    if not rows:
        typer.echo(f"{store} holds no model yet: 'nestquant quantize' publishes one.")
        return
    from jobs.cli.tables import Column, WholeTable

    table = WholeTable([Column("model"), Column("versions", figures=True), Column("tags")])
    for row in rows:
        tags = ", ".join(f"{tag} -> {version}" for tag, version in sorted(row["tags"].items()))  # type: ignore[attr-defined]
        table.add_row(str(row["name"]), _ranges(row["versions"]), tags)  # type: ignore[arg-type]
    console().print(table)


def inspect(model: Model, *, store: Store, as_json: Json = False) -> None:
    """Show what a version consists of: layers, bits, shards, what stays float, and what was measured."""
    from jobs.cli.terminal import title
    from storage.registry import Registry
    from storage.signing.expiry import trust_warnings
    from storage.stores.uri import open_existing_store

    name, ref = split_ref(model)
    registry = Registry(open_existing_store(store))
    resolved = registry.resolve(name, ref)
    report = _report(registry, name, resolved.version)
    if as_json:
        print_json({"digest": resolved.digest, "manifest": resolved.manifest.model_dump(mode="json"), "report": report})
        return
    from jobs.cli.tables import Column, WholeTable

    manifest, out = resolved.manifest, console()
    sizes = manifest.sizes
    out.print(title(name, f" version {resolved.version}  {resolved.digest}"))
    out.print(
        f"{manifest.model.library} {manifest.model.arch}, {manifest.model.parameters:,} parameters, "
        f"{sizes.weights:,} weights quantized"
    )
    levels = ", ".join(f"level {level} {size(count)}" for level, count in enumerate(sizes.level_bytes))
    out.print(
        f"float {size(sizes.float_bytes)}; stored: base {size(sizes.base_bytes)}, {levels} "
        f"in {len(manifest.groups)} shard groups"
    )
    words = ("layer", "kind", "scheme")
    headings = ("layer", "kind", "shape", "bits", "scheme", "shards", "SQNR dB part", "SQNR dB full")
    table = WholeTable([Column(heading, figures=heading not in words) for heading in headings])
    losses = {layer["name"]: layer["sqnr_db"] for layer in (report or {}).get("layers", [])}
    for layer in manifest.layers:
        shards = _ranges(sorted({piece.group for piece in layer.pieces}))
        loss = losses.get(layer.name) or [None]
        shape = "x".join(map(str, layer.shape))
        table.add_row(
            layer.name,
            layer.kind,
            shape,
            "|".join(map(str, layer.bits)),
            layer.scheme,
            shards,
            _decibel(loss[0]),
            _decibel(loss[-1]),
        )
    out.print(table)
    for line in trust_warnings(registry.store, name):
        typer.echo(f"warning: {line}", err=True)
    for float_layer in manifest.kept_float:
        out.print(f"stays float: {float_layer.name} ({float_layer.reason})")
    for measured in (report or {}).get("measured", []):
        share = measured["correct"] / measured["total"]
        error = 100 * math.sqrt(share * (1 - share) / measured["total"])
        activations = ", activations quantized" if measured["activations"] else ""
        out.print(
            f"top-1 {measured['mode']}{activations}: {100 * share:.2f} ± {error:.2f} % of {measured['total']} images"
        )


def presign(
    model: Model,
    *,
    store: Store,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the index, for devices to be given.")],
    hours: Annotated[float, typer.Option(min=0.01, max=168, help="How long its URLs work; S3 allows a week.")] = 24,
    as_json: Json = False,
) -> None:
    """Write URLs that let a device without credentials pull one version: nestquant pull NAME --store presigned:INDEX.

    Where the version is signed, the index names the signed documents too.
    """
    from storage.device.presign import Presigner, keys_of, trust_keys_of
    from storage.errors import BadStoreURI
    from storage.registry import Registry
    from storage.signing.metadata import newest_edition
    from storage.signing.root import newest_root
    from storage.stores.s3 import S3Store
    from storage.stores.uri import open_store

    opened = open_store(store)
    if not isinstance(opened, S3Store):
        raise BadStoreURI(f"{store}: only an s3:// store presigns URLs; devices read a folder or https:// as it is")
    name, ref = split_ref(model)
    registry = Registry(opened)
    resolved = registry.resolve(name, ref)
    tags = [tag for tag, version in registry.tags(name).items() if version == resolved.version]
    keys = keys_of(resolved.manifest, tags=tags)
    if edition := newest_edition(opened, name):
        keys += trust_keys_of(name, edition=edition, root_version=newest_root(opened).signed.version)
    out.write_bytes(Presigner(opened, expires_s=int(3600 * hours)).index(keys))
    if as_json:
        print_json({"name": name, "version": resolved.version, "urls": len(keys), "signed": bool(edition)})
        return
    typer.echo(
        f"{out}: {len(keys)} URLs of {name} version {resolved.version}, for {hours:g} h: "
        f"nestquant pull {name}@{resolved.version} --store presigned:{out}"
    )


def bundle(
    model: Model,
    *,
    store: Store,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    level: Annotated[str, typer.Option(help="part, full, or a level's number: the shards to take along.")] = "part",
    days: Annotated[
        float | None, typer.Option(min=0.01, max=365, help="How long devices may believe it; wants the online key.")
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option("--key", help="The online key, for --days: a PEM file, or env:NAME.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a version into one file, for devices without a network: nestquant pull --from FILE.

    It is verified as it is online, and believed as long as what is signed: 7 days, or --days.
    """
    from datetime import timedelta

    from jobs.stages.signing import load_keys
    from storage.device.bundle import write_bundle
    from storage.stores.uri import open_existing_store

    name, ref = split_ref(model)
    if level not in ("part", "full") and not level.isdecimal():
        raise typer.BadParameter(f"--level {level!r}: expected part, full or a number.")
    if (days is None) is not (key is None):
        raise typer.BadParameter("--days and --key go together: the online key signs for how long it counts.")
    opened, timestamp = open_existing_store(store), None
    if days is not None:
        from storage.signing.metadata import lasting_timestamp

        timestamp = lasting_timestamp(opened, name, load_keys(key or ()), timedelta(days=days))
    top = {"part": 0, "full": None}.get(level, int(level) if level.isdecimal() else 0)
    written = write_bundle(opened, name, ref, out, level=top, timestamp=timestamp)
    contents = written.contents
    if as_json:
        print_json(contents.model_dump(mode="json") | {"size_bytes": written.size_bytes, "signed": written.signed})
        return
    trust = "signed" if written.signed else "unsigned"
    typer.echo(
        f"{out}: {name} version {contents.version} up to level {contents.level}, {trust}, {size(written.size_bytes)}: "
        f"nestquant pull --from {out}"
    )


def push(
    model: Model,
    registry: Annotated[str, typer.Argument(metavar="OCI", help="oci://host/repository[:tag]; the tag is latest.")],
    *,
    store: Store,
    as_json: Json = False,
) -> None:
    """Push a version to an OCI registry, with what is signed of it: nestquant pull NAME@N --store oci://...

    It is tagged with its number and with the tag given. Needs the extra 'oci'; credentials are those of docker login.
    """
    from dataclasses import asdict

    from storage.device.oci import push as push_version
    from storage.stores.uri import open_existing_store

    name, ref = split_ref(model)
    pushed = push_version(open_existing_store(store), name, ref, registry)
    if as_json:
        print_json(asdict(pushed))
        return
    typer.echo(
        f"{registry}: {name} version {pushed.version}, tags {', '.join(pushed.tags)}, {pushed.digest}: "
        f"{size(pushed.sent_bytes)} of {size(pushed.size_bytes)} sent."
    )


def export_folder(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that is empty, or not there.")],
    *,
    store: Store,
    factory: Factory = None,
    code: Code = None,
    as_json: Json = False,
) -> None:
    """Write a version as a folder for the HF hub: card, configuration, float weights of every level, and the shards."""
    from jobs.hub import export_hf
    from storage.stores.uri import open_existing_store

    trust_factory(factory, code)
    manifest = export_hf(open_existing_store(store), *split_ref(model), folder)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    total = sum((folder / path).stat().st_size for path in files)
    if as_json:
        print_json({"name": manifest.name, "version": manifest.version, "files": files, "size_bytes": total})
        return
    typer.echo(
        f"{folder}: {manifest.name} version {manifest.version}, {len(files)} files, {size(total)}: "
        f"hf upload ORGANISATION/{manifest.name} {folder}"
    )


def _report(registry: Any, name: str, version: int) -> dict[str, Any] | None:
    import json

    from storage.errors import NotFound

    try:
        document: dict[str, Any] = json.loads(registry.get_report(name, version, "job"))
    except NotFound:
        return None
    return document


def _decibel(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _ranges(numbers: list[int]) -> str:
    """Return ``1-3, 5`` for 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
