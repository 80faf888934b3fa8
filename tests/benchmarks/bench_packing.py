"""MB/s of int8 that one core packs and unpacks, by bits: ``python -m tests.benchmarks.bench_packing [values]``."""

from __future__ import annotations

import sys
import time

import numpy as np

from nestquant.packing import pack, packed_size, unpack

REPEATS = 5


def main(count: int) -> None:
    """Print one line for each number of bits."""
    generator = np.random.default_rng(0)
    for bits in range(1, 9):
        values = generator.integers(-(1 << (bits - 1)), 1 << (bits - 1), count, dtype=np.int8)
        packing, unpacking = [], []
        for _ in range(REPEATS):
            start = time.perf_counter()
            packed = pack(values, bits)
            middle = time.perf_counter()
            restored = unpack(packed, bits, values.shape)
            packing.append(middle - start)
            unpacking.append(time.perf_counter() - middle)
        if not np.array_equal(restored, values) or packed.size != packed_size(count, bits):
            raise SystemExit(f"{bits} bits: what was unpacked is not what was packed")
        print(
            f"{bits} bits: pack {count / min(packing) / 1e6:5.0f} MB/s, unpack {count / min(unpacking) / 1e6:5.0f} MB/s"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 24_000_001)
