"""The spec's section ``quantize``: which recipe, which widths, which layers."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from jobs.spec.model import Section
from nestquant.config import Observer, Range, Rounding
from nestquant.config import check_bits as check_method_bits
from storage.manifest import Scheme

Recipe = Literal["paper", "calibrated", "data_free"]
RecipeChoice = Literal["auto", "paper", "calibrated", "data_free"]

DEFAULT_CHOICES = (3, 4, 5, 6)


class Override(Section):
    """What is different for the layers that a pattern matches."""

    bits: tuple[int, ...] | None = None
    scheme: Scheme | None = None
    rounding: Rounding | None = None


class ActivationSpec(Section):
    """How layer inputs are quantized, per tensor.

    ``sigma`` needs no images: the range is so many standard deviations of the tensor on one forward pass of noise.
    The others are calibrated.
    """

    bits: int = Field(default=8, ge=2, le=8)
    observer: Observer = "percentile"
    sigma: float | None = Field(default=None, gt=0)
    percentile: float = Field(default=99.99, gt=50, le=100)
    first_layer: Literal["float", "quantized"] = "float"


class MixedSpec(Section):
    """High bits chosen layer by layer (``jobs.stages.mixed``), under exactly one of three targets.

    ``mean_bits``: the mean of the high bits, layers weighed by their weights, at most. ``target_bytes``: of all level-0
    shards, as estimated from each layer's own. ``max_drop``: points of top-1 that part-bit may lie below float, as
    predicted. ``choices``: the high bits to choose from; by default those of 3 to 6 that are below the next finer
    width. ``samples``: calibration images that the damage is measured on.
    """

    choices: tuple[int, ...] | None = None
    mean_bits: float | None = Field(default=None, gt=0)
    target_bytes: int | None = Field(default=None, gt=0)
    max_drop: float | None = Field(default=None, gt=0, le=100)
    samples: int = Field(default=128, ge=1)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if sum(target is not None for target in (self.mean_bits, self.target_bytes, self.max_drop)) != 1:
            raise ValueError("give exactly one of 'mean_bits', 'target_bytes' and 'max_drop'")
        return self

    @field_validator("choices")
    @classmethod
    def _ascending(cls, choices: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if choices is None else tuple(sorted(set(choices)))


class QuantizeSpec(Section):
    """The recipe.

    ``bits`` counts down from the full width: [8, 4] nests 4 bits in 8; [8, 6, 4] has two upgrades. ``recipe`` names the
    steps: ``paper`` rounds by the weights alone, ``calibrated`` by what the calibration images make of each layer's
    inputs (`nestquant.calibrated`), ``data_free`` the same with images that the job makes itself
    (`nestquant.synthetic`); in both ``rounding`` counts for layers whose inputs cannot be read. ``auto`` is
    ``calibrated`` where the job has calibration images, ``data_free`` where it has none (`JobSpec.recipe`).

    ``range`` says where the largest weight of a channel lies that is rounded by the weights alone: ``full``, at the end
    of the full-bit grid, as published; ``nested``, at the end of what the coarsest grid reaches, so that part-bit does
    not clip it. Solved layers have it there always.

    ``protect``: recipes that solve layers give small ones up to 6 high bits, for 2% of the part-bit bytes
    at most (10% below 4 bits; `jobs.stages.protection`); ``none`` gives plain widths, as ``paper`` and ``mixed`` do
    always.

    ``equalize``: with the recipe ``calibrated`` and ``activations``, channels of an activation are brought closer
    to one size before anything is solved (`nestquant.equalization`); the network answers as before. ``none``: not.
    """

    recipe: RecipeChoice = "auto"
    bits: tuple[int, ...] = (8, 4)
    scheme: Scheme = "asymmetric"
    rounding: Rounding = "adaptive"
    range: Range = "full"
    ignore: tuple[str, ...] = ()
    overrides: dict[str, Override] = Field(default_factory=dict)
    activations: ActivationSpec | None = None
    mixed: MixedSpec | None = None
    protect: Literal["auto", "none"] = "auto"
    equalize: Literal["auto", "none"] = "auto"

    @model_validator(mode="after")
    def _choices_fit(self) -> Self:
        if self.mixed is None:
            return self
        if len(self.bits) < 2:
            raise ValueError(f"mixed chooses the coarsest of several widths; bits are {list(self.bits)}")
        finer, choices = self.bits[-2], self.high_choices
        if not choices or not all(1 <= width < finer for width in choices):
            raise ValueError(
                f"mixed.choices are {list(choices)}; expected widths from 1 to {finer - 1}, below the next finer of "
                f"bits {list(self.bits)}"
            )
        return self

    @property
    def protects(self) -> bool:
        """Tell whether small layers get more bits; of a recipe by its own name, not ``auto``."""
        return self.protect == "auto" and self.mixed is None and self.recipe not in ("auto", "paper")

    @property
    def equalizes(self) -> bool:
        """Tell whether activations are equalized; of a recipe by its own name, not ``auto``."""
        return self.equalize == "auto" and self.recipe == "calibrated" and self.activations is not None

    @property
    def high_choices(self) -> tuple[int, ...]:
        """Return the high bits that a layer may get, ascending; that of ``bits`` alone without ``mixed``."""
        if self.mixed is None:
            return self.bits[-1:]
        if self.mixed.choices is not None:
            return self.mixed.choices
        return tuple(width for width in DEFAULT_CHOICES if width < self.bits[-2])

    @field_validator("bits")
    @classmethod
    def _descending(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        return check_bits(bits)

    @field_validator("overrides")
    @classmethod
    def _overridden_bits(cls, overrides: dict[str, Override]) -> dict[str, Override]:
        for override in overrides.values():
            if override.bits is not None:
                check_bits(override.bits)
        return overrides

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key of later releases is left out at its default: earlier specs keep their digests and manifests."""
        document: dict[str, Any] = write(self)
        if self.range == "full":
            document.pop("range", None)
        if self.protect == "auto":
            document.pop("protect", None)
        if self.equalize == "auto":
            document.pop("equalize", None)
        return document


def check_bits(bits: tuple[int, ...]) -> tuple[int, ...]:
    """Return the widths if they count down within 1..8.

    Raises:
        ValueError: naming what is wrong with them.
    """
    try:
        check_method_bits(bits)
    except ValueError as error:
        raise ValueError(
            f"bits are {list(bits)}; expected widths from 1 to 8 that count down, full width first, such as [8, 4]"
        ) from error
    return bits
