"""Zoo specs: which jobs they stand for, in which order, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.errors import SpecError
from jobs.spec.job import EvaluateSpec, JobSpec, PreprocessSpec
from jobs.spec.zoo import ZooJob, ZooSpec, expand, load_zoo

W84 = {"w8-4": {"bits": [8, 4]}}


def zoo(models: list[Any], **keys: Any) -> ZooSpec:
    document = {"name": "zoo", "store": {"uri": "memory://zoo"}, "random_seed": 0, "recipes": W84, **keys}
    return ZooSpec.model_validate({**document, "models": models})


def names(spec: ZooSpec, folder: Path = Path()) -> list[str]:
    return [job.spec.name for job in expand(spec, folder=folder)]


def by_name(spec: ZooSpec) -> dict[str, ZooJob]:
    return {job.spec.name: job for job in expand(spec, folder=Path())}


def test_wildcards_ask_the_libraries_and_exclude_takes_away() -> None:
    spec = zoo(["timm/test_vit?", "pytorchcv/resnet?0_cifar10"], exclude=["*/test_vit3"])
    assert names(spec) == [
        "timm.test_vit2.w8-4",
        "timm.test_vit4.w8-4",
        "pytorchcv.resnet20_cifar10.w8-4",
    ]


def test_a_file_lists_models_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "models.txt").write_text("# the small ones\ntimm/test_vit  # plain\n\npytorchcv/resnet20_cifar10\n")
    assert names(zoo(["@models.txt"]), tmp_path) == ["timm.test_vit.w8-4", "pytorchcv.resnet20_cifar10.w8-4"]


def test_a_matrix_is_every_combination_beside_the_named_recipes() -> None:
    spec = zoo(["timm/test_vit"], matrix={"bits": [[8, 6], [8, 3]], "scheme": ["symmetric", "asymmetric"]})
    jobs = by_name(spec)
    assert list(jobs) == [
        "timm.test_vit.w8-4",
        "timm.test_vit.8-6-symmetric",
        "timm.test_vit.8-6-asymmetric",
        "timm.test_vit.8-3-symmetric",
        "timm.test_vit.8-3-asymmetric",
    ]
    quantize = jobs["timm.test_vit.8-3-symmetric"].spec.quantize
    assert (quantize.bits, quantize.scheme) == ((8, 3), "symmetric")


def test_higher_priority_starts_first_and_equals_keep_their_order() -> None:
    spec = zoo(["timm/test_vit", {"models": "timm/test_vit2", "priority": 3}, "timm/test_vit3"])
    assert names(spec) == ["timm.test_vit2.w8-4", "timm.test_vit.w8-4", "timm.test_vit3.w8-4"]


def test_a_later_entry_takes_a_model_over_with_its_own_weights_and_sections() -> None:
    own = {
        "models": "timm/test_vit2",
        "checkpoint": "weights/{library}-{arch}.safetensors",
        "evaluate": None,
        "weights": "model",
    }
    jobs = by_name(zoo(["timm/test_vit?", own], evaluate={"data": "val.tar"}, preprocess={"size": 64}))
    other, changed = jobs["timm.test_vit3.w8-4"].spec, jobs["timm.test_vit2.w8-4"].spec
    assert len(jobs) == 3
    assert (other.model.random_seed, other.model.checkpoint, other.evaluate) == (0, None, EvaluateSpec(data="val.tar"))
    assert (changed.model.random_seed, changed.model.checkpoint) == (None, "weights/timm-test_vit2.safetensors")
    assert (changed.model.weights, other.model.weights) == ("model", None)
    assert changed.evaluate is None
    assert changed.preprocess == other.preprocess == PreprocessSpec(size=64)


def test_an_entry_may_take_some_recipes_only() -> None:
    spec = zoo(
        ["timm/test_vit", {"models": "timm/test_vit2", "recipes": ["w8-6"]}], recipes={**W84, "w8-6": {"bits": [8, 6]}}
    )
    assert names(spec) == ["timm.test_vit.w8-4", "timm.test_vit.w8-6", "timm.test_vit2.w8-6"]


def test_a_recipe_without_images_leaves_the_zoos_calibration_to_the_others() -> None:
    recipes = {"images": {"recipe": "calibrated"}, "none": {"recipe": "data_free"}}
    jobs = by_name(zoo(["timm/test_vit"], recipes=recipes, calibration={"data": "images.npz"}))
    assert jobs["timm.test_vit.images"].spec.calibration is not None
    assert jobs["timm.test_vit.none"].spec.calibration is None


def test_pretrained_tags_stay_part_of_the_name() -> None:
    (job,) = expand(zoo(["timm/test_vit.r160_in1k"]), folder=Path())
    assert (job.spec.model.arch, job.spec.name) == ("test_vit.r160_in1k", "timm.test_vit.r160_in1k.w8-4")


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["timm/test_vitt"], r"models: timm has no model 'test_vitt'. Did you mean 'test_vit"),
        (["keras/vgg"], r"models: 'keras/vgg': expected timm/NAME, pytorchcv/NAME"),
        (["resnet18"], r"models: 'resnet18': expected timm/NAME"),
        (["@nowhere.txt"], r"No list of models \(one library/name a line\) at .*nowhere\.txt: there is no such file\."),
        (["timm/no_such_*"], r"models: timm has no model 'no_such_\*'"),
    ],
)
def test_a_model_that_is_none_is_refused(models: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        names(zoo(models))


def test_two_jobs_under_one_name_are_refused() -> None:
    spec = zoo(["timm/test_vit"], recipes={"a b": {"bits": [8, 4]}}, matrix={"bits": [[8, 5]]})
    assert names(spec) == ["timm.test_vit.a-b", "timm.test_vit.8-5"]
    with pytest.raises(ValueError, match="two recipes have one name: 8-5, 8-5"):
        zoo(["timm/test_vit"], recipes={"8 5": {"bits": [8, 5]}}, matrix={"bits": [[8, 5]]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modles: [timm/test_vit]", r"unknown key 'modles'. Did you mean 'models'"),
        (
            "models: [{models: timm/test_vit, chekpoint: x}]",
            r"unknown key 'models.0.chekpoint'. Did you mean 'checkpoint'",
        ),
        ("recipes: {a: {bitz: [8, 4]}}", r"unknown key 'recipes.a.bitz'. Did you mean 'bits'"),
        ("recipes: {a: {bits: [4, 8]}}", r"'recipes.a.bits': bits are \[4, 8\]; expected widths"),
        ("matrix: {bitz: [[8, 4]]}", r"matrix, recipe '8-4': unknown key 'bitz'. Did you mean 'bits'"),
        (
            "models: [{models: timm/test_vit, recipes: [w84]}]",
            r"no recipe 'w84'. Did you mean 'w8-4'\? There are: w8-4",
        ),
        *(
            (
                f"models: [{{models: timm/test_vit, checkpoint: 'weights/{odd}.pth'}}]",
                r"holds braces other than \{library\}",
            )
            for odd in ("{name}", "{}", "{0}", "{library.x}", "{arch", "{arch[x]}")
        ),
        ("recipes: {}", r"give 'recipes' .* 'matrix' .* or both"),
        ("random_seed: null", r"timm/test_vit \(timm/test_vit\): 'model': give exactly one of 'checkpoint'"),
    ],
)
def test_faults_name_the_key_and_the_nearest_right_one(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "zoo.yaml"
    base = (
        "name: z\nstore: {uri: memory://z}\nmodels: [timm/test_vit]\nrandom_seed: 0\nrecipes: {w8-4: {bits: [8, 4]}}\n"
    )
    key = text.partition(":")[0]
    path.write_text("".join(line for line in base.splitlines(keepends=True) if not line.startswith(key)) + text + "\n")
    with pytest.raises(SpecError, match=message):
        load_zoo(path)


def test_changes_from_the_command_line_win(tmp_path: Path) -> None:
    path = tmp_path / "zoo.yaml"
    path.write_text("{name: z, store: {uri: memory://z}, models: [timm/test_vit], recipes: {a: {bits: [8, 4]}}}")
    spec, jobs = load_zoo(path, changes={"random_seed": 7, "store.uri": "memory://other", "max_models": 2})
    assert (spec.max_models, [job.spec.model.random_seed for job in jobs]) == (2, [7])
    assert isinstance(jobs[0].spec, JobSpec)
    assert jobs[0].spec.store.uri == "memory://other"
