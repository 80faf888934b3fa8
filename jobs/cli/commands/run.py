"""The command ``run``: photographs to answers, on an inference engine, from what a device pulled."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cli.options import DEFAULT_CACHE, Cache, Engine, Json, mode_of, print_json
from storage.wording import size

if TYPE_CHECKING:
    from nestquant.engines.onnx import Session


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: nestquant run mobilenet photo.jpg --level part --cache /var/lib/models")(run)


def run(
    model: Annotated[str, typer.Argument(metavar="NAME", help="A model in the device's folder.")],
    photographs: Annotated[
        list[Path], typer.Argument(metavar="PHOTO...", help="JPEG, PNG and what else Pillow reads.")
    ],
    *,
    cache: Cache = DEFAULT_CACHE,
    level: Annotated[
        str | None,
        typer.Option("--level", metavar="part|full|N", help="0 is part-bit; by default the highest that is here."),
    ] = None,
    engine: Annotated[Engine, typer.Option("--engine", help="onnx is ONNX Runtime.")] = "onnx",
    top: Annotated[int, typer.Option("--top", min=1, help="So many classes a photograph.")] = 5,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="Names of the classes, one a line, in the place of the version's own."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of the engine; a core each by default.")
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Answer each so often, for the latency.")] = 1,
    as_json: Json = False,
) -> None:
    """Answer photographs by a model that was pulled; needs an engine, and neither torch nor a network."""
    session = _open(model, cache, level, threads)
    names = session.labels() if labels is None else _labels(labels)
    source = session.manifest.name if labels is None else "--labels"
    milliseconds: list[float] = []
    answers = [
        _answer(session, path, names, source, top=top, repeat=repeat, milliseconds=milliseconds) for path in photographs
    ]
    document: dict[str, Any] = {
        "name": model,
        "version": session.manifest.version,
        "engine": engine,
        "level": session.level,
        "levels": session.manifest.level_count(),
        "median_ms": sorted(milliseconds)[len(milliseconds) // 2],
        "least_ms": min(milliseconds),
        "resident_bytes": _resident_bytes(),
        "photographs": answers,
    }
    if as_json:
        print_json(document)
        return
    for answer in answers:
        typer.echo(answer["photograph"])
        for one in answer["top"]:
            typer.echo(f"  {one['probability']:6.1%}  {one['label']}")
    count = session.manifest.level_count()
    typer.echo(
        f"{model} version {session.manifest.version}, {mode_of(session.level, count)}, {engine}: "
        f"{document['median_ms']:.1f} ms a photograph (median of {len(milliseconds)}), "
        f"{size(document['resident_bytes'])} resident."
    )


def _open(model: str, cache: Path, level: str | None, threads: int | None) -> Session:
    from nestquant.engines.errors import NoEngine
    from storage.device import Device

    try:
        from nestquant.engines.onnx import Session
    except ImportError as error:
        raise NoEngine(
            f"no engine is installed here ({error.name} is not there); pip install 'nestquant-service[onnx]'."
        ) from error
    device = Device(cache)
    number = None if level is None else _level(level, device.manifest(model).level_count())
    return Session(device, model, level=number, threads=threads)


def _level(word: str, count: int) -> int:
    if word in ("part", "full"):
        return 0 if word == "part" else count - 1
    if not word.isdecimal():
        raise typer.BadParameter(f"--level is {word!r}; expected part, full or a number from 0 to {count - 1}.")
    return int(word)


def _labels(path: Path) -> tuple[str, ...]:
    from nestquant.engines.errors import EngineError
    from storage.class_labels import MAX_LABELS_BYTES, parse_labels
    from storage.files import open_regular

    try:
        with open_regular(path) as file:
            return parse_labels(file.read(MAX_LABELS_BYTES + 1))
    except (OSError, ValueError) as error:
        raise EngineError(f"--labels {path}: {getattr(error, 'strerror', None) or error}.") from error


def _answer(
    session: Session,
    path: Path,
    names: tuple[str, ...] | None,
    source: str,
    *,
    top: int,
    repeat: int,
    milliseconds: list[float],
) -> dict[str, Any]:
    import numpy as np

    from nestquant.engines.errors import EngineError
    from nestquant.engines.images import photo_input

    inputs = photo_input(path, session.preprocessing)[None]
    for _ in range(repeat):
        begin = time.perf_counter()
        logits = session.run(inputs).logits
        milliseconds.append(1000 * (time.perf_counter() - begin))
    if logits.ndim != 2:
        raise EngineError(f"{session.manifest.name} gives {list(logits.shape)}, which is no class for each photograph.")
    if names is not None and len(names) != logits.shape[1]:
        raise EngineError(
            f"{source} has {len(names)} names for {logits.shape[1]} classes; give a name for each by --labels."
        )
    powers = np.exp(logits[0].astype(np.float64) - logits.max())
    chosen = np.argsort(-powers, kind="stable")[:top]
    classes = [
        {
            "class": int(index),
            "label": f"class {index}" if names is None else names[index],
            "probability": float(powers[index] / powers.sum()),
        }
        for index in chosen
    ]
    return {"photograph": str(path), "top": classes}


def _resident_bytes() -> int:
    """Return what the process holds in memory now (proc(5), statm)."""
    import os

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
