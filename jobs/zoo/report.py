"""A zoo's results as a page: alone, as one file that asks the network for nothing, or among those of a catalogue."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jobs.pages.render import render_single_page
from jobs.result import LayerQuality
from jobs.zoo.row import ZooRow

_LONG_DIGEST = re.compile(r"(sha256:[0-9a-f]{8})[0-9a-f]{56}")


def render(title: str, rows: Sequence[ZooRow]) -> str:
    """Return the page: table, accuracy against bytes, noise and damage of each layer."""
    return render_single_page("zoo.html", charts=True, back=False, **page_content(title, rows))


def page_content(title: str, rows: Sequence[ZooRow]) -> dict[str, Any]:
    """Return what the template is filled with, without where the page stands."""
    lines = [_line(row) for row in rows]
    return {
        "zoo": title,
        "rows": lines,
        "done": sum(row.status == "done" for row in rows),
        "below": sum(row.status == "below gate" for row in rows),
        "failed": sum(row.status == "failed" for row in rows),
        "tools": lines[0]["tool_versions"] if lines else "",
        "points": [_point(line) for line in lines if None not in (line["part"], line["full"], line["full_bytes"])],
        "layers": [
            {"title": f"{row.model} · {row.recipe}", "layers": [_layer(layer) for layer in row.layers]}
            for row in rows
            if row.layers
        ],
    }


def _line(row: ZooRow) -> dict[str, Any]:
    """Return a row's cells, and what follows from them: what a device fetches, and the top-1 that it reaches."""
    cells = row.cells()
    for mode in ("full", "part"):
        column = f"top1_{mode}_activations" if cells[f"top1_{mode}_activations"] is not None else f"top1_{mode}"
        cells |= {mode: cells[column], f"{mode}_err": cells[f"{column}_err"]}
    base, high, low = row.base_bytes, row.high_bytes, row.low_bytes
    part = None if base is None or high is None else base + high
    return cells | {
        "float": row.top1_float,
        "float_err": row.top1_float_err,
        "part_bytes": part,
        "full_bytes": None if part is None or low is None else part + low,
        "revision": _LONG_DIGEST.sub(r"\1…", row.revision),
        "linked": row.version is not None,
    }


def _point(line: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": line["name"],
        "short": line["model"],
        "float": line["float"],
        "part": [line["part_bytes"], line["part"], line["part_err"] or 0],
        "full": [line["full_bytes"], line["full"], line["full_err"] or 0],
    }


def _layer(layer: LayerQuality) -> dict[str, Any]:
    return {
        "name": layer.name,
        "weights": layer.weights,
        "bits": list(layer.bits),
        "sqnr": list(layer.sqnr_db),
        "damage": None if layer.damage is None else layer.damage.model_dump(),
    }
