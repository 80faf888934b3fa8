"""The README's tables from the results of both benchmarks: ``python -m tests.benchmarks.readme_tables``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks import accuracy_report, size_table

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def main() -> None:
    """Write ``README-tables.md``, ``accuracy.md`` and ``sizes.md`` from the JSON beside them; nothing is measured."""
    accuracy_report.write_markdown(RESULTS / "accuracy.json")
    sizes = size_table.Results.model_validate_json((RESULTS / "sizes.json").read_text())
    size_table.write_markdown(sizes.rows)
    lines = [
        "**Top-1 on real networks.** Percent of the whole evaluation set, weights only, measured on what a device "
        "pulled back from the store. *published*: the published implementation on the same images (SqueezeNet: on 300 "
        "of them).",
        "",
        *accuracy_report.summary(json.loads((RESULTS / "accuracy.json").read_text())),
        "",
        "**Bytes.** Architectures with random weights; MB are 10^6 bytes, float parameters and scales included. "
        "*traffic saved*: our upgrade against one of two separate models out and the other in. The paper reports 78.1% "
        "for ResNet-101, 8 over 6, packed (its weights alone give 1 - 3/14 = 78.6%); entropy coding adds the rest.",
        "",
        *_sizes(sizes.rows),
    ]
    (RESULTS / "README-tables.md").write_text("\n".join(lines) + "\n")


def _sizes(rows: list[size_table.Row]) -> list[str]:
    lines = [
        "| model | nesting | float | INT8 | INT8 + INTh | ours | upgrade | traffic saved: packed | as stored |",
        "| --- | --- |" + " ---: |" * 7,
    ]
    for row in rows:
        sizes = (row.float_bytes, row.int8_bytes, row.apart_bytes, row.stored_bytes, row.level_bytes[1])
        cells = [
            row.model,
            f"8\\|{row.bits[1]}",
            *(f"{size / 1e6:.1f}" for size in sizes),
            f"{100 * row.saved_packed:.1f}%",
            f"{100 * row.saved:.1f}%",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
