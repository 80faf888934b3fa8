"""The moments of a layer's inputs over one chunk of images: as a job's members take them, and a network in memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nestquant.moments import Moments
from workers.forward import check_input
from workers.lanes import Walk


def layer_moments(walk: Walk, layer: str, levels: Sequence[int]) -> list[Moments]:
    """Return the moments of a layer's inputs at each of the network's ``levels``; none where it is not called next.

    A layer that is called several times counts every call. The first is seen in every lane. What goes into the others
    follows from the layer itself, which is not solved yet: they count as the float network makes them.

    Raises:
        WorkError: an input is NaN or infinite; the message names the layer.
    """
    inputs = walk.reach(layer)
    if inputs is None:
        return []
    check_input(layer, *inputs)
    x, *runs = (walk.columns(layer, lane) for lane in inputs)
    totals = [Moments.of(x, runs[level]) for level in levels]

    def add(later: Tensor) -> None:
        check_input(layer, later)
        columns = walk.columns(layer, later)
        part = Moments.of(columns, columns)
        totals[:] = [Moments.merge([total, part]) for total in totals]

    walk.later_calls(layer, add)
    return totals
