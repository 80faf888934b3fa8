"""The job's spec: what a person writes in YAML or JSON.

Unknown keys are refused with the nearest right name; every rule that needs no model is checked here, before anything
is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from jobs.spec.model import ModelSpec, Section, check_kind
from jobs.spec.quantize import QuantizeSpec, Recipe
from storage.digest import digest_bytes
from storage.errors import BadKey
from storage.layout import manifest_key, tag_key
from storage.manifest import Engine, ModelName, canonical_json
from storage.preprocessing import MAX_PIXELS, Interpolation
from storage.stores.blob_store import check_key

METHOD_VERSIONS: dict[str, int] = {"paper": 2, "calibrated": 8, "data_free": 7}
"""Raised whenever the same spec and weights would give other integers or other shards by a recipe: part of a job's
identity."""

DEFAULT_SHARD_BYTES = 4 * 1024 * 1024

_PIXELS: TypeAdapter[tuple[int, ...]] = TypeAdapter(tuple[Annotated[int, Field(ge=8, le=MAX_PIXELS)], ...])


class PreprocessSpec(Section):
    """How images become inputs; what is left out comes from the library's own configuration, for the network as its
    arguments build it.

    ``size`` and ``resize`` are pixels: one number, or ``[height, width]`` where the input is no square. The image is
    shrunk until it just covers ``resize``, then ``size`` is cut from its centre.
    """

    size: int | tuple[int, int] | None = None
    resize: int | tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Interpolation | None = None

    @field_validator("size", "resize", mode="before")
    @classmethod
    def _pixels(cls, sides: Any) -> Any:
        if sides is None:
            return None
        lengths = sides if isinstance(sides, list | tuple) and len(sides) == 2 else (sides,)
        try:
            height, *rest = _PIXELS.validate_python(lengths)
        except ValidationError as error:
            raise ValueError(f"expected 8 to {MAX_PIXELS} pixels, or two such numbers, [height, width]") from error
        # A square is one number, however it is written: the same job.
        return (height, *rest) if rest and rest[0] != height else height


class CalibrationSpec(Section):
    """Images that set the activation ranges, and the integers where the recipe is ``calibrated``: a folder, a tar or an
    npz.

    ``samples`` says how many of them, evenly spread over the set.
    """

    data: str
    samples: int = Field(default=256, ge=1)
    batch_size: int = Field(default=32, ge=1)


class AnalysisSpec(Section):
    """Measure each layer's damage when it alone runs part-bit, on so many images of the calibration set.

    With ``quantize.mixed`` it is measured in any case, on the images named there. Changes no byte of a version.
    """

    samples: int = Field(default=128, ge=1)


class EvaluateSpec(Section):
    """Labelled images that measure what was published; with a gate, a version that falls short is stored but not
    tagged.

    A float network that answers by chance ends the job, as then labels, preprocessing or classifier are wrong, unless
    ``accept_chance`` says that this is meant, or the weights are random by ``model.random_seed``.
    """

    data: str
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=50, ge=1)
    accept_chance: bool = False
    min_part_top1: float | None = Field(default=None, ge=0, le=100)
    max_drop: float | None = Field(default=None, ge=0, le=100, description="points that full-bit may lie below float")
    max_part_drop: float | None = Field(
        default=None, ge=0, le=100, description="points that part-bit may lie below float"
    )

    @property
    def has_gate(self) -> bool:
        """Tell whether a version can fall short of what is asked here."""
        return any(gate is not None for gate in (self.min_part_top1, self.max_drop, self.max_part_drop))


class StoreSpec(Section):
    """Where the version goes, and how large a shard may grow (bytes of packed integers)."""

    uri: str
    shard_bytes: int = Field(default=DEFAULT_SHARD_BYTES, ge=4096)
    tags: tuple[str, ...] = ("latest",)
    signing_keys: tuple[str, ...] = Field(
        default=(), description="publisher and online keys (PEM files or env:NAME): sign what is tagged"
    )
    single_writer: bool = False

    @field_validator("tags")
    @classmethod
    def _storable(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        for tag in tags:
            check_storable(tag_key, "name", tag)
        return tags


class ClusterSpec(Section):
    """How the work is spread.

    Nothing here changes a byte of the artifact.
    """

    address: str = "local"
    num_cpus: int | None = Field(default=None, ge=1)
    task_weights: int = Field(default=16_000_000, ge=1, description="weights in one task, about")
    cpus_per_task: float = Field(default=1, gt=0)
    max_in_flight: int = Field(default=1024, ge=1, description="tasks submitted and not done, at most")
    max_retries: int = Field(default=3, ge=0, description="a lost worker or node costs a task one of these")
    task_timeout_s: float | None = Field(default=3600, gt=0)
    node_timeout_s: float = Field(default=300, ge=0, description="how long a cluster may grow until a task fits")


class ExportSpec(Section):
    """Inference engines that a device without torch runs the version on: their graphs are published with it.

    The shards are the same with and without, for the same ``quantize.scheme``, which is symmetric by default here.
    """

    engines: tuple[Engine, ...] = Field(min_length=1)

    @field_validator("engines")
    @classmethod
    def _once_each(cls, engines: tuple[Engine, ...]) -> tuple[Engine, ...]:
        return tuple(dict.fromkeys(engines))


class LabelsSpec(Section):
    """Names of the classes, which travel with the version: devices answer by them.

    ``file``: text with one name a line, class 0 first, a path or URI. ``images``: an image set of the job that names
    every class, by its folders or by one more column of its labels.csv. One of the two.
    """

    file: str | None = None
    images: Literal["calibration", "evaluate"] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.file is None) == (self.images is None):
            raise ValueError("labels: give 'file' or 'images', one of them")
        return self


class JobSpec(Section):
    """One job: a model, a recipe, a store."""

    name: ModelName
    model: ModelSpec
    store: StoreSpec
    quantize: QuantizeSpec = QuantizeSpec()
    preprocess: PreprocessSpec = PreprocessSpec()
    calibration: CalibrationSpec | None = None
    evaluate: EvaluateSpec | None = None
    analysis: AnalysisSpec | None = None
    export: ExportSpec | None = None
    labels: LabelsSpec | None = None
    cluster: ClusterSpec = ClusterSpec()

    @model_validator(mode="before")
    @classmethod
    def _no_zoo(cls, document: Any) -> Any:
        return check_kind(document, "job")

    @model_validator(mode="before")
    @classmethod
    def _symmetric_for_engines(cls, document: Any) -> Any:
        """Engines take symmetric weights alone: with ``export`` they are the default (ADR 28)."""
        if not isinstance(document, dict) or document.get("export") is None:
            return document
        quantize = document.get("quantize", {})
        if isinstance(quantize, QuantizeSpec) and "scheme" not in quantize.model_fields_set:
            return {**document, "quantize": quantize.model_copy(update={"scheme": "symmetric"})}
        return {**document, "quantize": {"scheme": "symmetric", **quantize}} if isinstance(quantize, dict) else document

    @field_validator("name")
    @classmethod
    def _storable(cls, name: str) -> str:
        check_storable(manifest_key, name, 1)
        return name

    @model_validator(mode="after")
    def _calibrated(self) -> Self:
        if self.quantize.recipe == "calibrated" and self.calibration is None:
            raise ValueError(
                "quantize.recipe 'calibrated' needs 'calibration: {data: ...}'; "
                "'data_free' and 'paper' work without images"
            )
        mixed = self.quantize.mixed
        if mixed is not None and mixed.max_drop is not None and self.calibration is None:
            raise ValueError(
                "quantize.mixed.max_drop needs 'calibration: {data: ...}': noise tells layers apart, but predicts no "
                "drop; 'mean_bits' and 'target_bytes' work without images"
            )
        if self.recipe == "data_free":
            if self.calibration is not None:
                raise ValueError(
                    "quantize.recipe 'data_free' makes images of its own: leave 'calibration' out, or say 'calibrated'"
                )
            return self
        activations = self.quantize.activations
        if activations is not None and activations.observer != "sigma" and self.calibration is None:
            raise ValueError(
                f"quantize.activations.observer {activations.observer!r} needs 'calibration: {{data: ...}}'; "
                "'sigma' works without images"
            )
        return self

    @model_validator(mode="after")
    def _labels_have_images(self) -> Self:
        section = None if self.labels is None else self.labels.images
        if section is not None and getattr(self, section) is None:
            raise ValueError(f"labels.images is {section!r}, and there is no '{section}: {{data: ...}}'")
        return self

    @model_validator(mode="after")
    def _exportable(self) -> Self:
        if self.export is None:
            return self
        schemes = {"quantize.scheme": self.quantize.scheme}
        schemes |= {
            f"quantize.overrides[{pattern!r}].scheme": override.scheme or self.quantize.scheme
            for pattern, override in self.quantize.overrides.items()
        }
        for key, scheme in schemes.items():
            if scheme != "symmetric":
                raise ValueError(
                    f"export: engines take symmetric weights alone, {key} is {scheme!r}; set 'scheme: symmetric', or "
                    "leave 'export' out"
                )
        activations = self.quantize.activations
        if activations is not None and activations.bits != 8:
            raise ValueError(
                f"export: engines have activations of 8 bits, quantize.activations.bits is {activations.bits}; set 8, "
                "or leave 'export' out"
            )
        return self

    @property
    def recipe(self) -> Recipe:
        """Return the recipe that the job runs: what ``auto`` comes to is the most accurate that its images allow."""
        if self.quantize.recipe != "auto":
            return self.quantize.recipe
        return "data_free" if self.calibration is None else "calibrated"

    @property
    def effective_quantize(self) -> QuantizeSpec:
        """Return the section with the recipe by its own name, and no key that it does not heed: what comes to the same
        is one job.
        """
        named = self.quantize.model_copy(update={"recipe": self.recipe})
        heeded = self.recipe != "paper" and self.quantize.mixed is None
        if not heeded:
            named = named.model_copy(update={"protect": "auto"})
        heeds_equalize = self.recipe == "calibrated" and named.activations is not None
        return named if heeds_equalize else named.model_copy(update={"equalize": "auto"})

    @property
    def measures_layers(self) -> bool:
        """Tell whether the job measures what each layer alone loses."""
        return self.quantize.mixed is not None or self.analysis is not None

    @property
    def forwards(self) -> tuple[str, ...]:
        """Return the keys of the spec for whose sake the network is run; the recipe ``paper`` alone reads weights."""
        reasons = {
            f"quantize.recipe {self.quantize.recipe!r}": self.recipe != "paper",
            "quantize.activations": self.quantize.activations is not None,
            "quantize.mixed": self.quantize.mixed is not None,
            "analysis": self.analysis is not None,
            "export": self.export is not None,
            "evaluate": self.evaluate is not None,
        }
        return tuple(key for key, applies in reasons.items() if applies)

    @property
    def inputs(self) -> dict[tuple[str, str], str]:
        """Return the files that the job reads, a checkpoint, image sets and labels: section and key -> path or URI."""
        places = {
            ("model", "checkpoint"): self.model.checkpoint,
            ("calibration", "data"): None if self.calibration is None else self.calibration.data,
            ("evaluate", "data"): None if self.evaluate is None else self.evaluate.data,
            ("labels", "file"): None if self.labels is None else self.labels.file,
        }
        return {place: uri for place, uri in places.items() if uri is not None}

    def identity(self, *, source_digest: str, calibration_digest: str | None, code_digest: str | None = None) -> str:
        """Return the job's digest: what is asked, of which bytes, by which method.

        Where it runs and how it is measured do not count.
        """
        document = {
            "method": METHOD_VERSIONS[self.recipe],
            "name": self.name,
            "model": {
                "library": self.model.library,
                "arch": self.model.arch,
                "kwargs": self.model.kwargs,
                "source": source_digest,
                **({} if code_digest is None else {"code": code_digest}),
            },
            "quantize": self.effective_quantize.model_dump(mode="json"),
            "preprocess": self.preprocess.model_dump(mode="json"),
            "calibration": None
            if self.calibration is None
            else {
                "data": calibration_digest,
                "samples": self.calibration.samples,
                "batch_size": self.calibration.batch_size,
            },
            "shard_bytes": self.store.shard_bytes,
        }
        return digest_bytes(canonical_json(document))


def check_storable(key: Callable[..., str], *arguments: object) -> None:
    """Raise ValueError where a key cannot be made of the arguments, or no store may hold it: before work, not when it
    is written.
    """
    try:
        check_key(key(*arguments))
    except BadKey as error:
        raise ValueError(str(error)) from error
