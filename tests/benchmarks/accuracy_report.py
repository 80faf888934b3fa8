"""From ``docs/results/accuracy.json`` to the tables that people read, beside the published implementation's figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).with_name("published.json")
MODES = ("full", "full_activations", "part", "part_activations")


def write_markdown(results: Path) -> None:
    """Write ``accuracy.md`` beside the results and print every cell that lies below the published figure."""
    everything = json.loads(results.read_text())
    write_recipes(everything, results.with_name("recipes.md"))
    document = complete(everything)
    published = _published()
    low = [fault for row in document["rows"] for fault in _below(row, published)]
    lines = [
        "# Top-1 of the test data's models at every nesting",
        "",
        f"Real jobs, measured on what was pulled back from the store: {document['samples']} calibration images, "
        f"observer `{document['observer']}`, 8-bit activations (the first layer's input stays float). Each cell: "
        "weights only / with 8-bit activations, percent; *published*: the published implementation on the same images, "
        "its own activation settings. SqueezeNet's published figures are of the first 300 "
        "images, so ours stand on those and on all 1,300. Written by `make tables`.",
        "",
        *table(document),
        "",
        "## Bytes",
        "",
        "`bits at rest`: all shards, headers and scales included, for each quantized weight; `integers`: their "
        "payloads alone.",
        "",
        *_bytes_table(document),
        "",
        "## Held against the published figures",
        "",
        *(low or ["No cell lies below the published figure by more than two standard errors of the difference."]),
    ]
    results.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(low) if low else lines[-1])


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of the published method with one nesting whose measurement was not broken off."""
    rows = [row for row in document["rows"] if row.get("recipe", "paper") == "paper"]
    return {**document, "rows": [row for row in rows if set(row["measured"]) == set(MODES)]}


