"""Networks by name.

timm and pytorchcv are imported here alone.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from storage.manifest import Interpolation
from workers.errors import ModelError, nearest
from workers.inputs.arguments import check_arguments
from workers.inputs.budget import bounded


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input.

    The short side is shrunk to ``resize`` pixels where it is longer (never enlarged), then ``size x size`` is cut
    from the centre, scaled to [0, 1] and normalised per channel. An image smaller than ``size`` is enlarged to it.
    """

    size: int
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bilinear"

    def to_record(self) -> dict[str, Any]:
        """Return it as plain JSON values, as the manifest keeps it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Preprocessing:
        """Return what ``to_record`` wrote."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
        }
        return cls(**values)


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
        library: ``"timm"`` or ``"pytorchcv"``.
        arch: the library's name for the network.
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
            if library == "timm":
                model = _timm(arch, arguments, pretrained=pretrained)
            elif library == "pytorchcv":
                model = _pytorchcv(arch, arguments, pretrained=pretrained)
            else:
                raise ModelError(f"model.library is {library!r}; expected 'timm' or 'pytorchcv'.")
    except ModelError:
        raise
    except (
        Exception
    ) as error:  # the libraries raise anything: a network failure, an assertion, a TypeError on an argument
        wanted = "its pretrained weights" if pretrained else f"arguments {arguments}"
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        hint = " Without a network, give model.checkpoint instead of model.pretrained." if pretrained else ""
        raise ModelError(
            f"{library} could not build {arch!r} with {wanted}: {type(error).__name__}: {first_line}.{hint}"
        ) from error
    return model.eval()


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
    model: nn.Module = timm.create_model(arch, pretrained=pretrained, **kwargs)
    return model


def _pytorchcv(arch: str, kwargs: dict[str, Any], *, pretrained: bool) -> nn.Module:
    from pytorchcv.model_provider import _models, get_model

    if arch not in _models:
        raise ModelError(f"pytorchcv has no model {arch!r}.{nearest(arch, _models)}")
    model: nn.Module = get_model(arch, pretrained=pretrained, **kwargs)
    return model


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def default_preprocessing(library: str, model: nn.Module) -> Preprocessing:
    """Return the preprocessing that the library states for a network; pytorchcv states the input size alone, so
    ImageNet's usual values join it.
    """
    if library == "timm":
        import timm.data

        config = timm.data.resolve_model_data_config(model)
        size = int(config["input_size"][-1])
        return Preprocessing(
            size=size,
            resize=round(size / float(config["crop_pct"])),
            mean=tuple(float(value) for value in config["mean"]),
            std=tuple(float(value) for value in config["std"]),
            interpolation=config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic",
        )
    size = int(getattr(model, "in_size", (224, 224))[0])
    channels = int(getattr(model, "in_channels", 3))
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    return Preprocessing(size=size, resize=round(size / 0.875) if size >= 128 else None, mean=mean, std=std)
