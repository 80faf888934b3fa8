"""The coverage-guided fuzzer (atheris; the options are libFuzzer's).

    python -m tests.fuzz.run -max_total_time=60 -rss_limit_mb=2048 -timeout=10 [CORPUS_FOLDER]

It starts from the hostile corpus. Memory or time beyond the limits is a crash as well; the input is left in a file.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import atheris

from storage.manifest import canonical_json
from tests.fuzz import corpus, states

for module in [name for name in sys.modules if name.split(".")[0] == "storage"]:
    del sys.modules[module]  # imported again below, this time with coverage
with atheris.instrument_imports(include=["storage", "tests.fuzz.target", "tests.fuzz.trusted"]):
    from tests.fuzz.target import KEPT_ONES, MANIFEST, SERVED, STATE, one_input
    from tests.fuzz.trusted import ROLES, bench


def seeds() -> list[bytes]:
    """Return the corpus, each under the byte that chooses its parser."""
    shards = [hostile.data for hostile in [*corpus.shards().values(), *corpus.frames().values()]]
    shards += [corpus.good_shard(codec) for codec in ("packed", "zstd")]
    manifests = [hostile.data for hostile in corpus.manifests().values()]
    manifests.append(canonical_json(corpus.good_manifest()))
    found = [b"\x00" + data for data in shards] + [bytes([MANIFEST]) + data for data in manifests]
    found += [bytes([STATE]) + hostile.data for hostile in states.states().values()]
    for index, role in enumerate(ROLES):
        document = bench().documents[role]
        found += [bytes([SERVED + index]) + document]
        found += [bytes([SERVED + index + 4]) + json.dumps(json.loads(document)["signed"]).encode()]
    names = list(bench().kept)
    first = [next(kind for kind in range(KEPT_ONES, 256) if kind % len(names) == index) for index in range(len(names))]
    return found + [bytes([kind]) + bench().kept[name] for kind, name in zip(first, names, strict=True)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="nestquant-fuzz-") as folder:
        for index, seed in enumerate(seeds()):
            if len(seed) < 1 << 16:
                (Path(folder) / f"{index:04d}").write_bytes(seed)
        atheris.Setup([*sys.argv, folder], one_input)
        atheris.Fuzz()
