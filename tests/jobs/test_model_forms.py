"""One vocabulary for jobs and zoos, and messages of bounded length about what was written instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.errors import SpecError
from jobs.spec.file import load_spec, parse_spec
from jobs.spec.zoo import ZooJob, load_zoo
from storage.errors import BadStoreURI
from storage.wording import bounded
from workers.errors import ModelError

Document = Callable[..., dict[str, Any]]
FORMS = "timm/NAME or pytorchcv/NAME, the keys library and arch, or factory: package.module:function"
NAME = "timm/mobilenetv3_small_100"


def job(model: Any) -> dict[str, Any]:
    return {"name": "net", "model": model, "store": {"uri": "store"}}


def zoo(folder: Path, models: Any, **keys: Any) -> list[ZooJob]:
    document = {"name": "zoo", "models": models, "recipes": {"a": {}}, "store": {"uri": "store"}, **keys}
    (folder / "zoo.yaml").write_text(yaml.safe_dump(document))
    return load_zoo(folder / "zoo.yaml")[1]


def told(read: Callable[[], object]) -> str:
    with pytest.raises(SpecError) as caught:
        read()
    return str(caught.value)


def test_a_name_alone_is_a_model_with_the_librarys_own_weights() -> None:
    model = parse_spec(job(NAME), where="job").model
    assert (model.library, model.arch, model.pretrained) == ("timm", "mobilenetv3_small_100", True)
    long = {"library": "timm", "arch": "mobilenetv3_small_100", "pretrained": True}
    assert parse_spec(job(long), where="job").model == model


def test_a_name_in_arch_says_the_library_too() -> None:
    short = {"arch": NAME, "checkpoint": "weights.pth", "weights": "ema"}
    long = {"library": "timm", "arch": "mobilenetv3_small_100", "checkpoint": "weights.pth", "weights": "ema"}
    assert parse_spec(job(short), where="job") == parse_spec(job(long), where="job")


def test_changes_reach_into_a_name(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job(NAME)))
    model = load_spec(tmp_path / "job.yaml", changes={"model.checkpoint": "w.safetensors"}).model
    assert (model.arch, model.checkpoint, model.pretrained) == ("mobilenetv3_small_100", "w.safetensors", False)


@pytest.mark.parametrize(
    "models",
    [
        NAME,
        [NAME],
        {"models": NAME},
        [{"library": "timm", "arch": "mobilenetv3_small_100"}],
        [{"arch": NAME}],
    ],
)
def test_a_zoo_takes_both_forms(models: Any, tmp_path: Path) -> None:
    (only,) = zoo(tmp_path, models, random_seed=3)
    assert only.spec.name == "timm.mobilenetv3_small_100.a"
    assert only.spec.model.model_dump(exclude_defaults=True) == {
        "library": "timm",
        "arch": "mobilenetv3_small_100",
        "random_seed": 3,
    }


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("resnet18", f"job: 'model': names no library; expected {FORMS}. Seen: 'resnet18'."),
        ("keras/vgg", f"job: 'model': 'keras/vgg' names no network; expected {FORMS}. Seen: 'keras/vgg'."),
        (["timm", "vgg"], f"job: 'model': expected {FORMS}. Seen: ['timm', 'vgg']."),
    ],
)
def test_a_model_in_no_form_is_one_line(model: Any, line: str) -> None:
    assert told(lambda: parse_spec(job(model), where="job")) == line


def test_a_zoo_read_as_a_job_and_a_job_read_as_a_zoo_are_one_line(tmp_path: Path) -> None:
    line = told(lambda: parse_spec({"name": "net", "models": [NAME], "recipes": {}, "store": {}}, where="job"))
    assert line == (
        f"job: 'spec': 'models' is a key of a zoo; a job has one 'model', such as model: {NAME}. 'nestquant zoo' runs "
        "a zoo."
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job(NAME)))
    line = told(lambda: load_zoo(tmp_path / "job.yaml"))
    assert line == (
        f"{tmp_path}/job.yaml: 'spec': 'model' is a key of a job; a zoo has 'models', such as models: [{NAME}]. "
        "'nestquant quantize' runs a job."
    )


@pytest.mark.parametrize("entry", [{"models": NAME, "arch": "resnet18"}, {"library": "timm"}, {"arch": 3}])
def test_an_entry_of_a_zoo_that_names_no_network_or_two_is_one_line(entry: dict[str, Any], tmp_path: Path) -> None:
    line = told(lambda: zoo(tmp_path, [entry], random_seed=0))
    assert len(line.splitlines()) == 1
    assert "'models.0': " in line
    assert "give 'models', or" in line or "names no network: " in line


def test_thousands_of_wrong_items_are_twenty_lines_and_a_count(tiny_document: Document) -> None:
    lines = told(lambda: parse_spec(tiny_document(quantize__bits=["x"] * 40_000), where="job")).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "job: and 39980 faults more"


@pytest.mark.parametrize("kind", [SpecError, ModelError, BadStoreURI])
@pytest.mark.parametrize(
    "seen",
    ["'" + "a b " * 250_000 + "'", "a" * 1_000_000, str([0.5] * 50_000), '"' + "x y" * 100_000 + '"'],
    ids=["quoted", "bare", "list", "double"],
)
def test_no_message_shows_more_than_two_hundred_characters_of_what_was_seen(kind: type[Exception], seen: str) -> None:
    line = str(kind(f"timm has no model {seen}. Did you mean 'resnet18'?"))
    head, _, tail = line.removeprefix("timm has no model ").partition(" ... ")
    assert line.endswith(". Did you mean 'resnet18'?")
    assert seen.startswith(head)
    assert len(head) + len(" ... ") + len(tail.removesuffix(". Did you mean 'resnet18'?")) <= 200


def test_many_short_words_are_cut_with_their_line_and_plain_messages_stay() -> None:
    assert len(bounded(", ".join(["'aa'"] * 100_000))) == 2000
    plain = "model.arch is 'resnet181'; expected one of timm's. " * 6
    assert bounded(plain) == plain
    assert bounded("two\nlines " * 40) == "two\nlines " * 40
