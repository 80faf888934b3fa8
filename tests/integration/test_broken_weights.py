"""Weights that no network computes with, and files that change under a job: refused, by tensor, and nothing is
published.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.driver import run_job
from jobs.events import Event
from jobs.spec.file import parse_spec
from storage.errors import NotFound
from storage.registry import Registry
from storage.stores.uri import open_store
from tests.tiny import MODEL as TINY
from workers.errors import CheckpointError
from workers.executor import Executor, InProcessExecutor
from workers.inputs.checkpoint import random_state, save_state
from workers.on_ray.executor import RayExecutor, RaySettings

Document = Callable[..., dict[str, Any]]


class Elsewhere(InProcessExecutor):
    """Workers that do not see the driver's files: weights go through the store."""

    same_machine = False


def broken(folder: Path, tensor: str, value: float, *, pickled: bool = False) -> Path:
    """Write the tiny network's weights with one value changed."""
    state = random_state(TINY["library"], TINY["arch"], dict(TINY["kwargs"]), seed=7)
    state[tensor].flatten()[-1] = value
    if not pickled:
        return save_state(state, folder / "mine.safetensors")
    torch.save({"state_dict": state}, folder / "mine.pth")
    return folder / "mine.pth"


def refused(document: dict[str, Any], executor: Executor) -> str:
    """Run the job, which must fail for its weights and leave no version behind; return what it said."""
    with pytest.raises(CheckpointError) as caught:
        run_job(parse_spec(document, where="test"), executor)
    store = open_store(document["store"]["uri"])
    assert [info.key for info in store.list() if not info.key.startswith("doctor/")] == []
    with pytest.raises(NotFound):
        Registry(store).resolve("tiny")
    return str(caught.value)


FAULTS = [
    ("bn1.running_var", math.nan, "holds NaN"),
    ("fc.bias", math.inf, "holds infinity"),
    ("bn1.running_mean", -math.inf, "holds infinity"),
    ("conv1.0.weight", math.nan, "holds NaN"),
    ("bn1.running_var", -0.25, "holds a variance below zero, -0.25"),
    ("fc.weight", 3e38, "holds 3e+38; beyond 1.8e+19 products overflow float32"),
    ("bn1.bias", -3e38, "holds -3e+38; beyond 1.8e+19 products overflow float32"),
]


@pytest.mark.parametrize(("tensor", "value", "said"), FAULTS)
@pytest.mark.parametrize("pickled", [False, True])
def test_a_value_that_no_network_computes_with_is_refused_by_tensor(
    tiny_document: Document, tmp_path: Path, tensor: str, value: float, said: str, *, pickled: bool
) -> None:
    weights = broken(tmp_path, tensor, value, pickled=pickled)
    told = refused(tiny_document(model__checkpoint=str(weights)), InProcessExecutor())
    assert told.startswith(f"{weights}: tensor {tensor!r} {said}"), told


@pytest.mark.parametrize("recipe", ["paper", "calibrated", "data_free"])
@pytest.mark.parametrize("executor", [InProcessExecutor(), Elsewhere()], ids=["here", "elsewhere"])
def test_every_recipe_refuses(tiny_document: Document, tmp_path: Path, recipe: str, executor: Executor) -> None:
    document = tiny_document(model__checkpoint=str(broken(tmp_path, "bn1.running_var", math.nan)), evaluate=None)
    document["quantize"] = {"recipe": recipe}
    if recipe == "data_free":
        document["calibration"] = None
    assert "tensor 'bn1.running_var' holds NaN" in refused(document, executor)


def test_ray_workers_refuse(tiny_document: Document, tmp_path: Path, ray_cluster: None) -> None:
    weights = broken(tmp_path, "fc.bias", math.inf)
    with RayExecutor(RaySettings(max_in_flight=3)) as executor:
        told = refused(tiny_document(model__checkpoint=str(weights)), executor)
    assert told.startswith(f"{weights}: tensor 'fc.bias' holds infinity"), told


def test_the_largest_numbers_that_are_allowed_make_a_version(tiny_document: Document, tmp_path: Path) -> None:
    weights = broken(tmp_path, "fc.bias", float(np.float32(2.0**64)))
    document = tiny_document(model__checkpoint=str(weights), evaluate=None, quantize={"bits": [8, 4]})
    assert run_job(parse_spec(document, where="test"), InProcessExecutor()).version == 1


def test_a_checkpoint_written_again_under_its_name_makes_the_version_that_it_holds(
    tiny_document: Document, tmp_path: Path
) -> None:
    """One process, one path, two contents: each version is that of its own weights, as if it had a path of its own."""
    digests = []
    for name, classes in (("mine", 10), ("mine", 12), ("other", 12)):  # other shapes: all lies elsewhere in the file
        kwargs = {**TINY["kwargs"], "num_classes": classes}
        weights = save_state(
            random_state(TINY["library"], TINY["arch"], kwargs, seed=7), tmp_path / f"{name}.safetensors"
        )
        document = tiny_document(
            model__checkpoint=str(weights),
            model__kwargs=kwargs,
            evaluate=None,
            store__uri=str(tmp_path / f"store-{len(digests)}"),
        )
        digests.append(run_job(parse_spec(document, where="test"), InProcessExecutor()).digest)
    assert digests[0] != digests[1] == digests[2]


@pytest.mark.parametrize("stage", ["plan", "calibrate"])
def test_a_checkpoint_that_changes_under_a_job_ends_it(tiny_document: Document, tmp_path: Path, stage: str) -> None:
    state = random_state(TINY["library"], TINY["arch"], dict(TINY["kwargs"]), seed=7)
    weights = save_state(state, tmp_path / "mine.safetensors")
    document = tiny_document(model__checkpoint=str(weights))

    def write(event: Event) -> None:
        if (event.kind, event.stage) == ("finished", stage):
            save_state({name: tensor + 1 for name, tensor in state.items()}, weights)

    with pytest.raises(CheckpointError, match=r"mine\.safetensors was written to while it was read; wait for its"):
        run_job(parse_spec(document, where="test"), InProcessExecutor(), write)
    with pytest.raises(NotFound):
        Registry(open_store(document["store"]["uri"])).resolve("tiny")
