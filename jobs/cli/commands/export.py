"""The command ``export``: make a published version ready for an inference engine."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.options import Code, Engine, Factory, Json, Model, Store, print_json, split_ref, trust_factory
from storage.wording import size


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: nestquant export resnet18@3 --engine onnx --store s3://models --tag latest")(export)


def export(
    model: Model,
    *,
    store: Store,
    engine: Annotated[Engine, typer.Option("--engine", help="What devices run it on: onnx is ONNX Runtime.")] = "onnx",
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="IMAGES",
            help="Where activations are quantized: images that tell the ranges of the first layer's input and of sums. "
            "Without, what needs those runs in float.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="So many of the images.")] = 256,
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="FILE", help="Names of the classes, one a line, class 0 first."),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", help="Point this tag at the new version; may be repeated.")
    ] = None,
    factory: Factory = None,
    code: Code = None,
    as_json: Json = False,
) -> None:
    """Publish a version once more, with an engine's graph. Its shards are the same blobs: devices fetch none anew."""
    from jobs.published import export_published
    from storage.registry import Registry
    from storage.stores.uri import open_existing_store
    from workers.engines.export import RangeImages
    from workers.inputs.labels import labels_of_file
    from workers.scratch import scratch

    trust_factory(factory, code)
    name, ref = split_ref(model)
    registry = Registry(open_existing_store(store))
    source = registry.resolve(name, ref)
    recipe = source.manifest.recipe.get("activations") or {}
    images = None
    if calibration is not None:
        images = RangeImages(
            data=calibration,
            samples=samples,
            batch_size=32,
            observer="percentile" if recipe.get("observer") == "sigma" else recipe.get("observer", "percentile"),
            percentile=recipe.get("percentile", 99.99),
        )
    with scratch("export") as folder:
        names = None if labels is None else labels_of_file(labels, folder, where=f"--labels {labels}")
    exported = export_published(registry, source, engine, images=images, labels=names, tags=tuple(tag or ()))
    published, record = exported.published, exported.engine
    more_bytes = record.graph.size_bytes + record.layout.size_bytes
    if as_json:
        document = {"name": name, "version": published.version, "digest": published.digest, "engine": engine}
        print_json(document | {"bytes": more_bytes, "activations": record.activations, "created": published.created})
        return
    kind = "weights and activations" if record.activations else "weights"
    typer.echo(
        f"{name} version {published.version}: version {source.version} for {engine}, {kind} quantized, "
        f"{size(more_bytes)} more."
    )
