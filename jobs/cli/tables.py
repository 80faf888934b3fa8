"""Tables that fit the terminal: words fold where they must, figures are never cut.

rich alone would shorten what does not fit, and half a number is worse than none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

Cell = str | Text

_NARROWEST_WORDS = 16  # a column of words folds down to this before the layout changes
_INDENT = "    "
_GAP = "  "
# Layouts from the roomiest: rich's box (None: no lines at all), cells around a column's content, cells at the edges.
_LAYOUTS: tuple[tuple[box.Box | None, int, int], ...] = ((box.HEAVY_HEAD, 3, 1), (None, 2, -2))


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether it holds figures (whole and to the right) or words (folded, to the left)."""

    heading: str
    figures: bool = False


@dataclass
class WholeTable:
    """A table for a console of any width.

    Lines around every column where there is room; without lines where there is less; and where even that is too wide,
    each row as its first cell on a line of its own with the other cells, labelled, below it.
    """

    columns: Sequence[Column]
    title: str = ""
    caption: str = ""
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def add_row(self, *cells: Cell) -> None:
        """Add a row of one cell a column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for lines, around, edges in _LAYOUTS:
            widths = self._widths(options.max_width - edges - around * len(self.columns))
            if widths is not None:
                yield self._table(widths, lines)
                return
        yield from self._records(console, options.max_width)

    def _widths(self, room: int) -> list[int] | None:
        """Return each column's width where ``room`` cells are enough, else None.

        Columns grow from their narrowest to their full width, words first.
        """
        narrowest, full = [], []
        for index, column in enumerate(self.columns):
            longest = max((_length(row[index]) for row in self.rows), default=0)
            heading = max(map(cell_len, column.heading.split()), default=0)
            narrowest.append(max(longest if column.figures else min(longest, _NARROWEST_WORDS), heading))
            full.append(max(longest, cell_len(column.heading)))
        spare = room - sum(narrowest)
        if spare < 0:
            return None
        for index in sorted(range(len(full)), key=lambda index: (self.columns[index].figures, full[index])):
            grown = min(spare, full[index] - narrowest[index])
            narrowest[index] += grown
            spare -= grown
        return narrowest

    def _table(self, widths: Sequence[int], lines: box.Box | None) -> Table:
        gap = (0, 1) if lines else (0, 2, 0, 0)
        table = Table(box=lines, padding=gap, pad_edge=lines is not None)
        table.title, table.title_justify = self.title or None, "left"
        table.caption, table.caption_justify = self.caption or None, "left"
        for column, width in zip(self.columns, widths, strict=True):
            table.add_column(
                column.heading, width=width, justify="right" if column.figures else "left", overflow="fold"
            )
        for row in self.rows:
            table.add_row(*row)
        return table

    def _records(self, console: Console, width: int) -> RenderResult:
        if self.title:
            yield console.render_str(self.title, style="table.title", highlight=False)
        for first, *others in self.rows:
            yield first if isinstance(first, Text) else console.render_str(first, highlight=False)
            line = Text(_INDENT)
            for column, cell in zip(self.columns[1:], others, strict=True):
                if not _length(cell):
                    continue
                value = cell if isinstance(cell, Text) else console.render_str(cell, highlight=False)
                pair = Text.assemble((column.heading, "dim"), " ", value)
                if len(line) > len(_INDENT) and line.cell_len + len(_GAP) + pair.cell_len > width:
                    yield line
                    line = Text(_INDENT)
                line.append(_GAP if len(line) > len(_INDENT) else "").append_text(pair)
            yield line
        if self.caption:
            yield console.render_str(self.caption, style="table.caption", highlight=False)


def _length(cell: Cell) -> int:
    return max(map(cell_len, str(cell).splitlines()), default=0)
