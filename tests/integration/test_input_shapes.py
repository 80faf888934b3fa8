"""Networks whose inputs are not what their name's weights had: other sizes, no squares, one channel; every recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.driver import run_job
from jobs.errors import PlanError
from jobs.spec.file import parse_spec
from storage.registry import Registry
from storage.stores.uri import open_store
from workers.executor import InProcessExecutor

Document = Callable[..., dict[str, Any]]

MODELS = [
    ({"library": "timm", "arch": "test_vit", "kwargs": {"img_size": [32, 48], "in_chans": 1}}, [32, 48], 1),
    ({"library": "timm", "arch": "test_resnet", "kwargs": {"in_chans": 1}, "size": [40, 32]}, [40, 32], 1),
    (
        {"library": "pytorchcv", "arch": "resnet20_cifar10", "kwargs": {"in_channels": 1}},
        32,
        1,
    ),
    ({"library": "timm", "arch": "test_vit", "kwargs": {"img_size": 48}}, 48, 3),
]


@pytest.fixture(scope="module")
def colour_images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images in colour that are no squares: grey networks get grey ones."""
    path = tmp_path_factory.mktemp("shapes") / "images.npz"
    draw = np.random.default_rng(1)
    np.savez(path, x=draw.integers(0, 256, (12, 40, 60, 3), dtype=np.uint8), y=np.arange(12) % 10)
    return str(path)


@pytest.mark.parametrize(
    ("case", "recipe"), [(0, "paper"), (0, "calibrated"), (0, "data_free"), (1, "paper"), (2, "paper"), (3, "paper")]
)
def test_a_job_follows_the_network(
    case: int, recipe: str, colour_images: str, tiny_document: Document, tmp_path: Path
) -> None:
    model, size, channels = MODELS[case]
    model = dict(model)
    document = tiny_document(
        quantize={"recipe": recipe, "bits": [8, 4], "activations": {"observer": "minmax"}},
        calibration=None if recipe == "data_free" else {"data": colour_images, "samples": 8, "batch_size": 4},
        evaluate={"data": colour_images, "batch_size": 6},
        preprocess={"size": model.pop("size")} if "size" in model else {},
        model={**model, "random_seed": 0},
    )
    result = run_job(parse_spec(document, where="test"), InProcessExecutor())
    assert result.tags == ("latest",)
    assert [one.total for one in result.measured] == [12] * 5
    manifest = Registry(open_store(str(tmp_path / "store"))).resolve("tiny", 1).manifest
    assert manifest.preprocessing is not None
    assert manifest.preprocessing["size"] == size
    assert len(manifest.preprocessing["mean"]) == len(manifest.preprocessing["std"]) == channels


def test_images_of_three_channels_are_no_inputs_of_four(
    colour_images: str, tiny_document: Document, tmp_path: Path
) -> None:
    document = tiny_document(
        calibration=None,
        quantize={"bits": [8, 4]},
        evaluate={"data": colour_images},
        preprocess={"size": 32},
        model={"library": "timm", "arch": "test_resnet", "kwargs": {"in_chans": 4}, "random_seed": 0},
    )
    with pytest.raises(PlanError, match="timm test_resnet takes inputs of 4 channels; images have 1 or 3"):
        run_job(parse_spec(document, where="test"), InProcessExecutor())
    document["evaluate"] = None
    with pytest.raises(
        PlanError, match=r"'auto': .* makes its own, of 1 or 3 channels; timm test_resnet takes 4. Say 'recipe: paper'"
    ):
        run_job(parse_spec(document, where="test"), InProcessExecutor())
    assert not (tmp_path / "store" / "blobs").exists()
    document["quantize"] = {"recipe": "paper"}
    assert run_job(parse_spec(document, where="test"), InProcessExecutor()).tags == ("latest",)


def test_auto_says_what_it_came_to_and_publishes_it(
    colour_images: str, tiny_document: Document, tmp_path: Path
) -> None:
    images = {"data": colour_images, "samples": 8, "batch_size": 4}
    made = {
        "data_free": "recipe: data_free, as the job has no calibration images (quantize.recipe is 'auto')",
        "calibrated": "recipe: calibrated, as the job has calibration images (quantize.recipe is 'auto')",
    }
    for version, (recipe, note) in enumerate(made.items(), start=1):
        document = tiny_document(
            quantize={}, calibration=images if recipe == "calibrated" else None, evaluate=None, preprocess={"size": 32}
        )
        result = run_job(parse_spec(document, where="test"), InProcessExecutor())
        assert [one.startswith(note) for one in result.notes if one.startswith("recipe: ")] == [True]
        manifest = Registry(open_store(str(tmp_path / "store"))).resolve("tiny", version).manifest
        assert manifest.recipe["recipe"] == recipe
