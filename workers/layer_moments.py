"""The moments of a layer's inputs over one chunk of images, and the layer that is solved by them: as a job's members do
it, and a network in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nestquant.calibrated import calibrate_weight
from nestquant.moments import Moments
from nestquant.quantized_weight import QuantizedWeight, quantize_weight
from workers.errors import WorkError
from workers.forward import check_input
from workers.lanes import Probed, Walk
from workers.tasks import PieceTask
from workers.threads import threads


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


def solve_layer(piece: PieceTask, weight: Tensor, moments: Sequence[Moments], probed: Probed) -> QuantizedWeight:
    """Return a layer's integers and biases by the moments of its inputs at each level; rounded alone without any.

    Args:
        piece: the layer, all its output channels.
        weight: its float32 weight, output channels first.
        moments: one a level, or none.
        probed: what was learnt of the layer before.

    Raises:
        WorkError: naming the layer, where its weight cannot be quantized or its moments are not finite.
    """
    try:
        with threads(1):
            if not moments:
                return quantize_weight(weight, piece.config)
            return calibrate_weight(
                weight,
                piece.config,
                moments,
                groups=piece.groups,
                transform=probed.transforms.get(piece.layer),
                biased=piece.layer not in probed.unbiased,
            )
    except (ValueError, RuntimeError) as error:  # a RuntimeError is the linear algebra's
        raise WorkError(f"Layer {piece.layer!r}: {error}") from error
