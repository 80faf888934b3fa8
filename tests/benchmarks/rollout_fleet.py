"""A rollout of 10, 50 and 100 % over 10,000 devices that ask once an hour: who runs what, the store's load by minute.

    python -m tests.benchmarks.rollout_fleet

What one device asks of a store is counted on real pulls of a signed version: when nothing is new, when an edition is
new, and when a version is. Which version each device runs is decided by the product's own code from the signed targets
of real editions. The clock and the devices are simulated.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from securesystemslib.signer import CryptoSigner

from storage.device import Device
from storage.device.source import Body, Source, StoreSource
from storage.signing.metadata import sign
from storage.signing.rollouts import Member, chosen_version
from storage.signing.root import create_root
from storage.signing.staging import read_rollouts, roll_out
from storage.stores.local import LocalStore
from tests.storage.device.artifacts import publish

PERIOD_MIN = 60
STEPS = ((0, 10.0), (240, 50.0), (480, 100.0))
END_MIN = 720


@dataclass
class Counted:
    """A source that counts requests and the bytes of their answers."""

    source: Source
    requests: int = 0
    sent_bytes: int = 0

    @contextmanager
    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> Iterator[Body]:
        self.requests += 1
        with self.source.open(key, start=start, etag=etag) as body:

            def counted() -> Iterator[bytes]:
                for chunk in body.chunks:
                    self.sent_bytes += len(chunk)
                    yield chunk

            yield Body(body.start, body.total_bytes, body.etag, counted())

    def taken(self) -> tuple[int, int]:
        figures, self.requests, self.sent_bytes = (self.requests, self.sent_bytes), 0, 0
        return figures


def simulate(devices: int, seed: int, folder: Path) -> None:
    """Run the rollout and print its figures. Raises ``AssertionError`` where a device flips or a load is lost."""
    store, key = LocalStore(folder / "store"), CryptoSigner.generate_ed25519()
    anchor = create_root(store, [key], publishers=[key.public_key], online=[key.public_key])
    for version in (1, 2):
        publish(store, version=version, groups=8, fresh=range(8), shard_bytes=250_000, base_bytes=50_000)
    sign(store, "net", [key], tags={"latest": 1})

    source = Counted(StoreSource(store))
    probe = Device(folder / "probe", source, root_of_trust=anchor, device_id="probe")
    probe.pull("net")
    source.taken()
    probe.pull("net")
    idle = source.taken()
    shares = {}
    rollouts = {}
    for minute, percent in STEPS:
        roll_out(store, "net", 2, [key], share=round(100 * percent), seed="fleet")
        rollouts[minute] = read_rollouts(store, "net")
        shares[minute] = percent
    probe.cohorts, probe.device_id = frozenset(), None  # the last device: it takes the version at 100 %
    probe.pull("net")
    update = source.taken()
    sign(store, "net", [key], versions=[1])
    probe.pull("net")
    edition = source.taken()
    print(f"one device's pull: nothing new {idle}, an edition {edition}, a version {update} (requests, bytes)")

    draw = random.Random(seed)
    phases = [draw.randrange(PERIOD_MIN) for _ in range(devices)]
    runs, known = [[1] for _ in range(devices)], [-1] * devices
    requests, moved = Counter[int](), Counter[int]()
    now = -1
    for minute in range(END_MIN):
        now = minute if minute in rollouts else now
        for index in [index for index in range(devices) if minute % PERIOD_MIN == phases[index]]:
            version = chosen_version(iter(rollouts[now]), 1, Member(f"device-{index}", holds=runs[index][-1]))
            cost = update if version != runs[index][-1] else edition if known[index] != now else idle
            known[index] = now
            requests[minute] += cost[0]
            moved[minute] += cost[1]
            if version != runs[index][-1]:
                runs[index].append(version)
        if minute + 1 in rollouts or minute + 1 == END_MIN:
            took = sum(run[-1] == 2 for run in runs)
            span = range(now, minute + 1)
            print(
                f"{shares[now]:5.0f} %: {took:6} of {devices} run version 2 ({100 * took / devices:.2f} %) after "
                f"{minute + 1 - now} min; by minute: requests {_spread(requests, span, 1)}, "
                f"MB {_spread(moved, span, 1e6)}"
            )
    sequences = Counter(tuple(run) for run in runs)
    for sequence, count in sorted(sequences.items()):
        print(f"{count:6} devices ran {' then '.join(map(str, sequence))}")
    assert set(sequences) == {(1, 2)}, "a device flipped, or was left behind"


def _spread(load: Counter[int], span: range, unit: float) -> str:
    values = [load[minute] / unit for minute in span]
    return f"{min(values):.0f} to {max(values):.0f}, mean {statistics.fmean(values):.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        simulate(options.devices, options.seed, Path(scratch))
