"""Which way a blob comes: whole, or by deltas from a blob that is here; by bytes, what is staged counted in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from storage.device.cache import Cache
from storage.device.files import is_file
from storage.manifest import MAX_DELTA_STEPS, DeltaRecord, Descriptor, Manifest

_NEEDED = ("numpy", "zstandard")


@dataclass(frozen=True)
class Plan:
    """How ``blob`` comes: by ``steps`` from ``source``, which is here, or whole where there are no steps.

    ``size_bytes`` are still to come that way, ``whole_bytes`` if it came whole. ``reason``: why it comes whole.
    """

    blob: Descriptor
    source: Descriptor | None
    steps: tuple[DeltaRecord, ...]
    size_bytes: int
    whole_bytes: int
    reason: str = ""

    def line(self) -> str:
        """Say which way it is, and why, in one line."""
        if self.source is None:
            return f"{self.blob.digest}: whole, {self.whole_bytes} bytes: {self.reason}"
        steps = "1 delta" if len(self.steps) == 1 else f"{len(self.steps)} deltas"
        where = f"{steps} from {self.source.digest}"
        return f"{self.blob.digest}: {where}, {self.size_bytes} bytes in the place of {self.whole_bytes}"


def chains(deltas: Iterable[DeltaRecord], digest: str) -> Iterator[tuple[DeltaRecord, ...]]:
    """Yield every chain of at most three deltas that ends in the blob with this digest, its first step first."""
    by_result: dict[str, list[DeltaRecord]] = {}
    for delta in deltas:
        by_result.setdefault(delta.of, []).append(delta)
    level: list[tuple[DeltaRecord, ...]] = [(delta,) for delta in by_result.get(digest, ())]
    for _ in range(MAX_DELTA_STEPS):
        yield from level
        level = [(delta, *chain) for chain in level for delta in by_result.get(chain[0].source, ())]


def plan_ways(
    cache: Cache, manifest: Manifest, earlier: Mapping[str, Descriptor], missing: Sequence[Descriptor]
) -> dict[str, Plan]:
    """Return how each missing blob of a version comes, by its digest.

    Args:
        cache: the cache.
        manifest: of the version.
        earlier: blobs of the versions that are here, by digest; those that the cache holds no more do not count.
        missing: the blobs that the cache lacks.
    """
    lacking = [name for name in _NEEDED if find_spec(name) is None] if manifest.deltas else []
    return {blob.digest: _plan(cache, manifest.deltas, earlier, blob, lacking) for blob in missing}


def _plan(
    cache: Cache,
    deltas: Sequence[DeltaRecord],
    earlier: Mapping[str, Descriptor],
    blob: Descriptor,
    lacking: Sequence[str],
) -> Plan:
    whole_bytes = _to_come(cache, blob)
    best, size_bytes, reason = None, whole_bytes, "no delta makes it"
    for chain in chains(deltas, blob.digest):
        source = earlier.get(chain[0].source)
        if lacking:
            reason = f"deltas need {' and '.join(lacking)}, which this device has not (extra 'run' or 'onnx')"
        elif source is None or not cache.holds(source):
            reason = reason if best or reason.startswith("no more") else "nothing is here that a delta starts from"
        elif (chain_bytes := sum(_to_come(cache, step.descriptor) for step in chain)) < size_bytes:
            best, size_bytes = (source, chain), chain_bytes
        else:
            reason = "no more than the deltas take"
    if best is None:
        return Plan(blob, None, (), whole_bytes, whole_bytes, reason)
    return Plan(blob, best[0], best[1], size_bytes, whole_bytes)


def _to_come(cache: Cache, blob: Descriptor) -> int:
    if cache.holds(blob):
        return 0
    part = cache.part_path(blob.digest)
    return max(blob.size_bytes - (part.stat().st_size if is_file(part) else 0), 0)
