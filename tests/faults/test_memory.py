"""Memory does not grow with what is moved: a process pulls an artifact, sends a checkpoint, and its peak is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from storage.signing.metadata import sign
from storage.signing.root import create_root
from storage.stores.local import LocalStore
from tests.conftest import ROOT
from tests.faults.conftest import Origin
from tests.servers.s3_server import S3Server
from tests.storage.device import updates
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


UPDATED = """
import json, re, sys, time
sys.modules.update(boto3=None, botocore=None)
from pathlib import Path
from storage.device import Device, StoreSource
from storage.stores.local import LocalStore
root = Path(sys.argv[3]).read_bytes()
device = Device(Path(sys.argv[1]), StoreSource(LocalStore(Path(sys.argv[2]))), root_of_trust=root)
start = time.monotonic()
moved = device.pull("net", sys.argv[4])
took_s = time.monotonic() - start
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps([moved.received_bytes, moved.deltas, moved.signed, peak, took_s]))
"""


def test_an_update_by_delta_takes_its_shard_once_decoded_on_top(tmp_path: Path) -> None:
    """Of 4 MiB packed, 8 MiB decoded; numpy and zstandard are loaded, which a pull of whole shards does without."""
    key, store = CryptoSigner.generate_ed25519(), LocalStore(tmp_path / "store")
    anchor = create_root(store, [key], publishers=[key.public_key], online=[key.public_key])
    (tmp_path / "root.json").write_bytes(anchor)
    weights = 2 * SHARD_BYTES
    for step in (0, 1):
        manifest = updates.publish(store, step, sources=(step,) if step else (), rows=weights // 144, groups=1)
        sign(store, "net", [key], versions=[step + 1])
    for version in (1, 2):
        places = [str(tmp_path / name) for name in ("cache", "store", "root.json")]
        argv = [sys.executable, "-c", UPDATED, *places, str(version)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        received, deltas, signed, peak, took_s = json.loads(done.stdout)
        print(f"version {version}: {received} bytes in {took_s:.2f} s, peak {peak / 2**20:.1f} MiB")
        assert (signed, deltas) == (True, 2 * (version - 1))
    assert received < manifest.groups[0].levels[0].size_bytes / 15
    assert peak < (72 << 20) + 2 * SHARD_BYTES + weights


BUNDLED = """
import json, re, sys, time
sys.modules.update(boto3=None, botocore=None)
from pathlib import Path
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
store, bundle, cache, root = map(Path, sys.argv[2:])
start = time.monotonic()
if sys.argv[1] == "write":
    from storage.device.bundle import write_bundle
    from storage.stores.local import LocalStore
    written = write_bundle(LocalStore(store), "net", "1", bundle, level=None)
    print(json.dumps([written.size_bytes, peak(), time.monotonic() - start]))
else:
    from storage.device import Device
    from storage.device.bundle import BundleSource
    device = Device(cache, BundleSource(bundle), root_of_trust=root.read_bytes())
    moved = device.pull("net", "1", level=1)
    took = time.monotonic() - start
    print(json.dumps([moved.received_bytes if moved.signed and device.verify("net").whole else 0, peak(), took]))
"""


@pytest.mark.parametrize("groups", [4, pytest.param(128, marks=pytest.mark.slow)])
def test_a_bundle_is_written_and_pulled_in_less_memory_than_64_mib(tmp_path: Path, groups: int) -> None:
    store, key = LocalStore(tmp_path / "store"), CryptoSigner.generate_ed25519()
    anchor = create_root(store, [key], publishers=[key.public_key], online=[key.public_key])
    manifest, _ = publish(store, groups=groups, shard_bytes=SHARD_BYTES)
    sign(store, "net", [key], tags={"latest": 1})
    (tmp_path / "root.json").write_bytes(anchor)
    total = sum(blob.size_bytes for blob in manifest.descriptors())
    for what in ("write", "pull"):
        places = [str(tmp_path / name) for name in ("store", "usb.tar", "cache", "root.json")]
        argv = [sys.executable, "-c", BUNDLED, what, *places]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        moved, peak, took_s = json.loads(done.stdout)
        print(f"{what}: {moved} bytes in {took_s:.1f} s, peak {peak / 2**20:.1f} MiB")
        assert peak < 64 << 20
        if what == "write":
            assert moved == (tmp_path / "usb.tar").stat().st_size > total
        else:
            assert moved == total


STREAMED = """
import json, os, re, sys
from pathlib import Path
from jobs.cluster.submit import portable
from jobs.spec.file import parse_spec
from storage.stores.uri import open_store
from workers.inputs.files import fetch
document, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
spec, store = parse_spec(document, where="test"), open_store(document["store"]["uri"])
list(store.list("nothing/"))  # boto3's own memory is not meant
status = Path("/proc/self/status")
before = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
moved = portable(spec, store).model.checkpoint
path = fetch(moved, folder)
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
print(json.dumps([peak - before, path.name, path.stat().st_size]))
"""


def test_inputs_travel_part_by_part(moto_s3: S3Server, tmp_path: Path) -> None:
    """A checkpoint of 400 MB goes into the store, and comes out of it, in a few MB of memory."""
    checkpoint = tmp_path / "Model_Best.pth.tar"
    with checkpoint.open("wb") as file:
        file.truncate(400 << 20)
    document = {
        "name": "net",
        "model": {"library": "timm", "arch": "test_resnet", "checkpoint": str(checkpoint)},
        "quantize": {"recipe": "paper"},
        "store": {"uri": moto_s3.uri()},
    }
    argv = [sys.executable, "-c", STREAMED, json.dumps(document), str(tmp_path / "job")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, name, size = json.loads(done.stdout)
    print(f"grown by {grown / 2**20:.1f} MiB")
    assert (name, size) == ("model_best.pth.tar", 400 << 20)
    assert grown < 64 << 20


COPIED = """
import json, re, sys
from pathlib import Path
from workers.inputs.checkpoint import to_safetensors
from workers.inputs.tensors import TensorReader
from workers.tasks import TensorSource
status = Path("/proc/self/status")
before = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
weights = to_safetensors(Path(sys.argv[1]), Path(sys.argv[2]), ["a", "b"])
digest = TensorReader(TensorSource(None, str(weights.path))).checked_digest()
print(json.dumps(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) - before))
"""


def test_a_prefix_comes_off_a_safetensors_file_part_by_part(tmp_path: Path) -> None:
    size = 200 << 20
    header = json.dumps(
        {
            f"module.{name}": {"dtype": "F32", "shape": [size // 4], "data_offsets": [at * size, (at + 1) * size]}
            for at, name in enumerate("ab")
        }
    ).encode()
    with (tmp_path / "mine.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * size)
    (tmp_path / "job").mkdir()
    argv = [sys.executable, "-c", COPIED, str(tmp_path / "mine.safetensors"), str(tmp_path / "job")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    print(f"grown by {grown / 2**20:.1f} MiB")
    assert grown < 64 << 20
