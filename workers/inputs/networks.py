"""Networks by name.

timm and pytorchcv are imported here alone.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestquant.engines.images import Preprocessing, sides_of
from workers.errors import ModelError, nearest, one_line
from workers.inputs import own
from workers.inputs.arguments import check_arguments
from workers.inputs.budget import bounded
from workers.inputs.entry import LIBRARY


def build(
    library: str,
    arch: str,
    kwargs: dict[str, Any] | None = None,
    *,
    pretrained: bool = False,
    meta: bool = False,
    most_values: float = math.inf,
) -> nn.Module:
    """Build a network in eval mode.

    Args:
        library: ``"timm"`` or ``"pytorchcv"``; ``"own"`` for a function that this process trusts
            (`workers.inputs.own`).
        arch: the library's name for the network, or ``package.module:function``.
        kwargs: passed on to the library (``num_classes``, ``img_size`` ...).
        pretrained: load the library's own weights; the library downloads them.
        meta: build on the meta device: shapes and structure without memory.
        most_values: how many values of parameters and buffers may be registered on the way.

    Raises:
        ModelError: the library does not know the name, or refuses the arguments; an argument is about files, addresses
            or pretrained weights; the network is larger than allowed.
    """
    arguments = dict(kwargs or {})
    check_arguments(arguments)
    place = torch.device("meta") if meta else contextlib.nullcontext()
    try:
        with place, bounded(arch, most_values):
            if library == LIBRARY:
                model = own.build(arch, arguments)
            elif library == "timm":
                model = _timm(arch, arguments, pretrained=pretrained)
            elif library == "pytorchcv":
                model = _pytorchcv(arch, arguments, pretrained=pretrained)
            else:
                raise ModelError(f"model.library is {library!r}; expected 'timm', 'pytorchcv' or 'own'.")
    except ModelError:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise ModelError(
            f"{library} {arch} needs the Python package {package!r}, which is not installed; install it wherever "
            "the network is built, or take another architecture."
        ) from error
    except (
        Exception
    ) as error:  # the libraries raise anything: a network failure, an assertion, a TypeError on an argument
        if meta and (isinstance(error, NotImplementedError) or "meta" in one_line(error).lower()):
            raise ModelError(
                f"{library} {arch} cannot be planned: planning and devices build a network without memory first, and "
                f"its constructor computes with values ({one_line(error)[:120]}); take another architecture."
            ) from error
        request = "its pretrained weights" if pretrained else f"arguments {arguments}"
        hint = " Without a network, give model.checkpoint instead of model.pretrained." if pretrained else ""
        builder = "the factory" if library == LIBRARY else library
        raise ModelError(
            f"{builder} could not build {arch!r} with {request}: {one_line(error).rstrip('.')}.{hint}"
        ) from error
    return model.eval()


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub's lines about its retries to itself: what became of them is said once, in the error."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def names(library: str, pattern: str = "*") -> list[str]:
    """Return the library's names that match a glob pattern, sorted."""
    import fnmatch

    if library == "timm":
        import timm

        return sorted(timm.list_models(pattern))
    from pytorchcv.model_provider import _models

    return sorted(fnmatch.filter(_models, pattern))


