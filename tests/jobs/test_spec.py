"""What a person may write in a spec, and what a person is told who writes something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cluster.request import request_digest, revision
from jobs.errors import SpecError
from jobs.spec.file import load_spec, parse_spec, with_changes
from jobs.spec.job import METHOD_VERSIONS
from storage.manifest import canonical_json

Document = Callable[..., dict[str, Any]]


def told(document: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(document, where="job.yaml")
    return str(caught.value)


def test_a_spec_reads_the_same_from_yaml_and_json(tiny_document: Document, tmp_path: Path) -> None:
    document = tiny_document()
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(document))
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert load_spec(tmp_path / "a.yaml") == load_spec(tmp_path / "a.json")


def test_an_unknown_key_is_refused_with_the_nearest_right_name(tiny_document: Document) -> None:
    message = told(tiny_document(quantize__bitz=[8, 4]))
    assert message == (
        "job.yaml: unknown key 'quantize.bitz'. Did you mean 'bits'? "
        "Known here: activations, bits, equalize, ignore, mixed, overrides, protect, range, recipe, rounding, scheme."
    )


def test_an_unknown_key_inside_an_override_names_what_is_known_there(tiny_document: Document) -> None:
    message = told(tiny_document(quantize__overrides={"conv*": {"schema": "symmetric"}}))
    assert "Did you mean 'scheme'? Known here: bits, rounding, scheme." in message


@pytest.mark.parametrize("bits", [[4, 8], [8, 8], [9, 4], [8, 0], []])
def test_widths_count_down_within_one_to_eight(tiny_document: Document, bits: list[int]) -> None:
    message = told(tiny_document(quantize__bits=bits))
    assert message == (
        f"job.yaml: 'quantize.bits': bits are {bits}; expected widths from 1 to 8 that count down, full width first, "
        f"such as [8, 4]. Seen: {bits!r}."
    )


def test_exactly_one_source_of_weights(tiny_document: Document) -> None:
    assert "exactly one of 'checkpoint', 'pretrained: true' and 'random_seed'" in told(
        tiny_document(model__pretrained=True)
    )


def test_calibrated_ranges_need_images(tiny_document: Document) -> None:
    document = tiny_document()
    del document["calibration"]
    assert "'mse' needs 'calibration: {data: ...}'; 'sigma' works without images" in told(document)


def test_data_free_makes_its_own_images_and_takes_no_others(tiny_document: Document) -> None:
    document = tiny_document(quantize__recipe="data_free")
    assert told(document) == (
        "job.yaml: 'spec': quantize.recipe 'data_free' makes images of its own: leave 'calibration' out, or say "
        "'calibrated'."
    )
    del document["calibration"]
    spec = parse_spec(document, where="job.yaml")
    assert spec.quantize.activations is not None
    assert (spec.quantize.recipe, spec.quantize.activations.observer) == ("data_free", "mse")


def test_every_fault_is_told_at_once(tiny_document: Document) -> None:
    message = told(tiny_document(name="No Spaces", store__shard_bytes=1))
    assert len(message.splitlines()) == 2
    assert "'name'" in message
    assert "'store.shard_bytes'" in message


def test_a_missing_file_and_broken_yaml_are_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^No spec at .*nowhere\.yaml: there is no such file\.$"):
        load_spec(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("name: [1,\nmodel: {")
    with pytest.raises(SpecError, match=r"broken\.yaml is not valid YAML in line"):
        load_spec(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(SpecError, match="holds a list; expected keys"):
        load_spec(tmp_path / "list.yaml")


def test_dotted_changes_reach_inside_and_leave_the_document_alone() -> None:
    document = {"a": {"b": 1, "c": 2}}
    assert with_changes(document, {"a.b": 3, "d.e.f": 4}) == {"a": {"b": 3, "c": 2}, "d": {"e": {"f": 4}}}
    assert document == {"a": {"b": 1, "c": 2}}


def test_jobs_of_earlier_releases_keep_their_identity() -> None:
    """A ledger lives under it: another identity would do all the work again. Taken from a release before this test."""
    document = {
        "name": "net",
        "model": {"library": "timm", "arch": "resnet18", "kwargs": {"num_classes": 10}, "checkpoint": "w.safetensors"},
        "preprocess": {"size": 32, "resize": 36, "mean": [0.5, 0.5, 0.5], "interpolation": "bilinear"},
        "quantize": {"recipe": "paper", "bits": [8, 4], "activations": {"observer": "mse"}},
        "calibration": {"data": "x.npz", "samples": 64},
        "store": {"uri": "store"},
    }
    digests = {"source_digest": "sha256:" + "0" * 64, "calibration_digest": "sha256:" + "1" * 64}
    found = parse_spec(document, where="test").identity(**digests)
    assert found == "sha256:018387c032b5db181f41ef872f9bc1fcf4383903cea446ea37033c2c842235eb"
    document["preprocess"] = {
        "size": [32, 32],
        "resize": [36, 36],
        "mean": [0.5, 0.5, 0.5],
        "interpolation": "bilinear",
    }
    assert parse_spec(document, where="test").identity(**digests) == found
    document["preprocess"] = {"size": [32, 48]}
    assert parse_spec(document, where="test").identity(**digests) != found


@pytest.mark.parametrize("key", ["size", "resize"])
@pytest.mark.parametrize(
    "sides", [7, 8193, -1, "x", 32.5, True, [32], [32, 4], [32, 32, 32], [32, "x"], {"a": 1}, [], ""]
)
def test_sizes_that_no_input_has_are_one_line(key: str, sides: Any, tiny_document: Document) -> None:
    with pytest.raises(SpecError) as told:
        parse_spec(tiny_document(**{f"preprocess__{key}": sides}), where="test")
    assert str(told.value).startswith(
        f"test: 'preprocess.{key}': expected 8 to 8192 pixels, or two such numbers, [height, width]."
    )
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(("given", "kept"), [(8, 8), (32.0, 32), ("224", 224), ([32, 48], (32, 48)), ([48.0, 48], 48)])
def test_sizes_are_numbers_or_two_of_them(given: Any, kept: Any, tiny_document: Document) -> None:
    assert parse_spec(tiny_document(preprocess__size=given), where="test").preprocess.size == kept


def test_identity_follows_what_is_asked_and_not_where_it_runs(tiny_document: Document) -> None:
    def identity(**changes: Any) -> str:
        spec = parse_spec(tiny_document(**changes), where="job.yaml")
        return spec.identity(source_digest="sha256:" + "0" * 64, calibration_digest="sha256:" + "1" * 64)

    reference = identity()
    assert identity(cluster__task_weights=1, store__uri="/elsewhere", evaluate__limit=3) == reference
    changed = {
        identity(quantize__bits=[8, 5]),
        identity(quantize__scheme="symmetric"),
        identity(store__shard_bytes=8192),
        identity(calibration__samples=25),
        identity(name="other"),
    }
    assert len(changed) == 5
    assert reference not in changed


def test_which_weights_of_a_checkpoint_is_a_key_that_changes_nothing_where_it_is_left_out(
    tiny_document: Document,
) -> None:
    spec = parse_spec(tiny_document(), where="job.yaml")
    given = parse_spec(tiny_document(model__weights="model"), where="job.yaml")
    digest = {"source_digest": "sha256:" + "0" * 64, "calibration_digest": None}
    assert given.identity(**digest) == spec.identity(**digest)  # what was taken is in the source's digest
    # The request's document, as releases before the key wrote it.
    document = spec.model_dump(mode="json", exclude={"cluster": True, "store": {"uri", "single_writer"}})
    document["method"] = METHOD_VERSIONS["paper"]
    document["model"] |= {"revision": revision(spec)}
    del document["labels"]
    for later in ("checkpoint", "weights", "code"):
        del document["model"][later]
    for section in ("calibration", "evaluate"):
        document[section]["data"] = f"sha256:{hashlib.sha256(Path(document[section]['data']).read_bytes()).hexdigest()}"
    assert request_digest(spec) == f"sha256:{hashlib.sha256(canonical_json(document)).hexdigest()}"
    assert request_digest(given) != request_digest(spec)


@pytest.mark.parametrize("name", ["con", "nul", "aux.v2", "com1", "lpt9.net"])
def test_a_name_that_no_store_may_hold_is_refused_before_work(tiny_document: Document, name: str) -> None:
    message = told(tiny_document(name=name))
    assert message.startswith(
        f"job.yaml: 'name': key 'models/{name}/versions/00000001.json': {name!r} is a device name"
    )
    assert message.endswith(f" on some systems; choose another. Seen: {name!r}.")


@pytest.mark.parametrize(
    ("tag", "said"), [("con", "is a device name"), ("12", "not digits alone"), ("New", "of a-z"), ("a/b", "of a-z")]
)
def test_a_tag_that_no_store_may_hold_is_refused_before_work(tiny_document: Document, tag: str, said: str) -> None:
    message = told(tiny_document(store__tags=["latest", tag]))
    assert message.startswith("job.yaml: 'store.tags")
    assert said in message


def test_which_weights_is_for_a_checkpoint_alone(tiny_document: Document) -> None:
    message = told(tiny_document(model={"library": "timm", "arch": "test_resnet", "random_seed": 1, "weights": "ema"}))
    assert "'weights' says which of a checkpoint's; give 'checkpoint', or leave it out" in message
    message = told(tiny_document(model__weights="best"))
    assert "'model.weights': Input should be 'ema' or 'model'. Seen: 'best'." in message


def test_the_published_range_leaves_no_trace_and_the_nested_one_is_another_job(tiny_document: Document) -> None:
    digests = {"source_digest": "sha256:" + "0" * 64, "calibration_digest": "sha256:" + "1" * 64}
    plain, full, nested = (
        parse_spec(tiny_document(**changes), where="job.yaml")
        for changes in ({}, {"quantize__range": "full"}, {"quantize__range": "nested"})
    )
    assert "range" not in full.quantize.model_dump(mode="json")
    assert nested.quantize.model_dump(mode="json")["range"] == "nested"
    assert plain.identity(**digests) == full.identity(**digests) != nested.identity(**digests)
    with pytest.raises(SpecError, match=r"quantize\.range"):
        parse_spec(tiny_document(quantize__range="part"), where="job.yaml")


@pytest.mark.parametrize(("images", "recipe"), [(True, "calibrated"), (False, "data_free")])
def test_auto_is_the_best_that_the_images_allow_and_one_job_with_its_name(
    images: bool, recipe: str, tiny_document: Document, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {} if images else {"calibration": None}
    unsaid = tiny_document(**changes)
    del unsaid["quantize"]["recipe"]
    specs = [
        parse_spec(document, where="job.yaml")
        for document in (
            unsaid,
            tiny_document(quantize__recipe="auto", **changes),
            tiny_document(quantize__recipe=recipe, **changes),
        )
    ]
    assert [spec.recipe for spec in specs] == [recipe] * 3
    assert [spec.effective_quantize for spec in specs] == [specs[2].quantize] * 3
    digests = {"source_digest": "sha256:" + "0" * 64, "calibration_digest": None}
    assert len({spec.identity(**digests) for spec in specs}) == 1
    assert len({request_digest(spec) for spec in specs}) == 1
    paper = parse_spec(tiny_document(quantize={"recipe": "paper"}, **changes), where="job.yaml")
    assert (paper.recipe, paper.effective_quantize) == ("paper", paper.quantize)


def test_auto_without_images_has_ranges_from_those_that_it_makes(tiny_document: Document) -> None:
    spec = parse_spec(tiny_document(quantize__recipe="auto", calibration=None), where="job.yaml")
    assert spec.quantize.activations is not None
    assert spec.quantize.activations.observer == "mse"
