"""A network on a device: whole or refused, at one level or at another, whatever happens to its files meanwhile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.driver import run_job
from jobs.spec.file import parse_spec
from nestquant.nested_weight import NestedWeight
from storage.device import Device, StoreSource
from storage.device.errors import NotInstalled
from storage.errors import Damaged
from storage.layout import blob_key
from storage.manifest import MEDIA_TYPE_BASE, Descriptor
from storage.stores.uri import open_store
from tests.tiny import MODEL as TINY
from workers import runtime
from workers.errors import ArtifactError
from workers.executor import InProcessExecutor

Answers = dict[int, torch.Tensor]


@pytest.fixture(scope="module")
def store(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("runtime") / "store")
    document = {
        "name": "tiny",
        "model": {**TINY, "checkpoint": str(tiny_checkpoint)},
        "quantize": {"recipe": "paper", "bits": [8, 6, 4], "overrides": {"fc": {"bits": [8]}}},
        "preprocess": {"size": 32},
        "store": {"uri": uri, "shard_bytes": 16384},
    }
    run_job(parse_spec(document, where="test"), InProcessExecutor())
    return uri


@pytest.fixture
def device(store: str, tmp_path: Path) -> Device:
    device = Device(tmp_path / "cache", StoreSource(open_store(store)), unsigned=True)
    device.pull("tiny")
    device.upgrade("tiny")
    return device


def answers(model: runtime.NestedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model.network(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)))


@pytest.fixture
def expected(device: Device) -> Answers:
    """What the network answers at each level."""
    model = runtime.load(device.manifest("tiny"), device.blob_path)
    by_level = {}
    for level in range(3):
        model.to_level(level)
        by_level[level] = answers(model)
    return by_level


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(whole)


def test_any_flipped_bit_is_refused_by_the_name_of_its_file(device: Device) -> None:
    manifest, random = device.manifest("tiny"), np.random.default_rng(1)
    shards = [blob for blob in manifest.descriptors() if blob.media_type != MEDIA_TYPE_BASE]
    for blobs, count in ((shards, 60), (manifest.base, 40)):
        for _ in range(count):
            blob = blobs[int(random.integers(len(blobs)))]
            path = device.blob_path(blob)
            with (
                flipped(path, int(random.integers(8 * blob.size_bytes))),
                pytest.raises(Damaged, match=rf"tiny version 1: .*{path.name}: its SHA-256 is sha256:\w+, expected"),
            ):
                runtime.load(manifest, device.blob_path, level=2)


def test_the_way_out_takes_the_files_as_they_are(device: Device, expected: Answers) -> None:
    manifest = device.manifest("tiny")
    path = device.blob_path(manifest.base[0])
    first_float = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with flipped(path, 8 * (first_float + 3) + 5):  # an exponent's bit
        model = runtime.load(manifest, device.blob_path, verify=False)
    assert not torch.equal(answers(model), expected[0])


@pytest.mark.parametrize(
    ("length", "told"), [(-1, r"\d+ bytes, expected \d+"), (1, r"more than \d+ bytes, expected \d+")]
)
def test_a_file_of_another_length_is_refused(device: Device, tmp_path: Path, length: int, told: str) -> None:
    blob = device.manifest("tiny").groups[1].levels[0]
    path = device.blob_path(blob)
    whole = path.read_bytes()
    path.write_bytes(whole[:length] if length < 0 else whole + b"x")
    with pytest.raises(Damaged, match=told):
        runtime.load(device.manifest("tiny"), lambda one: device.root / blob_key(one.digest))


def broken(device: Device, how: str) -> Callable[[Descriptor], Path]:
    """Return a way to the files on which the last low shard of the top level fails in one way."""
    last = [group for group in device.manifest("tiny").groups if len(group.levels) == 3][-1].levels[2]
    path = device.blob_path(last)
    if how == "missing":
        path.unlink()
    elif how == "damaged":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)

    def blob_path(blob: Descriptor) -> Path:
        if how == "interrupted" and blob == last:
            raise KeyboardInterrupt
        return device.blob_path(blob) if how != "missing" or blob != last else path

    return blob_path


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize(
    ("how", "error"), [("missing", ArtifactError), ("damaged", Damaged), ("interrupted", KeyboardInterrupt)]
)
def test_an_upgrade_that_fails_leaves_the_level_that_ran(
    device: Device, expected: Answers, how: str, error: type[BaseException], before: int
) -> None:
    model = runtime.load(device.manifest("tiny"), device.blob_path, level=before)
    model.blobs = runtime.FileBlobs(model.manifest, broken(device, how), verify=True)
    with pytest.raises(error):
        model.upgrade()
    assert model.level == before
    assert torch.equal(answers(model), expected[before])

    for blob in device.manifest("tiny").descriptors():  # healed
        (device.root / blob_key(blob.digest)).unlink(missing_ok=True)
    device.pull("tiny")
    device.upgrade("tiny")
    model.blobs = runtime.FileBlobs(model.manifest, device.blob_path, verify=True)
    model.upgrade()
    assert torch.equal(answers(model), expected[2])


@pytest.mark.parametrize("residency", ["packed", "expanded"])
@pytest.mark.parametrize("fails_at", [0, 1, 7])
def test_a_switch_that_fails_among_the_layers_is_undone(
    device: Device, expected: Answers, monkeypatch: pytest.MonkeyPatch, fails_at: int, residency: Any
) -> None:
    model = runtime.load(device.manifest("tiny"), device.blob_path, residency=residency)
    accept, calls = NestedWeight.accept, iter(range(1000))

    def failing(self: NestedWeight, checked: torch.Tensor) -> None:
        if next(calls) == fails_at:
            raise MemoryError("no memory for a weight")
        accept(self, checked)

    with monkeypatch.context() as patch:
        patch.setattr(NestedWeight, "accept", failing)
        with pytest.raises(MemoryError):
            model.upgrade()
    assert model.level == 0
    assert torch.equal(answers(model), expected[0])
    model.upgrade()
    assert torch.equal(answers(model), expected[2])


_SWITCHER = """
import sys
from pathlib import Path
from storage.device import Device, StoreSource
from storage.stores.uri import open_store
device = Device(Path(sys.argv[1]), StoreSource(open_store(sys.argv[2])), unsigned=True)
while True:
    device.downgrade("tiny")
    device.upgrade("tiny", 1)
    device.upgrade("tiny")
