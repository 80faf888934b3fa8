"""The networks of the test data through other, non-nested quantizers: ``python -m tests.benchmarks.peers [MODEL ...]``.

Each peer runs in an environment of its own (``make peers`` builds them) and is asked row by row in JSON
(`tests.benchmarks.peer_runs`): weights only, INT4 and INT8, the calibration and evaluation images and the preprocessing
of our own tables, top-1 by our own `workers.evaluate`. Rows stand in ``docs/results/peers.json``; what stands there is
not measured again. ``--table`` writes ``peers.md`` from it and from our rows in ``accuracy.json``, measuring nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.accuracy_table import DATA, MODELS, ROOT, SAMPLES, Known
from tests.benchmarks.peer_runs.names import ANSWER
from tests.benchmarks.peers_report import write_table
from workers.inputs.images import open_images

RESULTS = ROOT / "docs" / "results" / "peers.json"
ENVIRONMENTS = Path(os.environ.get("NESTQUANT_PEERS", ROOT / ".peers"))


@dataclass(frozen=True)
class Recipe:
    """A way of a peer's: ``settings`` for every network, ``small`` and ``large`` for those of 32 and 224 pixels."""

    name: str
    bits: tuple[int, ...]
    settings: dict[str, Any]
    small: dict[str, Any] = field(default_factory=dict)
    large: dict[str, Any] = field(default_factory=dict)

    def of(self, model: Known) -> dict[str, Any]:
        return self.settings | (self.small if model.preprocess["size"] == 32 else self.large)


@dataclass(frozen=True)
class Peer:
    """A quantizer: its distribution, its script in `tests.benchmarks.peer_runs`, and its recipes."""

    name: str
    script: str
    recipes: tuple[Recipe, ...]

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.name / "bin" / "python"


PEERS = (
    Peer(
        "brevitas",
        "brevitas_ptq",
        (
            Recipe("gptq", (4,), {"batch": 32, "grid": "sym", "range": "mse", "equalize": 20}),
            Recipe("gptq-asym", (4,), {"batch": 32, "grid": "asym", "range": "mse", "equalize": 20}),
            Recipe("gptq-plain", (4, 8), {"batch": 32, "grid": "asym", "range": "mse", "equalize": 0}),
        ),
    ),
    Peer(
        "model-compression-toolkit",
        "mct",
        (
            Recipe("ptq", (4, 8), {"batch": 32, "grid": "symmetric"}),
            Recipe("ptq-uniform", (4,), {"batch": 32, "grid": "uniform"}),
            Recipe("gradient", (4,), {"batch": 32, "grid": "symmetric"}, {"epochs": 20}, {"epochs": 5}),
        ),
    ),
    Peer(
        "aimet-torch",
        "aimet",
        (
            Recipe("ptq", (8,), {"batch": 32, "equalize": True, "range": "post_training_tf_enhanced"}),
            Recipe("seqmse", (4,), {"batch": 32, "equalize": True, "range": "min_max", "candidates": 20}),
            Recipe(
                "adaround",
                (4,),
                {"batch": 32, "equalize": True, "range": "post_training_tf_enhanced"},
                {"iterations": 500},
                {"iterations": 200},
            ),
        ),
    ),
    Peer("nncf", "nncf_ptq", (Recipe("compress_weights", (4, 8), {}),)),
    Peer("torchao", "torchao_ptq", (Recipe("intx", (4, 8), {}),)),
)


def published_floats() -> dict[str, tuple[int, int]]:
    """Return float top-1 as right answers and images by model, from the test data's own README."""
    rows = re.findall(r"^\| (\w+) \|.*?\((\d+)/(\d+)\)", (DATA / "README.md").read_text(), re.MULTILINE)
    return {name: (int(correct), int(images)) for name, correct, images in rows}


def decoded(source: Path) -> Path:
    """Return an npz of the same images and labels, pixels as decoded, made once."""
    if source.suffix == ".npz":
        return source
    target = ENVIRONMENTS / "images" / f"{source.stem}.npz"
    if not target.exists():
        images = open_images(source)
        pixels = np.stack([np.asarray(images.reader.load(index).convert("RGB")) for index in range(len(images))])
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial.npz")
        np.savez(partial, x=pixels, y=np.asarray(images.require_labels(), dtype=np.int64))
        partial.replace(target)
    return target


