"""High bits chosen layer by layer, as an integer program (scipy's ``milp``, HiGHS) over measured sensitivities.

Each layer takes one of its widths. The damage of a choice is the sum of its layers' divergences, each measured with
that layer alone part-bit: to second order, errors that know nothing of each other add up so. Under ``mean_bits`` or
``target_bytes`` the damage is made least; under ``max_drop`` the bytes are, such that the predicted drop is allowed.

The predicted drop is the damage times one factor: points lost for each nat, over everything that was measured and is no
collapse (``_points_per_nat``).

Damages count in millionths of a nat, so that all figures are integers. Ties go to the choice with less of the bounded
figure, then to fewer bits in the first layer in which two choices differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from jobs.errors import PlanError
from jobs.result import MixedRecord
from jobs.spec.quantize import MixedSpec
from jobs.stages.plan import Plan
from storage.registry import Registry
from storage.shard import build_shard
from workers.errors import WorkError
from workers.ledger import Ledger
from workers.sensitivity import SensitivityRecord

UNITS = 1_000_000
"""Steps that one nat is counted in: far below what some hundred images can tell."""

COLLAPSE = 1.0
"""Nats beyond which a network's answers are lost, and lose no more however much the layer loses."""

_BLOCK = 6
_ATTEMPTS = 8
_INFEASIBLE = 2
Integers = npt.NDArray[np.int64]
Bound = tuple[Sequence[Integers], int]


@dataclass(frozen=True)
class LayerChoices:
    """The widths that a layer may run at, ascending, with the damage (nats) and the level-0 bytes of each."""

    name: str
    weights: int
    high_bits: tuple[int, ...]
    divergences: tuple[float, ...]
    level_bytes: tuple[int, ...]


def choose_bits(
    layers: Sequence[LayerChoices], target: MixedSpec, *, points_per_nat: float, fixed_bytes: int = 0
) -> MixedRecord:
    """Choose every layer's high bits.

    Args:
        layers: their choices, in execution order; a layer with one choice is fixed, and counts.
        target: what to keep.
        points_per_nat: points of top-1 that one nat of damage costs.
        fixed_bytes: bytes of the level-0 shards that no choice changes.

    Raises:
        PlanError: no choice meets the target; the message says what the best one gives.
    """
    damage = [np.array([max(0, round(UNITS * value)) for value in layer.divergences]) for layer in layers]
    sizes = [np.array(layer.level_bytes, dtype=np.int64) for layer in layers]
    total = sum(layer.weights for layer in layers)
    if target.mean_bits is not None:
        bits = [layer.weights * np.array(layer.high_bits, dtype=np.int64) for layer in layers]
        limit = math.floor(Fraction(str(target.mean_bits)) * total)
        _check(bits, limit, "mean_bits", target.mean_bits, lambda least: f"{least / total:.4f}")
        chosen = _least(damage, bits, limit)
    elif target.target_bytes is not None:
        limit = target.target_bytes - fixed_bytes
        _check(sizes, limit, "target_bytes", target.target_bytes, lambda least: f"{least + fixed_bytes} bytes")
        chosen = _least(damage, sizes, limit)
    else:
        assert target.max_drop is not None
        limit = math.floor(UNITS * target.max_drop / points_per_nat) if points_per_nat > 0 else sum(map(_most, damage))
        _check(
            damage,
            limit,
            "max_drop",
            target.max_drop,
            lambda least: f"{least * points_per_nat / UNITS:.2f} points predicted",
        )
        chosen = _least(sizes, damage, limit)
    picked = list(zip(layers, chosen, strict=True))
    divergence = math.fsum(layer.divergences[at] for layer, at in picked)
    return MixedRecord(
        high_bits={layer.name: layer.high_bits[at] for layer, at in picked},
        mean_bits=sum(layer.weights * layer.high_bits[at] for layer, at in picked) / total,
        level_bytes=fixed_bytes + sum(layer.level_bytes[at] for layer, at in picked),
        divergence=divergence,
        drop=points_per_nat * divergence,
    )


def points_per_nat(records: Sequence[SensitivityRecord]) -> float:
    """Return the points of top-1 lost for each nat of divergence: all that was lost over all divergence, of layers and
    widths that did not collapse (of all where every one did); 0 where nothing was lost anywhere.
    """
    damages = [damage for record in records for damage in record.damages]
    counted = [damage for damage in damages if damage.divergence <= COLLAPSE] or damages
    nats = math.fsum(damage.divergence for damage in counted)
    return 100 * math.fsum(damage.lost for damage in counted) / nats if nats > 0 else 0.0


