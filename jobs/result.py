"""What a job found out: returned, kept beside the version as its report, printed by the command line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from storage.manifest import FloatRecord, LayerRecord, Record, SizeRecord
from workers.measure import Measured
from workers.sensitivity import SensitivityRecord, sqnr_db
from workers.tasks import GroupRecord, PieceRecord, UnitResult


class MixedRecord(Record):
    """What was chosen, layer by layer, and what it was expected to give: kept in the ledger and in the job's result.

    ``mean_bits`` weighs layers by their weights. ``divergence`` in nats and ``drop`` in points of top-1 are predicted,
    ``level_bytes`` of the level-0 shards is estimated.
    """

    high_bits: dict[str, int]
    mean_bits: float
    level_bytes: int
    divergence: float
    drop: float


class LayerDamage(Record):
    """What the network lost when this layer alone ran part-bit, at the layer's own bits (`workers.sensitivity`).

    ``divergence``: mean Kullback-Leibler divergence from the float network's answers, in nats. ``same`` answers in
    percent of ``images``; ``drop`` in points of top-1, None without labels. ``noise``: measured on noise, not images.
    """

    images: int
    noise: bool
    divergence: float
    same: float
    drop: float | None


class LayerQuality(Record):
    """Signal-to-quantization-noise ratio of one layer's weights in dB: ``sqnr_db[0]`` part-bit, the last full-bit;
    None where nothing was lost.

    ``flips[k]``: integers of level ``k``'s grid that are not the nearest to their weights. ``level_bytes[k]``: what the
    level's integers take in their shards. ``damage``: where it was measured.
    """

    name: str
    bits: tuple[int, ...]
    weights: int
    sqnr_db: tuple[float | None, ...]
    flips: tuple[int, ...] = ()
    level_bytes: tuple[int, ...] = ()
    damage: LayerDamage | None = None


class WorkSummary(Record):
    """What the quantization cost: units done, units found done by an earlier run, worker seconds, bytes."""

    units: int
    reused: int
    worker_seconds: float
    bytes_read: int
    bytes_written: int

    @classmethod
    def of(cls, results: Sequence[UnitResult]) -> WorkSummary:
        """Add up what the units cost."""
        return cls(
            units=len(results),
            reused=sum(result.reused for result in results),
            worker_seconds=sum(result.seconds for result in results),
            bytes_read=sum(result.bytes_read for result in results),
            bytes_written=sum(result.bytes_written for result in results),
        )


class PullSummary(Record):
    """What a device received: ``level_bytes[0]`` to run part-bit (base and high), ``level_bytes[k]`` to go on to k."""

    level_bytes: tuple[int, ...]


class JobResult(Record):
    """Everything that a finished job has to say."""

    name: str
    version: int
    digest: str
    created: bool
    tags: tuple[str, ...]
    job: str
    arch: str
    library: str
    bits: tuple[int, ...]
    sizes: SizeRecord
    stored_bits_per_weight: float
    kept_float: tuple[FloatRecord, ...]
    layers: tuple[LayerQuality, ...]
    measured: tuple[Measured, ...]
    work: WorkSummary
    pull: PullSummary
    seconds: dict[str, float]
    skipped_images: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    mixed: MixedRecord | None = None
    gate: str | None = None


def stored_bits_per_weight(sizes: SizeRecord) -> float:
    """Return the bits at rest for each quantized weight: all shards, scales and headers included, the float base
    not.
    """
    return 8 * sum(sizes.level_bytes) / sizes.weights


def layer_qualities(
    layers: Iterable[LayerRecord], results: Sequence[UnitResult], sensitivities: Sequence[SensitivityRecord] = ()
) -> tuple[LayerQuality, ...]:
    """Add the pieces of each layer up to its figures, and join what was measured of it alone."""
    pieces: dict[str, list[PieceRecord]] = {}
    for result in results:
        if isinstance(result.record, GroupRecord):
            for piece in result.record.pieces:
                pieces.setdefault(piece.layer, []).append(piece)
    measured = {record.layer: record for record in sensitivities}
    return tuple(
        _quality(layer, sorted(pieces[layer.name], key=lambda piece: piece.start), measured.get(layer.name))
        for layer in layers
    )


def _quality(layer: LayerRecord, pieces: Sequence[PieceRecord], record: SensitivityRecord | None) -> LayerQuality:
    signal = math.fsum(piece.signal for piece in pieces)
    noise = [math.fsum(column) for column in zip(*(piece.noise for piece in pieces), strict=True)]
    return LayerQuality(
        name=layer.name,
        bits=layer.bits,
        weights=math.prod(layer.shape),
        sqnr_db=sqnr_db(signal, noise),
        flips=_total(piece.flips for piece in pieces),
        level_bytes=_total(piece.level_bytes for piece in pieces),
        damage=None if record is None else layer_damage(record, layer.bits),
    )


def layer_damage(record: SensitivityRecord, bits: tuple[int, ...]) -> LayerDamage | None:
    """Return what was measured of a layer at these bits, if it was."""
    damage = record.at(bits)
    if damage is None:
        return None
    drop = (
        None
        if record.float_correct is None or damage.correct is None
        else 100 * (record.float_correct - damage.correct) / record.images
    )
    return LayerDamage(
        images=record.images,
        noise=record.noise,
        divergence=damage.divergence,
        same=100 * damage.same / record.images,
        drop=drop,
    )


def _total(rows: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Add up level by level; nothing where a record of an older release has none."""
    items = list(rows)
    return tuple(map(sum, zip(*items, strict=True))) if all(items) else ()


def sizes_of(
    manifest_groups: Sequence[GroupRecord], base_bytes: int, layers: Sequence[LayerRecord], float_bytes: int
) -> SizeRecord:
    """Add up the bytes by kind."""
    level_count = max(len(group.levels) for group in manifest_groups)
    level_bytes = tuple(
        sum(group.levels[level].size_bytes for group in manifest_groups if level < len(group.levels))
        for level in range(level_count)
    )
    return SizeRecord(
        weights=sum(math.prod(layer.shape) for layer in layers),
        float_bytes=float_bytes,
        base_bytes=base_bytes,
        level_bytes=level_bytes,
    )
