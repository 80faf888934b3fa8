"""A device with Python, our base and one engine, and nothing else: installed from the wheel, run as people run it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nestquant.engines.images import photo_input
from nestquant.engines.onnx import Session
from storage.device import Device
from tests.benchmarks.accuracy_table import MODELS
from tests.engines.empty_device import install, run
from tests.engines.published import publish

NOT_ON_A_DEVICE = ("torch", "torchvision", "timm", "pytorchcv", "ray", "onnx", "onnxscript", "boto3", "numba", "scipy")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel and extra ``onnx``; no package registry: skips, fails where CI=true."""
    try:
        return install(tmp_path_factory.mktemp("device"))
    except RuntimeError as error:
        if os.environ.get("CI") != "true" and "error sending request" in str(error):
            pytest.skip("no package registry answers")
        raise


def installed_bytes(environment: Path) -> dict[str, int]:
    """Return the bytes of each package's files, by the package's name (importlib.metadata, RECORD)."""
    program = (
        "import importlib.metadata as m, json, os;"
        "print(json.dumps({d.name: sum(os.path.getsize(p) for f in d.files or () if os.path.exists(p := f.locate()))"
        " for d in m.distributions()}))"
    )
    sizes: dict[str, int] = json.loads(run(environment / "bin" / "python", "-c", program, cwd=environment))
    return sizes


def test_nothing_of_the_service_is_there(environment: Path) -> None:
    program = (
        f"import importlib.util as u; print([name for name in {NOT_ON_A_DEVICE!r} if u.find_spec(name) is not None]);"
        "import nestquant.engines.onnx, sys; print(nestquant.engines.onnx.__file__)"
    )
    absent, place = run(environment / "bin" / "python", "-c", program, cwd=environment).splitlines()
    assert absent == "[]"
    assert Path(place).is_relative_to(environment)  # not the checkout
    sizes = installed_bytes(environment)
    assert {"nestquant-service", "onnxruntime", "numpy", "pillow", "protobuf", "zstandard"} <= set(sizes)
    print(f"{sum(sizes.values()) / 1e6:.0f} MB installed by {len(sizes)} packages:")
    for name, size in sorted(sizes.items(), key=lambda entry: -entry[1])[:8]:
        print(f"  {name:20} {size / 1e6:6.1f} MB")


@pytest.mark.timeout(900)
def test_a_real_version_is_pulled_run_and_switched(environment: Path, test_data: Path, tmp_path: Path) -> None:
    network = next(one for one in MODELS if one.name == "resnet20_cifar10")
    document: dict[str, Any] = network.spec((8, 4), tmp_path / "store", samples=64).model_dump(exclude_unset=True)
    document["quantize"]["scheme"] = "symmetric"
    document["export"] = {"engines": ["onnx"]}
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES))
    document["labels"] = {"file": str(tmp_path / "labels.txt")}
    publish(document)
    pictures = np.load(test_data / "images" / network.images)
    photographs = []
    for index in range(8):
        photographs.append(tmp_path / f"{index}.png")
        Image.fromarray(pictures["x"][index]).save(photographs[-1])

    nestquant = environment / "bin" / "nestquant"
    kept = ("--cache", tmp_path / "cache")
    store = ("--store", tmp_path / "store")
    seen: list[dict[str, Any]] = []

    def answer() -> None:
        words = ("run", network.name, *photographs, *kept)
        shown = run(nestquant, *words, cwd=tmp_path)
        print(shown)
        assert all(label in shown for label in CLASSES[:2])
        seen.append(json.loads(run(nestquant, *words, "--json", cwd=tmp_path)))

    run(nestquant, "pull", network.name, *store, "--allow-unsigned", *kept, cwd=tmp_path)
    answer()
    run(nestquant, "upgrade", network.name, *store, *kept, cwd=tmp_path)
    answer()
    run(nestquant, "downgrade", network.name, *kept, cwd=tmp_path)
    answer()
    assert [one["level"] for one in seen] == [0, 1, 0]
    assert seen[0]["photographs"] == seen[2]["photographs"] != seen[1]["photographs"]
    # What the same photographs get here, where the whole service is installed.
    device = Device(tmp_path / "cache")
    run(nestquant, "upgrade", network.name, *store, *kept, cwd=tmp_path)
    for document in seen:
        session = Session(device, network.name, level=document["level"])
        for one, path, label in zip(document["photographs"], photographs, pictures["y"][:8], strict=True):
            logits = session.run(photo_input(path, session.preprocessing)[None]).logits[0]
            first = one["top"][0]
            assert (first["class"], first["label"]) == (int(logits.argmax()), CLASSES[int(logits.argmax())])
            assert first["class"] == label  # all eight are answered right, by float too
