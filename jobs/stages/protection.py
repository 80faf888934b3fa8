"""Layers that get more high bits than the spec says, because they are small and fragile.

Depthwise layers, the first ones of a network and other small ones hold few of the weights, and cost the answers as much
as large ones: a bit more is cheap there. Recipes that solve layers spend a small share of the part-bit bytes so, where
nothing was measured (`jobs.stages.mixed` measures).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

from nestquant.surgery import LayerSite

PROTECTED_BITS = 6
"""High bits of a protected layer; less where the next finer width is not above it."""

SHARE = 0.02
"""Of the part-bit integers' bytes, spent at most."""

SHARE_BELOW_4 = 0.10
"""The same where the part-bit model has fewer than 4 bits: there the damage is several times larger."""


def protected_bits(sites: Sequence[LayerSite], bits: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Choose the layers to protect, and by how many bits, from their sizes alone.

    At one width every layer's output is wrong by about the same share, and a further bit quarters the square of that.
    So the next bit goes to where it costs least for what it saves: the layer for which weights times 4^(bits that it
    has got) is smallest, the first layer before all others, equals in execution order; until no layer's next bit fits.

    Args:
        sites: the layers that are quantized, in execution order.
        bits: widths of those that may be protected, full width first; the share is of what these take part-bit.

    Returns:
        High bits by layer.
    """
    free_sites = [site for site in sites if site.name in bits]
    weights = {site.name: math.prod(site.shape) for site in free_sites}
    high = {name: widths[-1] for name, widths in bits.items()}
    most = {name: min(PROTECTED_BITS, widths[-2] - 1) if len(widths) > 1 else 0 for name, widths in bits.items()}
    share = SHARE_BELOW_4 if min(high.values(), default=8) < 4 else SHARE
    free = math.floor(share * sum(weights[site.name] * high[site.name] for site in free_sites))
    chosen: dict[str, int] = {}
    queue = [(0 if site is sites[0] else weights[site.name], at, site.name) for at, site in enumerate(free_sites)]
    heapq.heapify(queue)
    while queue:
        cost, at, name = heapq.heappop(queue)
        wider = chosen.get(name, high[name]) + 1
        if wider <= most[name] and weights[name] <= free:
            chosen[name] = wider
            free -= weights[name]
            heapq.heappush(queue, (4 * cost, at, name))
    return chosen
