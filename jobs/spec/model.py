"""The spec's section ``model``: which network, in any of the forms that a person writes, and whose weights.

One vocabulary for jobs and zoos: ``timm/resnet18`` says the same as ``{library: timm, arch: resnet18}``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from storage.manifest import Library, Origin
from workers.errors import ModelError
from workers.inputs.arguments import check_arguments
from workers.inputs.entry import LIBRARY, is_entry

FORMS = "timm/NAME or pytorchcv/NAME, the keys library and arch, or factory: package.module:function"


_MIX_UPS = {
    "job": (
        "'models' is a key of a zoo; a job has one 'model', such as model: timm/mobilenetv3_small_100. 'nestquant zoo' "
        "runs a zoo"
    ),
    "zoo": (
        "'model' is a key of a job; a zoo has 'models', such as models: [timm/mobilenetv3_small_100]. 'nestquant "
        "quantize' runs a job"
    ),
}


def check_kind(document: Any, kind: Literal["job", "zoo"]) -> Any:
    """Return a spec's document as it is.

    Raises:
        ValueError: it names networks as the other kind of spec does, and not as this one.
    """
    own, other = ("model", "models") if kind == "job" else ("models", "model")
    if isinstance(document, dict) and other in document and own not in document:
        raise ValueError(_MIX_UPS[kind])
    return document


def written_out(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section's keys with ``library`` and ``arch`` apart, where ``arch`` names both: ``timm/resnet18``."""
    arch = section.get("arch")
    if "library" in section or not isinstance(arch, str) or "/" not in arch:
        return section
    library, _, name = arch.partition("/")
    if library not in get_args(Library) or not name:
        raise ValueError(f"{arch!r} names no network; expected {FORMS}")
    return {**section, "library": library, "arch": name}


def from_factory(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section's keys with ``library`` and ``arch`` in the place of ``factory``."""
    if section.keys() & {"library", "arch"}:
        raise ValueError("'factory' stands in the place of 'library' and 'arch': give one or the other")
    rest = {key: value for key, value in section.items() if key != "factory"}
    return {"library": LIBRARY, "arch": section["factory"], **rest}


class Section(BaseModel):
    """Base of the spec's sections: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _checked_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        check_arguments(kwargs)
    except ModelError as error:
        raise ValueError(str(error).removeprefix("model.kwargs.").rstrip(".")) from error
    return kwargs


Arguments = Annotated[dict[str, Any], AfterValidator(_checked_arguments)]


class ModelSpec(Section):
    """Which network, and where its weights come from.

    A name alone, ``timm/resnet18``, means that network with the library's own weights; ``arch: timm/resnet18`` says
    ``library`` and ``arch`` in one.

    ``factory: package.module:function`` names an architecture of one's own in the place of both: the function is called
    with ``kwargs`` and returns a torch.nn.Module. Where it is not installed on every machine, ``code`` is its .py file,
    its package's folder, or a .zip of these, and travels with the job.

    ``checkpoint`` is a .safetensors, or what torch.save wrote (a path or an s3:// URI); ``weights`` says which are
    meant where it holds both averaged ones (``ema``, the default there) and the model's own (``model``); ``pretrained``
    lets the library download its own; ``random_seed`` takes the architecture's own initialisation.
    """

    library: Origin
    arch: str
    kwargs: Arguments = Field(default_factory=dict)
    code: str | None = None
    checkpoint: str | None = None
    weights: Literal["ema", "model"] | None = None
    pretrained: bool = False
    random_seed: int | None = Field(
        default=None, description="random weights from this seed: for size tables and load tests"
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, form: Any) -> Any:
        if isinstance(form, str):
            if "/" not in form:
                raise ValueError(f"names no library; expected {FORMS}")
            form = {"arch": form, "pretrained": True}
        if isinstance(form, BaseModel):
            return form
        if not isinstance(form, dict):
            raise ValueError(f"expected {FORMS}")
        if "factory" not in form:
            return written_out(form)
        return from_factory(form)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [self.checkpoint is not None, self.pretrained, self.random_seed is not None]
        if self.library == LIBRARY:
            if not is_entry(self.arch):
                raise ValueError(f"factory is {self.arch!r}; expected package.module:function, such as my_nets:build")
            if self.pretrained:
                raise ValueError("an architecture of one's own has no pretrained weights by name; give 'checkpoint'")
        elif self.code is not None:
            raise ValueError("'code' is that of a 'factory' of one's own; leave it out")
        if sum(sources) != 1:
            raise ValueError("give exactly one of 'checkpoint', 'pretrained: true' and 'random_seed'")
        if self.weights is not None and self.checkpoint is None:
            raise ValueError("'weights' says which of a checkpoint's; give 'checkpoint', or leave it out")
        return self
