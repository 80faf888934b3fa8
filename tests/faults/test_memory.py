"""Memory does not grow with the artifact: a process pulls it over HTTP, signature included, and its peak is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from storage.signing.metadata import sign
from storage.signing.root import create_root
from tests.conftest import ROOT
from tests.faults.conftest import Origin
from tests.storage.device.artifacts import publish

SHARD_BYTES = 4 << 20
CHILD = """
import json, re, sys, time
sys.modules.update(boto3=None, botocore=None)  # a device's install has neither, and securesystemslib would import them
from pathlib import Path
from storage.device import Device, HttpSource
device = Device(Path(sys.argv[1]), HttpSource(sys.argv[2]), root_of_trust=Path(sys.argv[3]).read_bytes())
start = time.monotonic()
moved = device.pull("net", level=1)
pulled_s = time.monotonic() - start
whole = device.verify("net").whole
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # ru_maxrss survives exec
loaded = [name for name in ("torch", "ray", "numpy") if name in sys.modules]
print(json.dumps([moved.received_bytes, moved.signed, whole, peak, loaded, pulled_s]))
"""


@pytest.mark.parametrize("groups", [4, pytest.param(128, marks=pytest.mark.slow)])
def test_peak_memory(origin: Origin, tmp_path: Path, groups: int) -> None:
    key = CryptoSigner.generate_ed25519()
    anchor = create_root(origin.store, [key], publishers=[key.public_key], online=[key.public_key])
    manifest, _ = publish(origin.store, groups=groups, shard_bytes=SHARD_BYTES)
    sign(origin.store, "net", [key], tags={"latest": 1})
    (tmp_path / "root.json").write_bytes(anchor)
    argv = [sys.executable, "-c", CHILD, str(tmp_path / "cache"), origin.direct_url, str(tmp_path / "root.json")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    received, signed, whole, peak, loaded, pulled_s = json.loads(done.stdout)
    print(f"{received} bytes in {pulled_s:.1f} s, peak {peak / 2**20:.1f} MiB")
    assert received == sum(blob.size_bytes for blob in manifest.descriptors())
    assert (signed, whole, loaded) == (True, True, [])
    assert peak < (64 << 20) + 2 * SHARD_BYTES
