"""A zoo's spec: many models, a matrix of recipes, shared image sets and one store, and the jobs that follow from it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from jobs.errors import SpecError
from jobs.spec.document import read_text
from jobs.spec.file import parse_as, parse_spec, read_document
from jobs.spec.job import (
    AnalysisSpec,
    CalibrationSpec,
    ClusterSpec,
    EvaluateSpec,
    JobSpec,
    PreprocessSpec,
    StoreSpec,
)
from jobs.spec.model import FORMS, Section, check_kind, from_factory, written_out
from jobs.spec.quantize import QuantizeSpec
from storage.manifest import Library, ModelName, first_repeated
from workers.errors import nearest
from workers.inputs.entry import LIBRARY, is_entry

_SECTIONS = ("preprocess", "calibration", "evaluate", "analysis")
_NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")


class ZooEntry(Section):
    """Some models, and what is different for them.

    ``models`` is ``library/name``, ``library/pattern`` or ``@file`` with one of these a line; ``library`` and ``arch``,
    as a job's ``model`` has them, say the same for one network, as does ``factory`` for one of your own, with its
    ``code``. ``checkpoint`` may hold
    ``{library}`` and ``{arch}``. A section given here takes the place of the shared one, ``null`` included.
    """

    models: str
    code: str | None = None
    checkpoint: str | None = None
    weights: Literal["ema", "model"] | None = None
    pretrained: bool = False
    random_seed: int | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    preprocess: PreprocessSpec = PreprocessSpec()
    calibration: CalibrationSpec | None = None
    evaluate: EvaluateSpec | None = None
    analysis: AnalysisSpec | None = None
    priority: int = 0
    recipes: tuple[str, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_in_a_job(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"models": value}
        if not isinstance(value, dict) or not {"library", "arch", "factory"} & set(value):
            return value
        if "models" in value:
            raise ValueError("give 'models', or 'library' and 'arch' or 'factory' as in a job, not both")
        entry = from_factory(value) if "factory" in value else written_out(value)
        if lacking := [key for key in ("library", "arch") if not isinstance(entry.get(key), str)]:
            raise ValueError(f"names no network: {lacking[0]!r} is missing or no text; expected {FORMS}")
        rest = {key: value for key, value in entry.items() if key not in ("library", "arch")}
        return {"models": f"{entry['library']}/{entry['arch']}", **rest}


class ZooSpec(Section):
    """Models times recipes.

    ``recipes`` names whole recipes; ``matrix`` maps keys of a recipe to values and stands for every combination. Higher
    ``priority`` starts first; ``max_models`` jobs share the cluster at a time.
    """

    name: ModelName
    store: StoreSpec
    models: tuple[ZooEntry, ...] = Field(min_length=1)
    exclude: tuple[str, ...] = ()
    recipes: dict[str, QuantizeSpec] = Field(default_factory=dict)
    matrix: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    pretrained: bool = False
    random_seed: int | None = None
    preprocess: PreprocessSpec = PreprocessSpec()
    calibration: CalibrationSpec | None = None
    evaluate: EvaluateSpec | None = None
    analysis: AnalysisSpec | None = None
    cluster: ClusterSpec = ClusterSpec()
    max_models: int = Field(default=4, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _no_job(cls, document: Any) -> Any:
        return check_kind(document, "zoo")

    @field_validator("models", mode="before")
    @classmethod
    def _one_alone(cls, models: Any) -> Any:
        return [models] if isinstance(models, str | dict) else models

    @model_validator(mode="after")
    def _known_recipes(self) -> Self:
        if not self.recipes and not self.matrix:
            raise ValueError("give 'recipes' ({w8-4: {bits: [8, 4]}}), 'matrix' ({bits: [[8, 4], [8, 6]]}) or both")
        names = [recipe.name for recipe in recipes_of(self)]
        if len(names) != len(set(names)):
            raise ValueError(f"two recipes have one name: {', '.join(names)}")
        for name in (name for entry in self.models for name in entry.recipes or ()):
            if name not in names:
                raise ValueError(f"no recipe {name!r}.{nearest(name, names)} There are: {', '.join(names)}")
        return self


@dataclass(frozen=True)
class Recipe:
    """A recipe and its name."""

    name: str
    quantize: QuantizeSpec


@dataclass(frozen=True)
class ZooJob:
    """One cell of models times recipes."""

    spec: JobSpec
    recipe: str
    priority: int


def load_zoo(path: str | Path, *, changes: dict[str, Any] | None = None) -> tuple[ZooSpec, list[ZooJob]]:
    """Read a zoo's spec and return it with its jobs, in the order in which they start.

    Raises:
        SpecError: one line for each fault, with the key, what was seen and what was expected.
    """
    spec = parse_as(ZooSpec, read_document(path, changes or {}), where=str(path))
    return spec, expand(spec, folder=Path(path).parent)


def recipes_of(spec: ZooSpec) -> list[Recipe]:
    """Return the named recipes and those of the matrix, which are named after their values: ``8-4-symmetric``."""
    recipes = [Recipe(_slug(name), recipe) for name, recipe in spec.recipes.items()]
    if spec.matrix:
        for values in itertools.product(*spec.matrix.values()):
            document = dict(zip(spec.matrix, values, strict=True))
            name = "-".join(_slug(_words(value)) for value in values)
            recipes.append(Recipe(name, parse_as(QuantizeSpec, document, where=f"matrix, recipe {name!r}")))
    return recipes


def expand(spec: ZooSpec, *, folder: Path) -> list[ZooJob]:
    """Return the jobs, highest priority first, otherwise in the order of the spec.

    A model that several entries name belongs to the last one that does, so that exceptions stand after the rule.

    Args:
        spec: the zoo.
        folder: where ``@file`` is looked for.

    Raises:
        SpecError: a name or pattern that matches nothing, or two jobs under one name.
    """
    chosen: dict[tuple[str, str], ZooEntry] = {}
    for entry in spec.models:
        for library, arch in _models(entry.models, folder):
            if not any(fnmatchcase(f"{library}/{arch}", pattern) for pattern in spec.exclude):
                chosen[library, arch] = entry
    if not chosen:
        raise SpecError("models: every model is excluded.")
    jobs = [
        _job(spec, entry, library, arch, recipe)
        for (library, arch), entry in chosen.items()
        for recipe in recipes_of(spec)
        if entry.recipes is None or recipe.name in entry.recipes
    ]
    if (twice := first_repeated(job.spec.name for job in jobs)) is not None:
        raise SpecError(f"models: two jobs would publish under the name {twice!r}; give their recipes other names.")
    return sorted(jobs, key=lambda job: -job.priority)


def _models(text: str, folder: Path) -> Iterator[tuple[str, str]]:
    if text.startswith("@"):
        lines = read_text(folder / text[1:], "list of models (one library/name a line)").splitlines()
        for line in (line.partition("#")[0].strip() for line in lines):
            if line:
                yield from _models(line, folder)
        return
    from workers.inputs import networks

    library, slash, pattern = text.partition("/")
    if library == LIBRARY and is_entry(pattern):
        yield library, pattern
        return
    if library not in get_args(Library) or not slash or not pattern:
        raise SpecError(
            f"models: {text!r}: expected timm/NAME, pytorchcv/NAME, a pattern such as timm/vit_*, or @file."
        )
    wild = any(sign in pattern for sign in "*?[")
    bare = pattern if wild or library != "timm" else pattern.partition(".")[0]
    archs = networks.names(library, bare)
    if not archs:
        raise SpecError(f"models: {library} has no model {pattern!r}.{nearest(pattern, networks.names(library))}")
    for arch in archs if wild else [pattern]:
        yield library, arch


def _job(spec: ZooSpec, entry: ZooEntry, library: str, arch: str, recipe: Recipe) -> ZooJob:
    weights = _weights(spec, entry)
    if "checkpoint" in weights:
        weights["checkpoint"] = _filled(str(weights["checkpoint"]), library, arch)
    sections = {name: getattr(entry if name in entry.model_fields_set else spec, name) for name in _SECTIONS}
    if recipe.quantize.recipe == "data_free":  # it makes its own images, beside recipes that share the zoo's
        sections["calibration"] = None
    document = {
        "name": _slug(f"{library}.{arch}.{recipe.name}"),
        "model": {"library": library, "arch": arch, "kwargs": entry.kwargs, "code": entry.code, **weights},
        "quantize": recipe.quantize,
        "store": spec.store,
        "cluster": spec.cluster,
        **sections,
    }
    return ZooJob(parse_spec(document, where=f"{entry.models} ({library}/{arch})"), recipe.name, entry.priority)


def _filled(text: str, library: str, arch: str) -> str:
    try:
        return text.format(library=library, arch=arch)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise SpecError(
            f"models: checkpoint {text!r} holds braces other than {{library}} and {{arch}}; double your own."
        ) from error


def _weights(spec: ZooSpec, entry: ZooEntry) -> dict[str, Any]:
    """Return the entry's source of weights, or the zoo's where the entry names none."""
    own = entry.model_dump(include={"checkpoint", "weights", "pretrained", "random_seed"}, exclude_defaults=True)
    return own or spec.model_dump(include={"pretrained", "random_seed"}, exclude_defaults=True)


def _words(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _slug(text: str) -> str:
    """Return a name that a store may hold."""
    return _NOT_IN_NAMES.sub("-", text.lower()).strip("._-")