def table(document: dict[str, Any]) -> list[str]:
    """Return the accuracy table's lines."""
    published = _published()
    lines = [
        "| model, float top-1 ± its error | nesting | full-bit | published | part-bit | published | bits at rest |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    seen = None
    for row in document["rows"]:
        name, label = row["model"], _label(row)
        float_count = document["float_top1"][name]
        share = float_count["correct"] / float_count["total"]
        error = 100 * math.sqrt(share * (1 - share) / float_count["total"])
        first = "" if name == seen else f"{name}, {100 * share:.1f} ± {error:.1f}"
        seen = name
        theirs = published.get(name, {"rows": {}})["rows"].get(label)
        cells = [first, label.replace("|", "\\|")]
        for mode in ("full", "part"):
            cells.append(f"{_top1(row, mode):.1f} / {_top1(row, f'{mode}_activations'):.1f}")
            cells.append("" if theirs is None else f"{theirs[mode]:.1f} / {theirs[f'{mode}_activations']:.1f}")
        cells.append(f"{8 * sum(row['level_bytes']) / row['weights']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


RECIPES = {"paper": "paper", "data_free": "data-free", "calibrated": "calibrated"}


def write_recipes(document: dict[str, Any], path: Path) -> None:
    """Write the table of all recipes, and every cell of ``calibrated`` that misses the bars of ``docs/accuracy.md``."""
    lines = [
        "# Top-1 by recipe",
        "",
        "Percent, weights only / with 8-bit activations, measured on what was pulled back from the store. Bits at rest "
        "are those of `calibrated`, scales and biases included. Written by `make tables`.",
        "",
        *recipes_table(document),
    ]
    path.write_text("\n".join(lines) + "\n")


def recipes_table(document: dict[str, Any]) -> list[str]:
    """Return a line for each level of each nesting: top-1 by recipe."""
    lines = [
        f"| model, float top-1 | nesting | runs at | {' | '.join(RECIPES.values())} | bits at rest |",
        "| --- | --- | --- |" + " ---: |" * (len(RECIPES) + 1),
    ]
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in document["rows"]:
        if "first" not in row["model"]:
            found.setdefault((row["model"], _label(row)), {})[row.get("recipe", "paper")] = row
    seen = None
    for (model, label), rows in found.items():
        if not rows.keys() - {"paper"}:
            continue
        bits = label.split("|")
        names = ["full", *(["middle"] if len(bits) == 3 else []), "part"]
        for name, width in zip(names, bits, strict=True):
            float_count = document["float_top1"][model]
            share = float_count["correct"] / float_count["total"]
            error = 100 * math.sqrt(share * (1 - share) / float_count["total"])
            cells = ["" if model == seen else f"{model}, {100 * share:.1f} ± {error:.1f}"]
            cells += [label.replace("|", "\\|") if name == "full" else "", f"{width} bits"]
            seen = model
            for recipe in RECIPES:
                row = rows.get(recipe)
                there = row is not None and name in row["measured"]
                cells.append(f"{_top1(row, name):.1f} / {_top1(row, f'{name}_activations'):.1f}" if there else "")  # type: ignore[arg-type]
            ours = rows.get("calibrated")
            rest = "" if ours is None or name != "full" else f"{8 * sum(ours['level_bytes']) / ours['weights']:.2f}"
            lines.append(f"| {' | '.join([*cells, rest])} |")
    return lines


def summary(document: dict[str, Any]) -> list[str]:
    """Return the README's table: part-bit by recipe, full-bit of ``calibrated``, weights only."""
    rows = {(row["model"], _label(row), row.get("recipe", "paper")): row for row in document["rows"]}
    published = _published()
    lines = [
        f"| model, float top-1 | nesting | part-bit: published | {' | '.join(f'`{name}`' for name in RECIPES)} | "
        "full-bit: `calibrated` |",
        "| --- | --- |" + " ---: |" * (len(RECIPES) + 2),
    ]
    for model, count in document["float_top1"].items():
        if "first" in model:
            continue
        first = f"{model}, {100 * count['correct'] / count['total']:.1f}"
        theirs = published.get(model) or published.get(f"{model}, first 300 images", {"rows": {}})
        for label in ("8|6", "8|4", "8|3"):
            of_recipe = [rows.get((model, label, recipe)) for recipe in RECIPES]
            given = theirs["rows"].get(label)
            cells = [first, label.replace("|", "\\|"), "" if given is None else f"{given['part']:.1f}"]
            cells += ["" if row is None else f"{_top1(row, 'part'):.1f}" for row in of_recipe]
            ours = of_recipe[-1]
            cells.append("" if ours is None else f"{_top1(ours, 'full'):.1f}")
            lines.append(f"| {' | '.join(cells)} |")
            first = ""
    return lines


def _published() -> dict[str, Any]:
    models: dict[str, Any] = json.loads(PUBLISHED.read_text())["models"]
    return models


def _bytes_table(document: dict[str, Any]) -> list[str]:
    lines = [
        "| model | nesting | weights | float, KB | base, KB | high, KB | low, KB | bits at rest | integers |",
        "| --- | --- |" + " ---: |" * 7,
    ]
    for row in document["rows"]:
        if "first" in row["model"]:  # the same job, measured on fewer images
            continue
        high, low = (size / 1000 for size in row["level_bytes"])
        cells = [
            row["model"],
            _label(row).replace("|", "\\|"),
            f"{row['weights']:,}",
            f"{row['float_bytes'] / 1000:,.0f}",
            f"{row['base_bytes'] / 1000:.0f}",
            f"{high:.0f}",
            f"{low:.0f}",
            f"{8 * sum(row['level_bytes']) / row['weights']:.2f}",
            f"{8 * sum(row['integer_bytes']) / row['weights']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _below(row: dict[str, Any], published: dict[str, Any]) -> list[str]:
    """Return a line for each mode that lies below the published top-1 by more than two standard errors.

    The error is that of two independent samples: too large, as the images are the same, but which of them the
    published implementation got right is not known.
    """
    model = published.get(row["model"])
    if model is None:
        return []
    total = row["measured"]["part"]["total"]
    faults = []
    for mode in MODES:
        theirs, ours = model["rows"][_label(row)][mode], _top1(row, mode)
        error = math.hypot(_error(ours, total), _error(theirs, model["images"]))
        if ours - theirs < -2 * error:
            faults.append(
                f"- {row['model']} {_label(row)} {mode}: {ours:.2f}, published {theirs:.2f}: {ours - theirs:+.2f} "
                f"points, standard error {error:.2f}"
            )
    return faults


def _error(top1: float, total: int) -> float:
    return math.sqrt(max(top1 * (100 - top1), 0) / total)


def _top1(row: dict[str, Any], mode: str) -> float:
    count = row["measured"][mode]
    top1: float = 100 * count["correct"] / count["total"]
    return top1


def _label(row: dict[str, Any]) -> str:
    return "|".join(str(bits) for bits in row["bits"])
