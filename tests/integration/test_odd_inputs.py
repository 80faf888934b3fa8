"""Networks that do not run on one image: refused before work where the job runs them, quantized where it reads weights
alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.driver import run_job
from jobs.errors import PlanError
from jobs.events import Event
from jobs.executors import open_executor
from jobs.spec.file import parse_spec
from jobs.spec.job import ClusterSpec
from storage.registry import Registry
from storage.stores.uri import open_store
from workers.errors import ModelError
from workers.executor import InProcessExecutor
from workers.inputs import networks
from workers.inputs.checkpoint import random_state

Document = Callable[..., dict[str, Any]]

TWO = {
    "nvpattexp116bazel76": "2 inputs, x and pid",
    "propainter_ip": "3 inputs, frames and masks and comp_flows",
    "propainter_rfc": "2 inputs, masked_flows and masks",
    "raft_small": "2 inputs, image1 and image2",
    "visemenet20": "2 inputs, x and pid",
    "voca8flame": "2 inputs, x and pid",
}

ODD_NETS = '''
import torch
from torch import nn

class Odd(nn.Module):
    """Looks at values, so that it does not run without them; then it asserts what nothing meets, or does not."""

    def __init__(self, fails):
        super().__init__()
        self.fails = fails
        self.stem = nn.Conv2d(3, 8, 3)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        assert not (self.fails and float(x.sum()) > -1e9)
        return self.classifier(x) if float(x.sum()) > -1e9 else x

def build(fails=False):
    return Odd(fails)
'''


def network(library: str, arch: str, **keys: Any) -> dict[str, Any]:
    return {"library": library, "arch": arch, "random_seed": 0, **keys}


def refusal(document: dict[str, Any]) -> tuple[str, list[str]]:
    """Run a job that is refused; return its line, and the stages that it ended."""
    stages: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "finished":
            stages.append(event.stage)

    with pytest.raises((PlanError, ModelError)) as caught:
        run_job(parse_spec(document, where="test"), InProcessExecutor(), listen)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value), stages


@pytest.mark.parametrize("arch", sorted(TWO))
def test_a_network_of_two_inputs_is_refused_before_work_where_the_job_runs_it(
    arch: str, tiny_document: Document, tiny_images: Path, tmp_path: Path
) -> None:
    plain = {"model": network("pytorchcv", arch), "preprocess": {}, "calibration": None, "evaluate": None}
    begin = f"pytorchcv {arch} cannot run on one image: its forward takes {TWO[arch]}; expected one, an image. "
    assert refusal(tiny_document(**plain, quantize={})) == (
        f"{begin}The job runs it for quantize.recipe 'auto'; say 'quantize: {{recipe: paper}}' to quantize it without, "
        "or take a network of images.",
        ["validate"],
    )
    plain["evaluate"] = {"data": str(tiny_images)}
    paper = {"recipe": "paper", "activations": {"observer": "sigma"}}
    assert refusal(tiny_document(**plain, quantize=paper)) == (
        f"{begin}The job runs it for quantize.activations and evaluate; leave quantize.activations, evaluate out to "
        "quantize it without, or take a network of images.",
        ["validate"],
    )
    assert not (tmp_path / "store" / "models").exists()


@pytest.mark.parametrize("arch", ["nvpattexp116bazel76", "voca8flame"])
def test_a_network_of_two_inputs_is_quantized_where_its_weights_alone_count(
    arch: str, tiny_document: Document, tmp_path: Path
) -> None:
    plain = {"model": network("pytorchcv", arch), "preprocess": {}, "calibration": None, "evaluate": None}
    result = run_job(
        parse_spec(tiny_document(**plain, quantize={"recipe": "paper"}), where="test"), InProcessExecutor()
    )
    assert result.tags == ("latest",)
    assert result.notes == (
        f"{arch} does not run without data (its forward takes {TWO[arch]}; expected one, an image): its layers stand "
        "as registered.",
    )


@pytest.mark.parametrize(("arch", "sides"), [("superpointnet", (224, 224)), ("pfpcnet", (320, 240))])
def test_a_network_of_one_channel_has_inputs_of_one(arch: str, sides: tuple[int, int]) -> None:
    outline = networks.build("pytorchcv", arch, meta=True)
    assert networks.default_preprocessing("pytorchcv", outline).input_shape == (1, *sides)


def test_a_network_of_one_channel_runs_and_is_published_as_one(tiny_document: Document, tmp_path: Path) -> None:
    document = tiny_document(
        model=network("pytorchcv", "superpointnet"),
        preprocess={"size": 32},
        calibration=None,
        evaluate=None,
        quantize={"recipe": "paper", "activations": {"observer": "sigma"}},
    )
    run_job(parse_spec(document, where="test"), InProcessExecutor())
    manifest = Registry(open_store(str(tmp_path / "store"))).resolve("tiny", 1).manifest
    assert manifest.preprocessing is not None
    assert len(manifest.preprocessing["mean"]) == 1
    assert sum(layer.activation is not None for layer in manifest.layers) == len(manifest.layers) - 1


@pytest.mark.parametrize("arch", ["jasperdr10x5_en", "quartznet15x5_en"])
def test_a_network_of_sound_is_refused_before_work(arch: str, tiny_document: Document) -> None:
    there = importlib.util.find_spec("librosa") is not None
    line, stages = refusal(tiny_document(model=network("pytorchcv", arch), preprocess={}, evaluate=None, quantize={}))
    if there:
        assert "takes no images: its in_size is" in line
    else:
        assert stages == []
        assert line == (
            f"pytorchcv {arch} needs the Python package 'librosa', which is not installed; install it wherever the "
            "network is built, or take another architecture."
        )


def test_a_constructor_that_computes_with_values_is_refused_before_work(tiny_document: Document) -> None:
    line, stages = refusal(tiny_document(model=network("pytorchcv", "propainter"), preprocess={}, quantize={}))
    assert stages == []
    assert line.startswith(
        "pytorchcv propainter cannot be planned: planning and devices build a network without memory"
    )


def test_nothing_to_quantize_says_why(tiny_document: Document) -> None:
    plain = {"preprocess": {}, "calibration": None, "evaluate": None, "quantize": {"recipe": "paper"}}
    line, _ = refusal(tiny_document(model=network("pytorchcv", "propainter_ip"), **plain))
    assert line == "Nothing to quantize in propainter_ip: it has no layers of a kind that is quantized."


@pytest.mark.parametrize("on_ray", [False, True])
def test_a_network_that_only_data_can_try_is_tried_with_data_before_work(
    tiny_document: Document, tiny_images: Path, tmp_path: Path, on_ray: bool, ray_cluster: None
) -> None:
    (tmp_path / "odd_nets.py").write_text(ODD_NETS)
    model = {"factory": "odd_nets:build", "code": str(tmp_path / "odd_nets.py"), "random_seed": 0}
    paper, judged = {"recipe": "paper"}, {"data": str(tiny_images), "accept_chance": True}
    sides = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    runs = tiny_document(model=model, calibration=None, quantize=paper, evaluate=judged, preprocess=sides)
    document = {**runs, "model": {**model, "kwargs": {"fails": True}}}
    with open_executor(ClusterSpec(), local=not on_ray) as executor:
        assert run_job(parse_spec(runs, where="test"), executor).tags == ("latest",)
        with pytest.raises(PlanError) as caught:
            run_job(parse_spec(document, where="test"), executor)
    assert str(caught.value).startswith(
        "own odd_nets:build cannot run on one image: inputs of 1 x 3 x 32 x 32: AssertionError at 'assert not "
        "(self.fails and float(x.sum()) > -1e9)' (odd_nets.py:16). The job runs it for evaluate; leave evaluate out"
    )
    assert run_job(parse_spec({**document, "evaluate": None}, where="test"), InProcessExecutor()).tags == ("latest",)


def test_what_a_constructor_never_initialises_follows_the_seed() -> None:
    first, second = (random_state("pytorchcv", "nvpattexp116bazel76", {}, seed=3)["decoder.weight"] for _ in range(2))
    other = random_state("pytorchcv", "nvpattexp116bazel76", {}, seed=4)["decoder.weight"]
    assert np.array_equal(first.numpy(), second.numpy())
    assert not np.array_equal(first.numpy(), other.numpy())
    assert 0 < float(first.abs().max()) < 1