def mixed_bits(
    target: MixedSpec, plan: Plan, records: Sequence[SensitivityRecord], registry: Registry, *, job: str
) -> MixedRecord:
    """Return the high bits of every layer of a plan; what an earlier run of the job has chosen stands.

    Bytes are those of a shard of each layer alone, less what every shard has in common, which counts once for each of
    the plan's shard groups: neighbours may lose a little by sharing a codec.

    Raises:
        PlanError: the target cannot be met.
    """
    ledger = Ledger(registry, job)
    earlier = ledger.find(ledger.mixed_key, MixedRecord)
    if earlier is not None:
        return earlier
    empty = len(build_shard({}, {}).data)
    layers = [
        LayerChoices(
            name=layer.layer,
            weights=layer.weights,
            high_bits=tuple(damage.bits[-1] for damage in record.damages),
            divergences=tuple(damage.divergence for damage in record.damages),
            level_bytes=tuple(damage.shard_bytes - empty for damage in record.damages),
        )
        for layer, record in zip(plan.whole_layers, records, strict=True)
    ]
    rate = points_per_nat(records)
    chosen = choose_bits(layers, target, points_per_nat=rate, fixed_bytes=empty * len(plan.groups))
    ledger.keep(ledger.mixed_key, chosen)
    return MixedRecord.model_validate_json(registry.store.get(ledger.mixed_key))


def _check(figures: Sequence[Integers], limit: int, key: str, target: float, describe: Callable[[int], str]) -> None:
    least = sum(int(choices.min()) for choices in figures)
    if least > limit:
        raise PlanError(
            f"quantize.mixed.{key}: {target:g} cannot be met: the smallest possible here is {describe(least)}. "
            f"Ask for more, or allow {'wider' if key == 'max_drop' else 'narrower'} quantize.mixed.choices."
        )


def _least(cost: Sequence[Integers], bounded: Sequence[Integers], limit: int) -> list[int]:
    """Return each layer's choice: the least cost whose ``bounded`` figures add up to ``limit`` at most.

    Of those the one with least of them, and of those the lexicographically first.
    """
    program = _Program([len(choices) for choices in cost])
    chosen = program.solve(cost, [(bounded, limit)])
    bounds = [(cost, _sum(cost, chosen)), (bounded, limit)]
    chosen = program.solve(bounded, bounds)
    bounds[1] = (bounded, _sum(bounded, chosen))
    # Any other choice differs in one layer at least. The usual case is that there is none as good.
    same = [np.array([int(at == own) for at in range(len(choices))]) for choices, own in zip(cost, chosen, strict=True)]
    if program.attempt(same, [*bounds, (same, len(same) - 1)]) is None:
        return chosen
    for start in range(0, len(cost), _BLOCK):
        order = [np.zeros(len(choices), dtype=np.int64) for choices in cost]
        factor = 1
        for at in reversed(range(start, min(start + _BLOCK, len(cost)))):
            order[at] = factor * np.arange(len(cost[at]))
            factor *= len(cost[at])
        chosen = program.solve(order, bounds)
        bounds.append((order, _sum(order, chosen)))
    return chosen


class _Program:
    """One binary for each layer and choice, one of each layer's at 1."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = counts
        edges = np.cumsum([0, *counts])
        self.starts, self.size = edges[:-1], int(edges[-1])
        self.layer = np.repeat(np.arange(len(counts)), counts)

    def solve(self, cost: Sequence[Integers], bounds: Sequence[Bound]) -> list[int]:
        """Return the choices of least cost that keep every bound; there must be some."""
        chosen = self.attempt(cost, bounds)
        if chosen is None:
            raise WorkError("quantize.mixed: the solver found no choice for a target that can be met.")
        return chosen

    def attempt(self, cost: Sequence[Integers], bounds: Sequence[Bound]) -> list[int] | None:
        """Return the choices of least cost that keep every bound, exactly; None where there are none."""
        from scipy import sparse
        from scipy.optimize import Bounds, LinearConstraint, milp

        one_each = sparse.csr_array(
            (np.ones(self.size), (self.layer, np.arange(self.size))), shape=(len(self.counts), self.size)
        )
        rows, limits = [np.concatenate(row) for row, _ in bounds], [limit for _, limit in bounds]
        units = [max(1, int(np.gcd.reduce(row))) for row in rows]
        for _ in range(_ATTEMPTS):
            constraints = [
                LinearConstraint(row[None, :] / unit, -np.inf, limit // unit)
                for row, unit, limit in zip(rows, units, limits, strict=True)
            ]
            solution = milp(
                np.concatenate(cost).astype(np.float64),
                integrality=np.ones(self.size),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(one_each, 1, 1), *constraints],
                options={"mip_rel_gap": 0.0},
            )
            if solution.status == _INFEASIBLE:
                return None
            if solution.x is None:
                raise WorkError(f"quantize.mixed: the integer program was not solved: {solution.message}")
            chosen = [int(np.argmax(part)) for part in np.split(solution.x, self.starts[1:])]
            over = [_sum(row, chosen) - limit for row, limit in bounds]
            if max(over) <= 0:
                return chosen
            # The solver keeps bounds to a millionth; the next try leaves so much room.
            limits = [limit - max(0, excess) for limit, excess in zip(limits, over, strict=True)]
        raise WorkError(f"quantize.mixed: no exact choice in {_ATTEMPTS} attempts; give a slightly different target.")


def _sum(figures: Sequence[Integers], chosen: Sequence[int]) -> int:
    return sum(int(choices[at]) for choices, at in zip(figures, chosen, strict=True))


def _most(figures: Integers) -> int:
    return int(figures.max())
