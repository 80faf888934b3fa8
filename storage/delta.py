"""A delta: what turns one blob into a later one, where both hold the same tensors in the same shapes.

One zstd frame (RFC 8878) of the differences, modulo 256, of two canonical forms of equal length, byte by byte. Of a
shard that is `storage.shard.canonical_form`, so each integer that a new training left alone is a zero; of any other
blob it is the blob itself. ``patch_from`` of zstd on the same bytes finds matches where a difference finds zeros, and
is longer (docs/updates.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import zstandard

from storage.digest import Data, digest_bytes
from storage.errors import InvalidShard
from storage.manifest import MEDIA_TYPE_SHARD, CanonicalForm
from storage.shard import canonical_form, read_shard

_LEVEL = 19
_WINDOW_LOG = 20  # so much a device keeps of the frame while it decodes: 1 MiB
_BLOCK_BYTES = 1 << 18


def canonical_bytes(data: Data, media_type: str) -> bytearray:
    """Return the bytes that deltas of a blob are taken of. Raises `InvalidShard`."""
    if media_type != MEDIA_TYPE_SHARD:
        return bytearray(data)
    size_bytes, pieces = canonical_form(read_shard(memoryview(data)))
    canonical, offset = bytearray(size_bytes), 0
    for piece in pieces:
        canonical[offset : offset + len(piece)] = piece
        offset += len(piece)
    return canonical


def describe(canonical: Data) -> CanonicalForm:
    """Return digest and length of a canonical form."""
    return CanonicalForm(digest=digest_bytes(canonical), size_bytes=len(canonical))


def make_delta(old: Data, new: Data) -> bytes | None:
    """Return the delta between two canonical forms; None where their lengths differ, as those of other layers do."""
    if len(old) != len(new):
        return None
    parameters = zstandard.ZstdCompressionParameters.from_level(_LEVEL, window_log=_WINDOW_LOG, write_content_size=1)
    difference = np.frombuffer(new, np.uint8) - np.frombuffer(old, np.uint8)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(difference.data)


def apply_deltas(data: Data, media_type: str, deltas: Sequence[Data]) -> bytearray:
    """Return the canonical form that deltas, one after the other, make of a blob; whoever asks verifies its digest.

    No more memory than the blob's canonical form and some blocks is taken, whatever a delta claims.

    Raises:
        InvalidShard: the blob is no shard, or a delta is none of its length.
    """
    canonical = canonical_bytes(data, media_type)
    values = np.frombuffer(canonical, np.uint8)
    for delta in deltas:
        offset = 0
        for block in _blocks(delta, len(canonical)):
            part = values[offset : offset + len(block)]
            np.add(part, np.frombuffer(block, np.uint8), out=part)
            offset += len(block)
    return canonical


def _blocks(delta: Data, size_bytes: int) -> Iterator[bytes]:
    """Yield the differences in a delta, which must be ``size_bytes`` of them."""
    count = 0
    try:
        claimed = zstandard.get_frame_parameters(delta).content_size
        if claimed != size_bytes:
            raise InvalidShard(f"delta: {claimed} differences, expected {size_bytes}: it starts from another blob")
        with zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG).stream_reader(delta) as reader:
            while block := reader.read(min(_BLOCK_BYTES, size_bytes - count)):
                count += len(block)
                yield block
    except zstandard.ZstdError as error:
        raise InvalidShard(f"delta: not a zstd frame, or one that does not decode ({error})") from error
    if count != size_bytes:
        raise InvalidShard(f"delta: {count} differences decoded, expected {size_bytes}")
