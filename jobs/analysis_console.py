"""The table of ``nestquant analyze``."""

from __future__ import annotations

from rich.table import Table

from jobs.analysis import Analysis
from jobs.commands.options import console as new_console
from jobs.commands.options import size
from jobs.result import LayerQuality


def print_analysis(analysis: Analysis) -> None:
    """Print a row for each layer and width, and what the figures rest on."""
    out = new_console()
    version = "" if analysis.version is None else f" version {analysis.version}"
    title = f"{analysis.name}{version}: {analysis.library} {analysis.arch}"
    table = Table("layer", "bits", title=title, caption=_caption(analysis), caption_justify="left")
    for name in ("weights", "SQNR dB, part to full", "flips %, part to full", "bytes by level", "KL nats", "same %"):
        table.add_column(name, justify="right")
    table.add_column("top-1 lost", justify="right")
    for layer in analysis.layers:
        table.add_row(*_cells(layer))
    out.print(table)
    for name, reason in analysis.skipped_images[:5]:
        out.print(f"skipped image {name}: {reason}", highlight=False, markup=False)


def _cells(layer: LayerQuality) -> tuple[str, ...]:
    damage = layer.damage
    told = ("", "", "")
    if damage is not None:
        drop = "" if damage.drop is None else f"{damage.drop:.2f}"
        told = (f"{damage.divergence:.5f}", f"{damage.same:.1f}", drop)
    return (
        layer.name,
        "|".join(map(str, layer.bits)),
        f"{layer.weights:,}",
        " ".join("exact" if value is None else f"{value:.1f}" for value in layer.sqnr_db),
        " ".join(f"{100 * count / layer.weights:.1f}" for count in layer.flips),
        " + ".join(map(size, layer.level_bytes)),
        *told,
    )


def _caption(analysis: Analysis) -> str:
    measured = [layer.damage for layer in analysis.layers if layer.damage is not None]
    if not measured:
        return "KL, same answers and top-1 were not measured: 'analysis' in the spec does, or 'nestquant analyze SPEC'."
    source = "images of noise" if measured[0].noise else "calibration images"
    return f"KL, same answers and top-1 with the layer alone part-bit, on {measured[0].images} {source}."