def _timm(arch: str, kwargs: dict[str, Any], *, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(arch):
        raise ModelError(
            f"timm has no model {arch!r}.{nearest(arch.split('.', maxsplit=1)[0], timm.list_models())} "
            "'timm.list_models()' has all names."
        )
    with _quiet_hub():
        model: nn.Module = timm.create_model(arch, pretrained=pretrained, **kwargs)
    return model


def _pytorchcv(arch: str, kwargs: dict[str, Any], *, pretrained: bool) -> nn.Module:
    from pytorchcv.model_provider import _models, get_model

    if arch not in _models:
        raise ModelError(f"pytorchcv has no model {arch!r}.{nearest(arch, _models)}")
    model: nn.Module = get_model(arch, pretrained=pretrained, **kwargs)
    return model


def hub_config(model: nn.Module, preprocessing: Preprocessing, folder: Path) -> None:
    """Write timm's ``config.json`` for a network of its own into a folder: what the HF hub and timm build it from.

    Raises:
        ModelError: timm cannot say how the network is built.
    """
    from timm.models._hub import save_config_for_hf  # timm exports the upload alone, which writes it by this

    crop, cover = preprocessing.input_shape[1:], preprocessing.cover
    data = {
        "input_size": preprocessing.input_shape,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": preprocessing.interpolation,
        "crop_pct": 1.0 if cover is None else min(crop) / min(cover),
        "crop_mode": "center",
    }
    try:
        save_config_for_hf(model, str(folder / "config.json"), data_config=data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"timm cannot write a configuration of this network: {one_line(error)}.") from error


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def default_preprocessing(library: str, model: nn.Module, kwargs: Mapping[str, Any] | None = None) -> Preprocessing:
    """Return the preprocessing that the library states for a network built with these arguments.

    What an argument says of its inputs (``img_size``, ``in_chans``; ``in_size``, ``in_channels``) wins over what the
    weights of that name were trained with. For another number of channels than mean and deviation are stated for, each
    channel takes their average, as timm's own loader has it. pytorchcv states the input size alone, so ImageNet's usual
    values join it.

    Raises:
        ModelError: the network takes no images, or is of a library that does not say how they become its inputs.
    """
    arguments = kwargs or {}
    if library == LIBRARY:
        raise ModelError(
            "Nothing says how images become inputs of an architecture of one's own; give preprocess: {size: 224, mean: "
            "[0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}, with your own values."
        )
    if library == "timm":
        return _timm_preprocessing(model, arguments)
    sides = getattr(model, "in_size", (224, 224))
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        raise ModelError(f"{type(model).__name__} takes no images: its in_size is {sides!r}; expected (height, width).")
    channels = int(arguments.get("in_channels", _own_channels(model)))
    height, width = int(sides[0]), int(sides[1])
    large = min(height, width) >= 128
    return Preprocessing(
        size=_square((height, width)),
        resize=_square((round(height / 0.875), round(width / 0.875))) if large else None,
        mean=for_channels(IMAGENET_MEAN, channels),
        std=for_channels(IMAGENET_STD, channels),
    )


def _own_channels(model: nn.Module) -> int:
    """Return the channels that a network of pytorchcv takes unless an argument says so: its constructor's default."""
    default = inspect.signature(type(model).__init__).parameters.get("in_channels")
    return default.default if default is not None and isinstance(default.default, int) else 3


def _timm_preprocessing(model: nn.Module, arguments: Mapping[str, Any]) -> Preprocessing:
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    image_size = arguments.get("img_size")
    channels = int(arguments.get("in_chans") or config["input_size"][0])
    height, width = config["input_size"][-2:] if image_size is None else sides_of(image_size)
    config = timm.data.resolve_model_data_config(model, args={"input_size": (channels, int(height), int(width))})
    _, height, width = config["input_size"]
    crop = float(config["crop_pct"])
    return Preprocessing(
        size=_square((height, width)),
        resize=_square((round(height / crop), round(width / crop))),
        mean=for_channels(config["mean"], channels),
        std=for_channels(config["std"], channels),
        interpolation=config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic",
    )


def for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return the values, or their average for each channel where there are more or fewer."""
    numbers = tuple(float(value) for value in values)
    return numbers if len(numbers) == channels else (sum(numbers) / len(numbers),) * channels


def _square(sides: tuple[int, int]) -> int | tuple[int, int]:
    """Return one number for a square, as specs and manifests have it."""
    return sides[0] if sides[0] == sides[1] else sides


def imagenet_names() -> list[str]:
    """Return the 1,000 class names of ImageNet in the order of the classes, each without its synonyms."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [str(info.index_to_description(index)).split(",")[0] for index in range(info.num_classes())]
