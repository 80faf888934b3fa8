"""From a scanned network to units of work.

Pure: no file, no store, no Ray, so a dry run is the real plan. What is in a shard follows from the spec and the
network alone; how units are bundled into tasks, and who runs them, changes no byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from jobs.errors import PlanError
from jobs.spec.job import JobSpec
from jobs.spec.quantize import QuantizeSpec
from jobs.stages.protection import protected_bits
from nestquant.config import NestConfig
from nestquant.surgery import LayerScan, LayerSite
from storage.manifest import FloatRecord, LayerRecord, Piece
from workers.errors import nearest, shown
from workers.tasks import BaseTask, GroupTask, PieceTask, Unit

# Peak bytes a worker holds for each weight of a group: float32 weight, its grid, rounding scratch, int8 parts, packed
# and compressed copies.
WORKER_BYTES_PER_WEIGHT = 24


@dataclass(frozen=True)
class LayerPlan:
    """A layer and its settings, overrides applied."""

    site: LayerSite
    bits: tuple[int, ...]
    scheme: str
    rounding: str
    range: str
    solution: int | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that will be done, before any of it is done.

    ``protected``: layers that have more high bits than the spec says (`jobs.stages.protection`).
    """

    layers: tuple[LayerRecord, ...]
    groups: tuple[GroupTask, ...]
    base: tuple[BaseTask, ...]
    kept_float: tuple[FloatRecord, ...]
    tasks: tuple[tuple[Unit, ...], ...]
    base_bytes: int
    protected: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Return the number of weights that are quantized."""
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def stored_bytes(self) -> int:
        """Return what the version's blobs take, at most: packed integers of all levels, and what stays float; scales
        and headers left out.
        """
        bits = sum(math.prod(layer.shape) * sum(NestConfig(bits=layer.bits).level_bits) for layer in self.layers)
        return bits // 8 + self.base_bytes

    @property
    def whole_layers(self) -> tuple[PieceTask, ...]:
        """Return every layer as one piece, in execution order."""
        firsts = [piece for group in self.groups for piece in group.pieces if piece.start == 0]
        return tuple(piece.model_copy(update={"stop": piece.out_channels}) for piece in firsts)

    @property
    def solved_layers(self) -> tuple[PieceTask, ...]:
        """Return the layers that a recipe solves with images, each whole, in execution order."""
        return tuple(piece for piece in self.whole_layers if piece.solution is not None)

    @property
    def task_bytes(self) -> int:
        """Return the memory that the largest unit takes in a worker, in bytes (an estimate from above; see
        ``docs/performance.md``); `jobs.stages.memory` adds the process itself.
        """
        return WORKER_BYTES_PER_WEIGHT * max(
            (sum(piece.weights for piece in group.pieces) for group in self.groups), default=0
        )


def make_plan(
    spec: JobSpec,
    scan: LayerScan,
    order: Sequence[str],
    state: Mapping[str, tuple[tuple[int, ...], int]],
    *,
    high_bits: Mapping[str, int] | None = None,
) -> Plan:
    """Plan a job; see ``plan_layers``."""
    return plan_layers(
        spec.effective_quantize,
        scan,
        order,
        state,
        title=spec.model.arch,
        shard_bytes=spec.store.shard_bytes,
        task_weights=spec.cluster.task_weights,
        high_bits=high_bits,
    )


def plan_layers(
    recipe: QuantizeSpec,
    scan: LayerScan,
    order: Sequence[str],
    state: Mapping[str, tuple[tuple[int, ...], int]],
    *,
    title: str,
    shard_bytes: int,
    task_weights: int,
    high_bits: Mapping[str, int] | None = None,
) -> Plan:
    """Plan what a recipe makes of a network.

    Args:
        recipe: the recipe.
        scan: the network's quantizable layers, and what is not.
        order: layer names in execution order.
        state: every tensor of the state dict: its shape and its bytes.
        title: what messages call the network.
        shard_bytes: of packed integers in one shard, at most.
        task_weights: weights in one task, about.
        high_bits: chosen for each layer (``jobs.stages.mixed``), in the place of the coarsest of ``quantize.bits``; the
            spec's own overrides win.

    Raises:
        PlanError: a pattern of the spec matches no layer, or nothing is left to quantize.
    """
    _check_patterns(recipe, [site.name for site in scan.layers])
    float_layers = [FloatRecord(name=name, reason=reason) for name, reason in scan.kept_float]
    chosen: list[LayerPlan] = []
    position = {name: index for index, name in enumerate(order)}
    for site in sorted(scan.layers, key=lambda site: position.get(site.name, len(position))):
        pattern = next((pattern for pattern in recipe.ignore if fnmatchcase(site.name, pattern)), None)
        if pattern is not None:
            float_layers.append(FloatRecord(name=site.name, reason=f"ignored by the spec ({pattern})"))
        else:
            chosen.append(_settings(site, recipe, (high_bits or {}).get(site.name)))
    protected = _protected(chosen, recipe)
    chosen = [
        replace(layer, bits=(*layer.bits[:-1], protected[layer.site.name])) if layer.site.name in protected else layer
        for layer in chosen
    ]
    if not chosen:
        if not float_layers:
            raise PlanError(f"Nothing to quantize in {title}: it has no layers of a kind that is quantized.")
        raise PlanError(
            f"Nothing to quantize in {title}: {len(float_layers)} layers stay float "
            f"({shown([record.name for record in float_layers])}); the first, as {float_layers[0].reason}."
        )
    if recipe.recipe != "paper":
        chosen = [replace(layer, solution=index) for index, layer in enumerate(chosen)]
    groups, pieces = _group(chosen, shard_bytes)
    layers = tuple(_record(layer, pieces[layer.site.name]) for layer in chosen)
    quantized = {key for layer in chosen for key in layer.site.state_keys}
    sizes = {name: size for name, (_, size) in state.items() if name not in quantized}
    base = _base_tasks(sizes, shard_bytes)
    tasks = _bundle([*groups, *base], task_weights)
    return Plan(
        layers,
        groups,
        base,
        tuple(float_layers),
        tasks,
        base_bytes=sum(sizes.values()),
        protected=tuple(sorted(protected)),
    )


def _check_patterns(recipe: QuantizeSpec, names: Sequence[str]) -> None:
    for key, patterns in (("quantize.ignore", recipe.ignore), ("quantize.overrides", tuple(recipe.overrides))):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise PlanError(
                    f"{key}: {pattern!r} matches none of the {len(names)} layers.{nearest(pattern, names)} "
                    "'nestquant quantize --dry-run' lists them."
                )


def _protected(layers: Sequence[LayerPlan], recipe: QuantizeSpec) -> dict[str, int]:
    """Return more high bits for small layers, where the recipe has them and the spec says nothing else."""
    if not recipe.protects:
        return {}
    free = {layer.site.name: layer.bits for layer in layers if not has_own_bits(layer.site.name, recipe)}
    return protected_bits([layer.site for layer in layers], free)


def protection_notes(plan: Plan) -> tuple[str, ...]:
    """Return a line on the layers that have more high bits than the spec says."""
    if not plan.protected:
        return ()
    bits = sum(math.prod(layer.shape) * layer.bits[-1] for layer in plan.layers) / plan.weights
    chosen = [layer for layer in plan.layers if layer.name in plan.protected]
    wide = max(layer.bits[-1] for layer in chosen)
    return (
        f"{len(chosen)} of {len(plan.layers)} layers are small and get up to {wide} high bits: "
        f"{shown([layer.name for layer in chosen])}; {bits:.2f} bits on average (quantize.protect: none gives plain "
        "widths).",
    )


def has_own_bits(layer: str, recipe: QuantizeSpec) -> bool:
    """Tell whether an override of the spec says a layer's bits."""
    return any(
        override.bits is not None and fnmatchcase(layer, pattern) for pattern, override in recipe.overrides.items()
    )


