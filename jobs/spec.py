"""The job's spec: what a person writes in YAML or JSON.

Unknown keys are refused with the nearest right name; every rule that needs no model is checked here, before anything
is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from jobs.errors import SpecError
from storage.manifest import ModelName, Scheme, canonical_json
from workers.errors import nearest

METHOD_VERSION = 2
"""Raised whenever the same spec and weights would give other integers or other shards: it is part of a job's
identity."""

DEFAULT_SHARD_BYTES = 4 * 1024 * 1024

DEFAULT_CHOICES = (3, 4, 5, 6)

Observer = Literal["sigma", "minmax", "percentile", "mse"]


S = TypeVar("S", bound=BaseModel)


class Section(BaseModel):
    """Base of the spec's sections: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(Section):
    """Which network, and where its weights come from.

    ``checkpoint`` is a .safetensors, .pth or .pt (a path or an s3:// URI); ``pretrained`` lets the library download its
    own; ``random_seed`` takes the architecture's own initialisation.
    """

    library: Literal["timm", "pytorchcv"]
    arch: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    checkpoint: str | None = None
    pretrained: bool = False
    random_seed: int | None = Field(
        default=None, description="random weights from this seed: for size tables and load tests"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [self.checkpoint is not None, self.pretrained, self.random_seed is not None]
        if sum(given) != 1:
            raise ValueError("give exactly one of 'checkpoint', 'pretrained: true' and 'random_seed'")
        return self


class Override(Section):
    """What is different for the layers that a pattern matches."""

    bits: tuple[int, ...] | None = None
    scheme: Scheme | None = None
    rounding: Literal["adaptive", "nearest"] | None = None


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
    """High bits chosen layer by layer (``jobs.mixed``), under exactly one of three targets.

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
    (`nestquant.synthetic`); in both ``rounding`` counts for layers whose inputs cannot be read.
    """

    recipe: Literal["paper", "calibrated", "data_free"] = "paper"
    bits: tuple[int, ...] = (8, 4)
    scheme: Scheme = "asymmetric"
    rounding: Literal["adaptive", "nearest"] = "adaptive"
    ignore: tuple[str, ...] = ()
    overrides: dict[str, Override] = Field(default_factory=dict)
    activations: ActivationSpec | None = None
    mixed: MixedSpec | None = None

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


class PreprocessSpec(Section):
    """How images become inputs; what is left out comes from the library's own configuration."""

    size: int | None = Field(default=None, ge=8)
    resize: int | None = Field(default=None, ge=8)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None


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
    """

    data: str
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=50, ge=1)
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
    cluster: ClusterSpec = ClusterSpec()

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
        if self.quantize.recipe == "data_free":
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

    @property
    def measures_layers(self) -> bool:
        """Tell whether the job measures what each layer alone loses."""
        return self.quantize.mixed is not None or self.analysis is not None

    def identity(self, *, source_digest: str, calibration_digest: str | None) -> str:
        """Return the job's digest: what is asked, of which bytes, by which method.

        Where it runs and how it is measured do not count.
        """
        document = {
            "method": METHOD_VERSION,
            "name": self.name,
            "model": {
                "library": self.model.library,
                "arch": self.model.arch,
                "kwargs": self.model.kwargs,
                "source": source_digest,
            },
            "quantize": self.quantize.model_dump(mode="json"),
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
        return f"sha256:{hashlib.sha256(canonical_json(document)).hexdigest()}"


def check_bits(bits: tuple[int, ...]) -> tuple[int, ...]:
    """Return the widths if they count down within 1..8.

    Raises:
        ValueError: naming what is wrong with them.
    """
    if not bits or not all(1 <= width <= 8 for width in bits) or any(low >= high for high, low in pairwise(bits)):
        raise ValueError(
            f"bits are {list(bits)}; expected widths from 1 to 8 that count down, full width first, such as [8, 4]"
        )
    return bits


def load_spec(path: str | Path, *, changes: dict[str, Any] | None = None) -> JobSpec:
    """Read a spec from YAML or JSON; ``changes`` maps dotted keys (``store.uri``) to values that win over the file's.

    Raises:
        SpecError: one line for each fault, with the key, what was seen and what was expected.
    """
    return parse_spec(read_document(path, changes or {}), where=str(path))


def read_document(path: str | Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Read YAML or JSON keys, not validated yet; see ``load_spec``."""
    file = Path(path)
    try:
        document = yaml.safe_load(file.read_text())
    except FileNotFoundError as error:
        raise SpecError(f"No spec at {path}: there is no such file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"Cannot read the spec {path}: {error}.") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" in line {place.line + 1}" if place is not None else ""
        raise SpecError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', error)}.") from error
    if not isinstance(document, dict):
        raise SpecError(f"{path} holds a {type(document).__name__}; expected keys such as 'name', 'model', 'store'.")
    return with_changes(document, changes)


def with_changes(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the document with dotted keys set."""
    result = dict(document)
    for dotted, value in changes.items():
        head, _, rest = dotted.partition(".")
        inner = result.get(head)
        result[head] = with_changes(inner if isinstance(inner, dict) else {}, {rest: value}) if rest else value
    return result


def parse_spec(document: dict[str, Any], *, where: str) -> JobSpec:
    """Validate a document; see ``load_spec`` for the errors."""
    return parse_as(JobSpec, document, where=where)


def parse_as(kind: type[S], document: dict[str, Any], *, where: str) -> S:
    """Validate a document as one kind of spec; see ``load_spec`` for the errors."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        items = error.errors()
        # A faulty item of a list also makes the list too short for pydantic: that is not what is wrong.
        inner = {item["loc"][:depth] for item in items for depth in range(len(item["loc"]))}
        faults = [_fault(kind, dict(item)) for item in items if item["type"] != "too_short" or item["loc"] not in inner]
        raise SpecError("\n".join(f"{where}: {fault}" for fault in faults)) from error


def _fault(root: type[BaseModel], item: dict[str, Any]) -> str:
    location = [str(step) for step in item["loc"]]
    key = ".".join(location) or "spec"
    if item["type"] == "extra_forbidden":
        known = _known_keys(root, item["loc"][:-1])
        return f"unknown key {key!r}.{nearest(location[-1], known)} Known here: {', '.join(sorted(known))}."
    if item["type"] == "missing":
        return f"{key!r} is missing."
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "string_pattern_mismatch":
        message = "expected lower-case letters, digits, '.', '_' and '-', with a letter or digit at both ends"
    if item["type"] == "too_short":
        message = "expected one or more"
    seen = "" if isinstance(item["input"], dict) else f" Seen: {item['input']!r}."
    return f"{key!r}: {message}.{seen}"


def _known_keys(root: type[BaseModel], path: Sequence[str | int]) -> set[str]:
    """Walk down a place in the document; an index, or the key of a mapping, leads to what the items are."""
    section, in_mapping = root, False
    for step in path:
        if in_mapping or isinstance(step, int):
            in_mapping = False
            continue
        annotation = section.model_fields[step].annotation
        in_mapping = get_origin(annotation) is dict
        inner = [kind for kind in _kinds(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return set()
        section = inner[0]
    return set(section.model_fields)


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield the plain types inside an annotation such as ``dict[str, X]``, ``tuple[X, ...]`` or ``X | None``."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for kind in inner:
        yield from _kinds(kind)
