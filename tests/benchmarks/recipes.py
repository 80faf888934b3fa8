"""Top-1 of a model of the test data by recipe: ``python -m tests.benchmarks.recipes MODEL BITS [--recipe R] ...``.

One real job into a local store, pulled back and measured, weights only; the row joins ``docs/results/recipes.json``.
``BITS`` as in ``8,4``; ``--limit`` measures the first images alone, which the row says.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from jobs.driver import run_job
from jobs.spec import parse_spec
from jobs.synthesis import SAMPLES
from tests.benchmarks.accuracy_table import DATA, MODELS, ROOT, Known
from workers.executor import InProcessExecutor

RESULTS = ROOT / "docs" / "results" / "recipes.json"


def document(model: Known, bits: list[int], recipe: str, samples: int, limit: int | None) -> dict[str, Any]:
    """Return the job's spec, all but its store."""
    return {
        "name": model.name,
        "model": {
            "library": model.library,
            "arch": model.arch or model.name,
            "kwargs": model.kwargs or {},
            "checkpoint": str(DATA / "weights" / f"{model.name}.safetensors"),
        },
        "quantize": {"bits": bits, "recipe": recipe},
        "preprocess": model.preprocess,
        "calibration": None
        if recipe == "data_free"
        else {"data": str(DATA / "images" / model.calibration), "samples": samples},
        "evaluate": {"data": str(DATA / "images" / model.images), "limit": limit},
    }


def measured(spec: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a store of its own and return what it found."""
    with tempfile.TemporaryDirectory(prefix="nestquant-recipes-") as folder:
        job = parse_spec(spec | {"store": {"uri": str(Path(folder) / "store")}}, where="recipes")
        result = run_job(job, InProcessExecutor())
    return {
        "model": result.name,
        "bits": list(result.bits),
        "recipe": job.quantize.recipe,
        "samples": SAMPLES if spec["calibration"] is None else spec["calibration"]["samples"],
        "correct": {one.mode: one.correct for one in result.measured},
        "images": result.measured[0].total,
        "level_bytes": list(result.sizes.level_bytes),
        "stored_bits_per_weight": result.stored_bits_per_weight,
        "seconds": {name: round(seconds, 1) for name, seconds in result.seconds.items()},
        "notes": list(result.notes),
    }


def main() -> None:
    """Measure one row and keep it in the place of an older one of the same kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted({model.name for model in MODELS}))
    parser.add_argument("bits")
    parser.add_argument("--recipe", default="calibrated", choices=("paper", "calibrated", "data_free"))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = next(model for model in MODELS if model.name == arguments.model)
    bits = [int(width) for width in arguments.bits.split(",")]
    row = measured(document(model, bits, arguments.recipe, arguments.samples, arguments.limit))
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kind = ("model", "bits", "recipe", "samples", "images")
    rows = [other for other in rows if any(other[key] != row[key] for key in kind)] + [row]
    rows.sort(key=lambda other: [str(other[key]) for key in kind])
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