def task(model: Known, recipe: Recipe, bits: int, *, check_float: bool) -> dict[str, Any]:
    """Return what a script is asked (`tests.benchmarks.peer_runs.row.Task`)."""
    return {
        "model": model.name,
        "library": model.library,
        "arch": model.arch or model.name,
        "kwargs": model.kwargs or {},
        "checkpoint": str(DATA / "weights" / f"{model.name}.safetensors"),
        "preprocess": model.preprocess,
        "calibration": str(decoded(DATA / "images" / model.calibration)),
        "images": str(decoded(DATA / "images" / model.images)),
        "samples": SAMPLES,
        "evaluate_batch": 5 if model.preprocess["size"] > 32 else 50,
        "bits": bits,
        "recipe": recipe.name,
        "check_float": check_float,
        "settings": recipe.of(model),
    }


def load() -> dict[str, Any]:
    """Return the results: ``float`` by peer and model, ``rows``."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"float": {}, "rows": []}


def save(results: dict[str, Any]) -> None:
    """Write the results in the order of the models, then of the peers."""
    models, peers = [model.name for model in MODELS], [peer.name for peer in PEERS]
    results["rows"].sort(
        key=lambda row: (models.index(row["model"]), peers.index(row["peer"]), -row["bits"], row["recipe"])
    )
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(RESULTS)


def missing(
    results: dict[str, Any], peer: Peer, model: Known, names: list[str] | None = None, width: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the tasks of a peer and a network that have no row yet."""
    checked = model.name in results["float"].get(peer.name, {})
    standing = {
        (row["model"], row["peer"], row["recipe"], row["bits"], json.dumps(row["settings"], sort_keys=True))
        for row in results["rows"]
    }
    for recipe in peer.recipes:
        if names and recipe.name not in names:
            continue
        for bits in recipe.bits if width is None else {width}.intersection(recipe.bits):
            settings = json.dumps(recipe.of(model), sort_keys=True)
            if (model.name, peer.name, recipe.name, bits, settings) not in standing:
                yield task(model, recipe, bits, check_float=not checked)
                checked = True


def measure(peer: Peer, tasks: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Ask a peer's script for each task and yield it with its answer, as they come."""
    with tempfile.TemporaryDirectory(prefix="nestquant-peers-") as folder:
        asked = Path(folder) / "tasks.json"
        asked.write_text(json.dumps(tasks))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        command = [str(peer.python), "-m", f"tests.benchmarks.peer_runs.{peer.script}", str(asked)]
        waiting = list(tasks)
        with (
            (Path(folder) / "log").open("w+") as log,
            subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(ANSWER):
                    yield waiting.pop(0), json.loads(line.removeprefix(ANSWER))
            process.wait()
            log.seek(0)
            assert not waiting, f"{peer.name} left {len(waiting)} tasks undone:\n{log.read()[-2000:]}"


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="default: all")
    parser.add_argument("--peer", action="append", choices=[peer.name for peer in PEERS], help="default: all")
    parser.add_argument("--recipe", action="append", help="default: all of each peer's")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="default: both")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    parser.add_argument("--ours", default="calibrated", help="which of our recipes stands beside the peers")
    arguments = parser.parse_args()
    floats, models = published_floats(), {model.name: model for model in MODELS if model.limit is None}
    results = load()
    for model in [] if arguments.table else models.values():
        if arguments.models and model.name not in arguments.models:
            continue
        for peer in PEERS:
            if arguments.peer and peer.name not in arguments.peer:
                continue
            tasks = list(missing(results, peer, model, arguments.recipe, arguments.bits))
            for asked, answer in measure(peer, tasks) if tasks else ():
                row = {key: asked[key] for key in ("model", "recipe", "bits", "samples", "settings")}
                row = {"peer": peer.name} | row | answer
                results = load()  # another run may have written in the meantime
                if "float" in answer:
                    found = (row.pop("float"), answer["images"])
                    assert found == floats[model.name], f"{peer.name} {model.name}: float {found}"
                    results["float"].setdefault(peer.name, {})[model.name] = found[0]
                kind = ("peer", "model", "recipe", "bits", "settings")
                results["rows"] = [other for other in results["rows"] if any(other[k] != row[k] for k in kind)] + [row]
                save(results)
                print(json.dumps(row), flush=True)
    write_table(results, floats, arguments.ours)


if __name__ == "__main__":
    main()
