"""A job whose labels, classes or network cannot be right gets no tag, and says what to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from jobs.driver import run_job
from jobs.errors import PlanError
from jobs.result import JobResult
from jobs.spec.file import parse_spec
from storage.registry import Registry
from storage.stores.uri import open_store
from tests.tiny import MODEL as TINY
from workers.errors import DataError
from workers.executor import InProcessExecutor
from workers.inputs import networks
from workers.inputs.checkpoint import random_state, save_state
from workers.inputs.images import open_images

Document = Callable[..., dict[str, Any]]
CLASSES = 10


def run(document: dict[str, Any]) -> JobResult:
    return run_job(parse_spec(document, where="test"), InProcessExecutor())


def asked(tiny_document: Document, **changes: Any) -> dict[str, Any]:
    plain = {"quantize": {"recipe": "paper", "bits": [8, 4]}, "calibration": None, "evaluate__accept_chance": False}
    return tiny_document(**(plain | changes))


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Weights and forty images that they know: the last layer is solved for their labels."""
    folder = tmp_path_factory.mktemp("knowing")
    draw = np.random.default_rng(5)
    # Noise of one size would look all the same to weights that are random.
    x = draw.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    y = np.arange(40) % CLASSES
    np.savez(folder / "images.npz", x=x, y=y)
    library, arch, kwargs = str(TINY["library"]), str(TINY["arch"]), dict(TINY["kwargs"])
    state = random_state(library, arch, kwargs, seed=7)
    network = networks.build(library, arch, kwargs)
    # A block that was never trained adds nothing, as its last norm is zero: features would hardly differ.
    state |= {name: torch.ones_like(tensor) for name, tensor in state.items() if not tensor.any() and "weight" in name}
    network.load_state_dict(state)
    preprocessing = replace(networks.default_preprocessing(library, network), size=32, resize=None)
    inputs, _ = next(open_images(folder / "images.npz").batches(preprocessing, batch_size=40))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches: of one
    with torch.no_grad():
        network.train()(inputs)
        features = network.eval().forward_head(network.forward_features(inputs), pre_logits=True)  # type: ignore[operator]
        centre = features.mean(dim=0)
        weight = (torch.linalg.pinv((features - centre).double()) @ torch.eye(CLASSES)[torch.from_numpy(y)].double()).T
        state = network.state_dict()
        state["fc.weight"], state["fc.bias"] = weight.float(), -weight.float() @ centre
    return save_state(state, folder / "knowing.safetensors"), folder / "images.npz"


def relabelled(images: Path, path: Path, change: Callable[[np.ndarray], np.ndarray]) -> str:
    arrays = np.load(images)
    np.savez(path, x=arrays["x"], y=change(arrays["y"]))
    return str(path)


def published(document: dict[str, Any]) -> tuple[list[int], dict[str, int]]:
    """The versions and the tags that the store holds."""
    registry = Registry(open_store(document["store"]["uri"]))
    return registry.versions("tiny"), registry.tags("tiny")


def test_a_network_that_knows_its_images_is_tagged(tiny_document: Document, knowing: tuple[Path, Path]) -> None:
    document = asked(tiny_document, model__checkpoint=str(knowing[0]), evaluate__data=str(knowing[1]))
    result = run(document)
    assert (result.measured[0].correct, result.measured[0].total) == (40, 40)
    assert result.tags == ("latest",)


def test_labels_in_another_order_get_no_tag(
    tiny_document: Document, knowing: tuple[Path, Path], tmp_path: Path
) -> None:
    moved = relabelled(knowing[1], tmp_path / "moved.npz", lambda y: (y + 1) % CLASSES)
    document = asked(tiny_document, model__checkpoint=str(knowing[0]), evaluate__data=moved)
    with pytest.raises(DataError, match=r"moved\.npz: the float network is right on 0 of 40 images, and chance alone"):
        run(document)
    assert published(document) == ([1], {})
    document["evaluate"]["accept_chance"] = True
    assert run(document).tags == ("latest",)
    assert published(document) == ([1], {"latest": 1})


def test_random_weights_on_purpose_are_measured(tiny_document: Document) -> None:
    document = asked(tiny_document)
    with pytest.raises(DataError, match="the float network is right on"):
        run(document)
    del document["model"]["checkpoint"]
    document["model"]["random_seed"] = 7
    assert run(document).tags == ("latest",)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (
            lambda y: y + 1,
            r"label 10 \(10 classes by the array 'y', 1 to 10\) is beyond the network's 10 classes, 0 to 9",
        ),
        (lambda y: np.where(y == 0, 2**31 - 1, y), "label 2147483647 .* is beyond the network's 10 classes"),
    ],
)
def test_a_label_that_is_no_class_costs_no_work(
    change: Callable[[np.ndarray], np.ndarray], seen: str, tiny_document: Document, tiny_images: Path, tmp_path: Path
) -> None:
    document = asked(tiny_document, evaluate__data=relabelled(tiny_images, tmp_path / "beyond.npz", change))
    with pytest.raises(DataError, match=seen):
        run(document)
    assert not list(open_store(document["store"]["uri"]).list("blobs/"))


def test_more_folders_than_classes_cost_no_work(tiny_document: Document, tmp_path: Path) -> None:
    from PIL import Image

    for number in range(11):
        (tmp_path / "set" / f"class{number:02d}").mkdir(parents=True)
        if number != 3:
            Image.new("RGB", (8, 8)).save(tmp_path / "set" / f"class{number:02d}" / "x.png")
    document = asked(tiny_document, evaluate__data=str(tmp_path / "set"))
    with pytest.raises(
        DataError, match=r"set has 11 classes by the folders: 0 = class00.*; the network has 10 classes"
    ):
        run(document)


@pytest.mark.parametrize(
    ("model", "seen"),
    [
        ({"arch": "test_resnet", "kwargs": {"num_classes": 0}}, r"it has no classifier \(num_classes: 0\)"),
        ({"arch": "test_resnet", "kwargs": {"features_only": True}}, "it answers with a list"),
        (
            {"library": "pytorchcv", "arch": "lednet_cityscapes", "kwargs": {"in_size": [64, 64]}},
            r"it answers one image with a tensor \(1, 19, 64, 64\)",
        ),
    ],
)
def test_a_network_that_does_not_classify_is_refused_before_work(
    model: dict[str, Any], seen: str, tiny_document: Document
) -> None:
    document = asked(tiny_document)
    document["model"], document["preprocess"] = {"library": "timm", "random_seed": 0, **model}, {}
    with pytest.raises(PlanError, match=rf"evaluate: \w+ {model['arch']} cannot be judged by labels: {seen}"):
        run(document)
    assert not list(open_store(document["store"]["uri"]).list("blobs/"))
