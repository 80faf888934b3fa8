"""``nestquant run``: photographs on a device, and every mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nestquant.engines.images import photo_input
from nestquant.engines.onnx import Session
from storage.class_labels import build_labels
from storage.device import Device, StoreSource
from storage.digest import digest_bytes
from storage.stores.uri import open_store
from tests.engines.published import publish, spec_of
from tests.engines.test_labels import KINDS
from tests.jobs.conftest import Run


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    publish(spec_of(folder, activations={"bits": 8}))
    device = Device(folder / "device", StoreSource(open_store(str(folder / "store"))), unsigned=True)
    device.pull("tiny")
    return folder / "device"


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return path


def test_photographs_get_the_classes_that_the_session_gives(
    nestquant: Run, cache: Path, photograph: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"kind {index}" for index in range(10)))
    words = ["run", "tiny", photograph, photograph, "--cache", cache, "--top", "3", "--repeat", "4"]
    code, out, err = nestquant(*words, "--labels", labels, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    session = Session(Device(cache), "tiny", level=0)
    logits = session.run(photo_input(photograph, session.preprocessing)[None]).logits[0]
    order = [int(index) for index in np.argsort(-logits)[:3]]
    assert (document["version"], document["level"], document["levels"], document["engine"]) == (1, 0, 2, "onnx")
    assert document["median_ms"] >= document["least_ms"] > 0
    assert document["resident_bytes"] > 10_000_000
    for answer in document["photographs"]:
        assert [one["class"] for one in answer["top"]] == order
        assert [one["label"] for one in answer["top"]] == [f"kind {index}" for index in order]
        powers = np.exp(logits - logits.max())
        assert [one["probability"] for one in answer["top"]] == pytest.approx(list((powers / powers.sum())[order]))
    code, out, _ = nestquant(*words, "--level", "part")
    assert code == 0
    assert f"class {order[0]}\n" in out
    assert "tiny version 1, part-bit, onnx:" in out
    assert "(median of 8)" in out


def test_a_device_prints_them_and_a_published_version_gets_them(
    nestquant: Run, photograph: Path, tmp_path: Path
) -> None:
    registry, before = publish(spec_of(tmp_path))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(KINDS))
    store = ("--store", tmp_path / "store")
    code, _, err = nestquant("export", "tiny@1", *store, "--labels", names, "--tag", "latest")
    assert (code, err) == (0, "")
    after = registry.resolve("tiny").manifest
    assert after.labels is not None
    assert (after.version, after.schema_version, after.labels.digest) == (2, 3, digest_bytes(build_labels(KINDS)))
    assert (after.groups, after.engines) == (before.groups, before.engines)
    code, _, err = nestquant("export", "tiny@2", *store, "--tag", "latest", "--json")  # they stay
    assert (code, err) == (0, "")
    assert registry.resolve("tiny").manifest.labels == after.labels
    device = Device(tmp_path / "device", StoreSource(registry.store), unsigned=True)
    device.pull("tiny")
    words = ("run", "tiny", photograph, "--cache", tmp_path / "device")
    code, out, err = nestquant(*words, "--json")
    assert (code, err) == (0, "")
    top = json.loads(out)["photographs"][0]["top"]
    assert len(top) == 5
    assert [one["label"] for one in top] == [KINDS[one["class"]] for one in top]
    assert f"  {top[0]['label']}\n" in nestquant(*words)[1]
    names.write_text("\n".join(kind.upper() for kind in KINDS))
    assert f"  {top[0]['label'].upper()}\n" in nestquant(*words, "--labels", names)[1]


def test_every_mistake_is_one_line(nestquant: Run, cache: Path, photograph: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(photograph.read_bytes()[:300])
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    cases = [
        (["nobody", photograph], "nobody is not in"),
        (["tiny", tmp_path / "none.jpg"], "none.jpg: there is no such file"),
        (["tiny", tmp_path], "not a regular file"),
        (["tiny", tmp_path / "broken.jpg"], "broken.jpg: OSError: "),
        (["tiny", photograph, "--level", "full"], "level 1 is not here; 'nestquant upgrade tiny --level 1' brings it"),
        (["tiny", photograph, "--level", "7"], "has levels 0 to 1, not 7"),
        (["tiny", photograph, "--level", "half"], "expected part, full or a number from 0 to 1"),
        (["tiny", photograph, "--labels", tmp_path / "two.txt"], "--labels has 2 names for 10 classes"),
        (["tiny", photograph, "--labels", tmp_path / "no.txt"], "No such file or directory"),
    ]
    for words, message in cases:
        code, out, err = nestquant("run", *words, "--cache", cache)
        assert (code != 0, out) == (True, ""), words
        assert message in err
        assert len(err.strip().splitlines()) == 1
        assert "Traceback" not in err