def _settings(site: LayerSite, recipe: QuantizeSpec, high_bits: int | None) -> LayerPlan:
    """Apply the overrides in the order of the spec; a later one wins."""
    bits = recipe.bits if high_bits is None else (*recipe.bits[:-1], high_bits)
    scheme, rounding = recipe.scheme, recipe.rounding
    for pattern, override in recipe.overrides.items():
        if fnmatchcase(site.name, pattern):
            bits = override.bits or bits
            scheme = override.scheme or scheme
            rounding = override.rounding or rounding
    return LayerPlan(site, bits, scheme, rounding, recipe.range)


def _group(layers: Sequence[LayerPlan], shard_bytes: int) -> tuple[tuple[GroupTask, ...], dict[str, list[Piece]]]:
    """Fill groups in execution order up to ``shard_bytes`` of packed integers at their widest level; cut a larger
    layer by output channel.
    """
    groups: list[list[PieceTask]] = [[]]
    pieces: dict[str, list[Piece]] = {}
    free = shard_bytes
    for layer in layers:
        site = layer.site
        channels = site.channel_first_shape[0]
        row_bits = math.prod(site.shape) // channels * max(NestConfig(bits=layer.bits).level_bits)
        start = 0
        while start < channels:
            fit = free * 8 // row_bits
            whole = (channels - start) * row_bits <= shard_bytes * 8
            if groups[-1] and (fit == 0 or (whole and fit < channels - start)):
                groups.append([])
                free = shard_bytes
                continue
            stop = min(channels, start + max(1, fit))
            piece = Piece(group=len(groups) - 1, start=start, stop=stop)
            groups[-1].append(_piece_task(layer, piece))
            pieces.setdefault(site.name, []).append(piece)
            free = max(0, free - -(-(stop - start) * row_bits // 8))
            start = stop
    return tuple(GroupTask(index=index, pieces=tuple(group)) for index, group in enumerate(groups)), pieces


def _piece_task(layer: LayerPlan, piece: Piece) -> PieceTask:
    site = layer.site
    return PieceTask.model_validate(
        {
            "layer": site.name,
            "kind": site.kind,
            "parameter": site.state_key,
            "shape": site.shape,
            "groups": site.groups,
            "start": piece.start,
            "stop": piece.stop,
            "bits": layer.bits,
            "scheme": layer.scheme,
            "rounding": layer.rounding,
            "range": layer.range,
            "solution": layer.solution,
        }
    )


def _record(layer: LayerPlan, pieces: Sequence[Piece]) -> LayerRecord:
    site = layer.site
    return LayerRecord.model_validate(
        {
            "name": site.name,
            "kind": site.kind,
            "parameter": site.state_key,
            "shape": site.shape,
            "groups": site.groups,
            "bits": layer.bits,
            "scheme": layer.scheme,
            "pieces": tuple(pieces),
        }
    )


def _base_tasks(sizes: Mapping[str, int], shard_bytes: int) -> tuple[BaseTask, ...]:
    """Fill base blobs with the float tensors in the state dict's order, up to ``shard_bytes`` each."""
    blobs: list[list[str]] = []
    free = 0
    for name, size in sizes.items():
        if not blobs or size > free:
            blobs.append([])
            free = shard_bytes
        blobs[-1].append(name)
        free -= size
    return tuple(BaseTask(index=index, parameters=tuple(names)) for index, names in enumerate(blobs))


def _bundle(units: Sequence[Unit], task_weights: int) -> tuple[tuple[Unit, ...], ...]:
    """Bundle neighbouring units into tasks of about ``task_weights`` weights, so that small layers share one task's
    overhead.
    """
    total = sum(_weights(unit) for unit in units)
    share = total / max(1, round(total / task_weights))
    tasks: list[list[Unit]] = [[]]
    reached = 0.0
    for unit in units:
        if tasks[-1] and reached + _weights(unit) / 2 > share * len(tasks):
            tasks.append([])
        tasks[-1].append(unit)
        reached += _weights(unit)
    return tuple(tuple(task) for task in tasks)


def _weights(unit: Unit) -> int:
    return sum(piece.weights for piece in unit.pieces) if isinstance(unit, GroupTask) else 0
