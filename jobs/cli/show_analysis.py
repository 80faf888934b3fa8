"""The table of ``nestquant analyze``."""

from __future__ import annotations

from jobs.analysis import Analysis
from jobs.cli.options import console as new_console
from jobs.cli.tables import Column, WholeTable
from jobs.result import LayerQuality
from storage.wording import size

_FIGURES = ("bits", "weights", "SQNR dB", "flips %", "bytes", "KL nats", "same %", "top-1 lost")


def print_analysis(analysis: Analysis) -> None:
    """Print a row for each layer and width, and what the figures rest on."""
    out = new_console()
    version = "" if analysis.version is None else f" version {analysis.version}"
    title = f"{analysis.name}{version}: {analysis.library} {analysis.arch}"
    columns = [Column("layer"), *(Column(name, figures=True) for name in _FIGURES)]
    table = WholeTable(columns, title=title, caption=_caption(analysis))
    for layer in analysis.layers:
        table.add_row(*_cells(layer))
    out.print(table)
    for name, reason in analysis.skipped_images[:5]:
        out.print(f"skipped image {name}: {reason}", highlight=False, markup=False)


def _cells(layer: LayerQuality) -> tuple[str, ...]:
    damage = layer.damage
    figures = ("", "", "")
    if damage is not None:
        drop = "" if damage.drop is None else f"{damage.drop:.2f}"
        figures = (f"{damage.divergence:.5f}", f"{damage.same:.1f}", drop)
    return (
        layer.name,
        "|".join(map(str, layer.bits)),
        f"{layer.weights:,}",
        " ".join("exact" if value is None else f"{value:.1f}" for value in layer.sqnr_db),
        " ".join(f"{100 * count / layer.weights:.1f}" for count in layer.flips),
        " + ".join(map(size, layer.level_bytes)),
        *figures,
    )


def _caption(analysis: Analysis) -> str:
    order = "SQNR, flips and bytes: part-bit first, full-bit last"
    if analysis.version is None:
        order += "; bytes of a high shard that holds the layer alone"
    measured = [layer.damage for layer in analysis.layers if layer.damage is not None]
    if not measured:
        basis = (
            "KL, same answers and top-1 were not measured: 'analysis' in the spec does, or 'nestquant analyze SPEC'."
        )
    else:
        source = "images of noise" if measured[0].noise else "calibration images"
        basis = f"KL, same answers and top-1: the layer alone part-bit, on {measured[0].images} {source}."
    return f"{order}.\n{basis}"
