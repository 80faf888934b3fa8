"""From ``docs/results/peers.json`` and our rows in ``accuracy.json`` to the table of ours beside other quantizers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
NESTING = [8, 4]
OURS = {4: "part-bit", 8: "full-bit"}
INTRODUCTION = """# Ours beside other quantizers, INT4 and INT8 weights

Weights only, one scale for each output channel, the same bits in every layer, the first and the last included.
Each peer quantizes once for each width; ours is one model, {nesting}: its part-bit mode stands beside the
peers' INT4, its full-bit mode beside their INT8. Calibration on the separate calibration images: the peers on the
first {samples} of them, ours on 1,000 spread over the set (SqueezeNet: 500), which helps it. The same images are
evaluated for all, the whole evaluation sets, counted by our own `workers.evaluate`, with torch {torch}. In every
peer's environment the float network gave the very count of right answers that the test data's README states: asserted.
That every weight lies on a grid of the width asked for is read off the tensors that reach each convolution and product
in a forward pass.
± is one standard error of a top-1; the difference of two models on the same images has a smaller one.

`make peers` measures what is missing and writes this; `python -m tests.benchmarks.peers --table` only writes it,
from `peers.json` and our rows in `accuracy.json`. Nothing here chose a setting of ours.
"""
# Found by hand when the peers were chosen, with the versions pinned beside this file.
NOTES = (
    "- torchao quantizes convolutions too, with a scale for each output channel and place of the kernel (nine times as "
    "many for 3x3): finer than a channel, so that its rows stand apart.",
    "- nncf's `compress_weights` at INT4 asks for 4 bits in products and embeddings alone, so its source says; "
    "the first eight of ResNet-20 hold up to 110 values a channel at either width. At INT8 that fits the width, but "
    "the values are not evenly spaced to 2e-3 of a step; why was not looked into.",
    "- amd-quark 0.13 installs, but `import quark.torch` ends in `ModuleNotFoundError: No module named "
    "'transformers'`, which its metadata does not ask for; not taken further.",
    "- Not run for want of time on a busy machine: Brevitas' learned rounding (it also needs `accelerate`), AIMET's "
    "AdaRound (`adaround`) and model-compression-toolkit's `gradient`. The two latter stand in the scripts, "
    "untried to the end.",
    "- model-compression-toolkit's default for `gradient`, layers weighted by each image's Hessian, was broken off on "
    "ResNet-20 after minutes on the first of its eight batches; the script switches the weighting off.",
    "- pytorchcv names its classifier `output`, which model-compression-toolkit takes for the end of the traced graph "
    "(`x is among the graph inputs; however, it cannot be removed without providing a new input`): the network is "
    "wrapped in a `Sequential` for it.",
    "- The network that AIMET's AdaRound returns is rounded softly: 20 of ResNet-20's 22 weights lay on no 4-bit grid. "
    "The script goes on as its documentation does, with the ranges that AdaRound wrote.",
)


def write_table(results: dict[str, Any], floats: dict[str, tuple[int, int]], recipe: str) -> None:
    """Write ``peers.md`` beside the results and print how many comparisons fall below the best peer."""
    rows = results["rows"]
    whole = [row for row in rows if "error" not in row and row["weights_on_grid"] == row["weights"]]
    ours = our_rows(floats, recipe)
    versions = sorted({row["torch"].split("+")[0] for row in whole})
    samples = sorted({row["samples"] for row in whole})
    nesting = f"{NESTING[0]} over {NESTING[1]}, recipe `{recipe}`"
    lines = [
        INTRODUCTION.format(nesting=nesting, samples="/".join(map(str, samples)), torch="/".join(versions)),
        *_summary(whole, ours, floats),
        "",
        "## Every row",
        "",
        *_every_row(whole, ours, floats),
        "",
        "Seconds and peak memory are the quantizer's alone, on one thread of a machine that other work kept busy (load "
        "average at the end of the row; two cores): an upper bound. Memory includes Python, torch and the "
        "peer itself.",
        "",
        "## On no grid of the width asked for, channel by channel",
        "",
        *_short(rows, whole),
        "",
        "## Notes",
        "",
        *NOTES,
        "",
        "## Settings",
        "",
        *_settings(rows),
    ]
    (RESULTS / "peers.md").write_text("\n".join(lines) + "\n")


def our_rows(floats: dict[str, tuple[int, int]], recipe: str) -> dict[str, dict[str, Any]]:
    """Return our row by model: the nesting and recipe compared here, on all of the evaluation images."""
    document = json.loads((RESULTS / "accuracy.json").read_text())
    found = {}
    for row in document["rows"]:
        name, measured = row["model"], row["measured"]
        if row["bits"] != NESTING or row.get("recipe") != recipe or name not in floats:
            continue
        ours = document["float_top1"][name]
        assert (ours["correct"], ours["total"], measured["part"]["total"]) == (*floats[name], floats[name][1]), name
        correct = {"part-bit": measured["part"]["correct"], "full-bit": measured["full"]["correct"]}
        found[name] = {"model": name, "recipe": recipe, "correct": correct, "seconds": row["stage_seconds"]}
    return found


def _percent(correct: int, images: int) -> str:
    share = correct / images
    return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / images):.1f}"


def _best(rows: list[dict[str, Any]], model: str, bits: int) -> dict[str, Any] | None:
    found = [row for row in rows if (row["model"], row["bits"]) == (model, bits)]
    return max(found, key=lambda row: row["correct"], default=None)


def _summary(
    rows: list[dict[str, Any]], ours: dict[str, dict[str, Any]], floats: dict[str, tuple[int, int]]
) -> list[str]:
    lines = [
        "| network, float | width | ours | best peer | which | ours less the best peer, points |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        correct, images = floats[model]
        title = f"{model}, {100 * correct / images:.1f}"
        for bits, mode in OURS.items():
            best = _best(rows, model, bits)
            our = ours[model]["correct"][mode] if model in ours else None
            cells = [
                "not measured yet" if our is None else _percent(our, images),
                "-" if best is None else _percent(best["correct"], images),
                "-" if best is None else f"{best['peer']} `{best['recipe']}`",
                "-" if our is None or best is None else f"{100 * (our - best['correct']) / images:+.1f}",
            ]
            lines.append(f"| {title} | INT{bits} | {' | '.join(cells)} |")
            title = ""
    return lines


def _every_row(
    rows: list[dict[str, Any]], ours: dict[str, dict[str, Any]], floats: dict[str, tuple[int, int]]
) -> list[str]:
    lines = [
        "| network | width | quantizer | recipe | top-1 | seconds | peak memory, MiB | load |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        images = floats[model][1]
        for bits, mode in OURS.items():
            if model in ours:
                our = ours[model]
                seconds = sum(our["seconds"].get(stage, 0) for stage in ("calibrate", "reconstruct", "quantize"))
                cells = f"{_percent(our['correct'][mode], images)} | {seconds:.0f} | - | -"
                who = f"ours, {mode} of {NESTING[0]} over {NESTING[1]} | {our['recipe']}"
                lines.append(f"| {model} | INT{bits} | {who} | {cells} |")
            lines += [
                f"| {model} | INT{bits} | {row['peer']} {row['version']} | {row['recipe']} | "
                f"{_percent(row['correct'], images)} | {row['seconds']:.0f} | {row['peak_rss_bytes'] / 2**20:.0f} | "
                f"{row['load_average']} |"
                for row in rows
                if (row["model"], row["bits"]) == (model, bits)
            ]
    return lines


def _short(rows: list[dict[str, Any]], whole: list[dict[str, Any]]) -> list[str]:
    """Return a line for each row that failed or left weights off the grid, those of one reason together."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row in whole:
            continue
        name = f"{row['peer']} {row['version']} `{row['recipe']}` INT{row['bits']}"
        said = row.get("error") or (
            f"{row['products'] - row['products_on_grid']} of {row['products']} convolutions and products have weights "
            f"on no even grid of {2 ** row['bits']} values a channel (top-1 {_percent(row['correct'], row['images'])})"
        )
        reasons.setdefault(f"{name}: {said}", []).append(row["model"])
    return [f"- {', '.join(models)}: {reason}" for reason, models in reasons.items()] or ["Nothing."]


def _settings(rows: list[dict[str, Any]]) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for row in rows:
        settings = ", ".join(f"{key} {value}" for key, value in row["settings"].items()) or "its defaults"
        models = kinds.setdefault(f"{row['peer']} {row['version']} `{row['recipe']}`: {settings}", [])
        if row["model"] not in models:
            models.append(row["model"])
    return [f"- {kind} ({', '.join(models)})" for kind, models in sorted(kinds.items())]
