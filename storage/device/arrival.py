"""One blob comes: by deltas where that moves less, whole otherwise and whenever anything about a delta is odd.

What deltas made is verified by its canonical form, which the manifest names and no compressor changes. It is kept as
the very shard where this device's zstd compresses as the publisher's did, and in its canonical form where it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from storage.device.cache import Cache, forms_of
from storage.device.errors import CacheError, ContentError, DeviceError, NoSpace
from storage.device.fetch import Fetcher
from storage.device.files import disk_errors, read_file
from storage.device.soundness import drop
from storage.device.staging import staging
from storage.device.ways import Plan
from storage.digest import Data, digest_bytes
from storage.errors import InvalidShard
from storage.layout import blob_key
from storage.manifest import MEDIA_TYPE_SHARD, Descriptor

_BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class Arrival:
    """A blob that came: whether deltas made it, what that spared, and the line that says so."""

    by_delta: bool
    spared_bytes: int
    line: str


def bring(fetcher: Fetcher, plan: Plan, warn: Callable[[str], None]) -> Arrival:
    """Bring a blob as planned, and whole where a delta turns out not to do.

    Raises ``GaveUp``, ``SourceError`` and ``CacheError`` as `Fetcher.fetch` does for the whole blob.
    """
    blob, line = plan.blob, plan.line()
    if plan.source is not None:
        try:
            _keep(fetcher.cache, blob, _apply(fetcher, plan, plan.source))
            return Arrival(True, plan.whole_bytes - plan.size_bytes, line)
        except NoSpace:
            raise
        except (DeviceError, InvalidShard, OSError, ValueError, MemoryError) as error:
            why = str(error) or type(error).__name__
            warn(f"{blob.digest} comes whole, for its delta does not do: {why}")
            line = f"{blob.digest}: whole, {plan.whole_bytes} bytes: its delta does not do: {why}"
        finally:
            for step in plan.steps:
                drop(fetcher.cache, step.descriptor)
    fetcher.fetch(blob_key(blob.digest), blob)
    return Arrival(False, 0, line)


def _apply(fetcher: Fetcher, plan: Plan, source: Descriptor) -> bytearray:
    """Return the verified canonical form of a plan's blob."""
    from storage.delta import apply_deltas  # numpy and zstandard, which a device without deltas does without

    cache = fetcher.cache
    for step in plan.steps:
        if not cache.holds(step.descriptor):
            fetcher.fetch(blob_key(step.descriptor.digest), step.descriptor)
    deltas = [_contents(cache, step.descriptor) for step in plan.steps]
    canonical = apply_deltas(_contents(cache, cache.form(source) or source), plan.blob.media_type, deltas)
    expected, actual = forms_of(plan.blob)[-1], digest_bytes(canonical)
    if (actual, len(canonical)) != (expected.digest, expected.size_bytes):
        raise ContentError(f"it makes {len(canonical)} bytes with {actual}, expected {expected.digest}")
    return canonical


def _contents(cache: Cache, blob: Descriptor) -> bytes:
    path = cache.blob_path(blob.digest)
    with disk_errors(str(path)):
        return read_file(path, max_bytes=blob.size_bytes)


def _keep(cache: Cache, blob: Descriptor, canonical: bytearray) -> None:
    form, data = forms_of(blob)[-1], memoryview(canonical)
    if blob.media_type == MEDIA_TYPE_SHARD:
        from storage.shard import shard_from_canonical

        shard = shard_from_canonical(data)
        if digest_bytes(shard) == blob.digest:
            form, data = blob, memoryview(shard)
    _write(cache, form, data)


def _write(cache: Cache, form: Descriptor, data: Data) -> None:
    """Give bytes that are verified their place, as bytes that came get theirs."""
    view = memoryview(data)
    with staging(cache, form) as staged:
        staged.restart()
        staged.served_under(None)
        for start in range(0, len(view), _BLOCK_BYTES):
            staged.write(bytes(view[start : start + _BLOCK_BYTES]))
        staged.check()
    try:
        cache.commit(form.digest)
    except CacheError:
        cache.discard(form.digest)
        raise
