"""A zoo's results as one static HTML file that asks the network for nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jobs.result import LayerQuality
from jobs.zoo.row import ZooRow

_TEMPLATE = "report.html"


def render(title: str, rows: Sequence[ZooRow]) -> str:
    """Return the page: table, accuracy against bytes, noise and damage of each layer, drawn by its own script."""
    template = resources.files("jobs.zoo").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    # In a script element only "</" and "<!--" end or bend the text; escaping every "<" keeps the JSON as it is.
    data = json.dumps([_document(row) for row in rows], allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("{{title}}", html.escape(title)).replace("{{rows}}", data)


def _document(row: ZooRow) -> dict[str, Any]:
    document = row.cells()
    document["layers"] = [_layer(layer) for layer in row.layers]
    return document


def _layer(layer: LayerQuality) -> list[Any]:
    damage = layer.damage
    measured = None if damage is None else [damage.divergence, damage.same, damage.drop, damage.images, damage.noise]
    return [layer.name, layer.weights, list(layer.bits), list(layer.sqnr_db), measured]
