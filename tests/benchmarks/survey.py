"""Which weights of an architecture the recipes that use data solve: ``python -m tests.benchmarks.sweep --survey``.

No job and no quantization: the network runs once, in two lanes on one image of noise, as a job begins
(``workers.lanes.Lanes.probe``). A row of ``docs/results/survey.jsonl`` says how many weights have no data, by reason;
``survey.md`` beside it is made of all rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

FEW = 0.01
"""The share of weights without data that needs no reason."""


@dataclass(frozen=True)
class Survey:
    """What came of one architecture: how many weights are quantized, and how many of them have no data, by reason.

    ``failure``: one line, or None.
    """

    library: str
    arch: str
    family: str
    parameters: int
    weights: int = 0
    without: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int = 0
    failure: str | None = None

    @property
    def share(self) -> float:
        """Return the share of the quantized weights that have no data."""
        return sum(self.without.values()) / max(1, self.weights)


def survey(library: str, arch: str) -> dict[str, Any]:
    """Return the fields of a row: what ``Lanes.probe`` says of the network with random weights."""
    import math

    import torch

    from nestquant.surgery import find_layers
    from workers.inputs import networks
    from workers.lanes import Lanes

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = networks.build(library, arch)
    preprocessing = networks.default_preprocessing(library, network)
    weights = {site.name: math.prod(site.shape) for site in find_layers(network).layers}
    noise = torch.randn(1, *preprocessing.input_shape, generator=torch.Generator().manual_seed(0))
    probed = Lanes(network, list(weights), 1).probe(noise, f"{library} {arch}")
    without: Counter[str] = Counter()
    for name, reason in {**probed.unsplit, **probed.unreadable}.items():
        without[reason] += weights[name]
    return {"weights": sum(weights.values()), "without": dict(without)}


def table(rows: Iterable[Survey]) -> str:
    """Return the page: counts, architectures with more than a few weights without data, failures, all others."""
    ordered = sorted(rows, key=lambda row: (row.library, row.family, row.parameters))
    ran = [row for row in ordered if row.failure is None]
    many = sorted((row for row in ran if row.share >= FEW), key=lambda row: -row.share)
    whole = sum(1 for row in ran if not row.without)
    lines = [
        "# Weights without data",
        "",
        "Share of an architecture's quantized weights that `calibrated` and `data_free` round without data, by reason:",
        "one run on noise, random weights (`make sweep`). How inputs are read:",
        "[ADR 25](../adr/0025-inputs-read-at-the-call.md).",
        "",
        f"{len(ordered)} architectures: {len(ran)} ran; in {whole} every weight has data, in "
        f"{len(ran) - whole - len(many)} more all but {100 * FEW:.0f}%, in {len(many)} not.",
        "",
        f"| {100 * FEW:.0f}% and more without data | weights, M | without | why |",
        "| --- | ---: | ---: | --- |",
        *(_line(row) for row in many),
        "",
        "| did not run | parameters, M | why |",
        "| --- | ---: | --- |",
        *(
            f"| {row.library}/{row.arch} | {row.parameters / 1e6:.2f} | {_cell(row.failure or '')} |"
            for row in ordered
            if row.failure is not None
        ),
        "",
        "| all others | weights, M | without | why |",
        "| --- | ---: | ---: | --- |",
        *(_line(row) for row in ran if row.share < FEW),
    ]
    return "\n".join([*lines, ""])


def _line(row: Survey) -> str:
    reasons = "; ".join(
        f"{reason} ({100 * count / max(1, row.weights):.1f}%)" for reason, count in sorted(row.without.items())
    )
    return f"| {row.library}/{row.arch} | {row.weights / 1e6:.2f} | {100 * row.share:.2f}% | {_cell(reasons)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:300]
