"""Calibration over workers: any split of the images, merged in any order, gives the same ranges."""

from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.spec.quantize import ActivationSpec
from jobs.stages.calibration import read_range
from workers.calibrate import CalibrateTask, Observed, observe
from workers.tasks import NetworkRef, TensorSource

PREPROCESSING = {"size": 32, "resize": None, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
LAYERS = ("conv1.0", "layer1.0.conv1", "fc")


def task(checkpoint: Path, data: Path, start: int, stop: int) -> CalibrateTask:
    return CalibrateTask(
        network=NetworkRef(
            library="timm",
            arch="test_resnet",
            kwargs={"num_classes": 10, "in_chans": 3},
            source=TensorSource(None, str(checkpoint)),
            preprocessing=PREPROCESSING,
        ),
        layers=LAYERS,
        data=str(data),
        samples=40,
        start=start,
        stop=stop,
        batch_size=4,
    )


@pytest.fixture(scope="module")
def pieces(tiny_checkpoint: Path, tiny_images: Path) -> dict[tuple[int, int], Observed]:
    splits = [(0, 24), (0, 8), (8, 12), (12, 24)]
    return {split: observe(task(tiny_checkpoint, tiny_images, *split)) for split in splits}


def ranges(parts: list[Observed], **spec: Any) -> list[Any]:
    activations = ActivationSpec(**spec)
    return [read_range(name, parts, activations, last=name == "fc") for name in LAYERS]


@pytest.mark.parametrize(
    "spec", [{"observer": "mse"}, {"observer": "minmax"}, {"observer": "percentile", "percentile": 99}]
)
def test_a_split_set_merged_in_any_order_gives_the_ranges_of_the_whole(
    pieces: dict[tuple[int, int], Observed], spec: dict[str, Any]
) -> None:
    whole = ranges([pieces[0, 24]], **spec)
    parts = [pieces[0, 8], pieces[8, 12], pieces[12, 24]]
    assert [part.samples for part in parts] == [8, 4, 12]
    for order in itertools.permutations(parts):
        assert ranges(list(order), **spec) == whole
    assert ranges(parts[:2], **spec) != whole


def test_the_same_task_twice_is_the_same_record(
    pieces: dict[tuple[int, int], Observed], tiny_checkpoint: Path, tiny_images: Path
) -> None:
    assert observe(task(tiny_checkpoint, tiny_images, 8, 12)) == pieces[8, 12]


def test_a_bad_image_is_named_and_not_counted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    picture = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 99, dtype=np.uint8)).save(picture, "PNG")
    with tarfile.open(path, "w") as archive:
        for name, data in (("a.png", picture.getvalue()), ("b.png", b"not a picture"), ("c.png", picture.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    seen = observe(task(tiny_checkpoint, path, 0, 3))
    assert seen.samples == 2
    ((name, reason),) = seen.skipped
    assert name == "b.png"
    assert reason.startswith("UnidentifiedImageError: ")