"""


def check_against_a_second_process(device: Device, store: str, expected: Answers, rounds: int) -> tuple[int, int]:
    """Load and switch while another process takes the low shards away and brings them back; return how many switches
    worked and how many were refused.
    """
    other = subprocess.Popen([sys.executable, "-c", _SWITCHER, str(device.root), store])
    manifest, worked, refused = device.manifest("tiny"), 0, 0
    try:
        for number in range(rounds):
            model = runtime.load(manifest, device.blob_path)
            assert torch.equal(answers(model), expected[0])
            for level in ((1, 2), (2, 0, 2))[number % 2]:
                before = model.level
                try:
                    model.to_level(level)
                    worked += 1
                except (ArtifactError, NotInstalled):  # each one line; nothing else may come through
                    refused += 1
                    assert model.level == before
                assert torch.equal(answers(model), expected[model.level]), (before, level)
        assert other.poll() is None, "the other process lives"
    finally:
        other.kill()
        other.wait()
    return worked, refused


def test_no_mixture_while_another_process_switches_the_cache(device: Device, store: str, expected: Answers) -> None:
    worked, refused = check_against_a_second_process(device, store, expected, 40)
    assert worked + refused == 100
    assert worked > 0


@pytest.mark.slow
def test_a_thousand_loads_and_switches_against_another_process(device: Device, store: str, expected: Answers) -> None:
    worked, refused = check_against_a_second_process(device, store, expected, 1000)
    assert worked + refused == 2500
    assert min(worked, refused) > 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_classes": 2_000_000_000}, r"test_resnet with these arguments has more than [\d,]+ values"),
        ({"num_classes": 11}, r"test_resnet with the manifest's arguments has \d+,\d+ parameters, the manifest says"),
        ({"checkpoint_path": "/etc/passwd"}, r"model\.kwargs\.checkpoint_path: an argument about files"),
        ({"in_chans": 10**11}, r"timm could not build|has more than"),
    ],
)
def test_a_manifest_that_describes_another_network_is_refused_before_memory_is_taken(
    device: Device, changes: dict[str, Any], told: str
) -> None:
    manifest = device.manifest("tiny")
    model = manifest.model.model_copy(update={"kwargs": {**manifest.model.kwargs, **changes}})
    with pytest.raises(ArtifactError, match=rf"tiny version 1: .*{told}"):
        runtime.load(manifest.model_copy(update={"model": model}), device.blob_path)


def test_a_layer_of_another_shape_is_refused_by_name(device: Device) -> None:
    manifest = device.manifest("tiny")
    layer = manifest.layers[3]
    other = layer.model_copy(update={"shape": (*layer.shape[:-1], layer.shape[-1] + 1)})
    layers = tuple(other if one is layer else one for one in manifest.layers)
    with pytest.raises(ArtifactError, match=rf"layer '{layer.name}': the network's '{layer.parameter}' is \("):
        runtime.load(manifest.model_copy(update={"layers": layers}), device.blob_path)
