"""What each stage asks for lies above what a process really takes, and a machine too small is refused by stage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from jobs.driver import run_job
from jobs.events import StageClock
from jobs.spec.file import parse_spec
from jobs.stages.memory import PROCESS_BYTES, SLACK_BYTES
from jobs.stages.preparation import prepare
from workers.errors import DoesNotFit, Need
from workers.executor import Gang, InProcessExecutor
from workers.inputs.checkpoint import random_state, save_state
from workers.synthesize import CHUNK

Document = Callable[..., dict[str, Any]]
A = TypeVar("A")
R = TypeVar("R")

# Prints how much the process grew by the work of one stage over what it takes when everything is imported.
_GROWTH = """
import json, re, resource, sys, tempfile
from pathlib import Path
import timm, torch, pytorchcv.model_provider
from jobs.stages.calibration import calibrate_tasks
from jobs.stages.preparation import prepare
from jobs.stages.evaluation import measure_tasks
from jobs.events import StageClock
from jobs.spec.file import parse_spec
from storage.manifest import Manifest
from jobs.stages.export import range_images
from workers.engines.export import ExportTask, export_version
from workers.inputs import networks
from workers.calibrate import observe
from workers.executor import InProcessExecutor
from workers.measure import measure
torch.set_num_threads(1)
stage, document = sys.argv[1], json.loads(sys.argv[2])
spec = parse_spec(document, where="test")
with tempfile.TemporaryDirectory() as folder:
    prepared = prepare(spec, InProcessExecutor(), Path(folder), StageClock(lambda _: None))
    if stage == "calibrate":
        work, task = observe, calibrate_tasks(prepared, spec.quantize.activations)[0]
    elif stage == "export":
        work, task = export_version, ExportTask(
            store_uri=spec.store.uri,
            engine="onnx",
            manifest=prepared.registry.resolve(spec.name).manifest,
            images=range_images(spec.quantize.activations, prepared.observation),
        )
    else:
        found = prepared.registry.resolve(spec.name).manifest
        work, task = measure, measure_tasks(prepared, spec.evaluate, found, cache=None)[-1]
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    work(task)
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # ru_maxrss survives exec
print(json.dumps({"grown": peak - before, "asked": prepared.needs[stage].memory_bytes}))
"""


_BARE = """
import re
from pathlib import Path
import ray, timm, torch, pytorchcv.model_provider
import workers.measure, workers.quantize, workers.reconstruct
print(1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


def test_a_bare_worker_takes_what_is_asked_for_it_and_not_much_less() -> None:
    told = subprocess.run([sys.executable, "-c", _BARE], capture_output=True, text=True, timeout=300, check=True)
    assert 0.8 * PROCESS_BYTES < int(told.stdout) < PROCESS_BYTES + SLACK_BYTES


def growth(stage: str, document: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes that a stage's first task took, and those that it asked for without the bare process."""
    argv = [sys.executable, "-c", _GROWTH, stage, json.dumps(document)]
    told = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(told.stdout)
    return int(found["grown"]), int(found["asked"]) - PROCESS_BYTES


def test_a_real_calibration_takes_less_than_it_asks_for_and_more_than_half(test_data: Path, tmp_path: Path) -> None:
    document = {
        "name": "squeezenet",
        "model": {
            "library": "pytorchcv",
            "arch": "squeezenet_v1_1",
            "checkpoint": str(test_data / "weights" / "squeezenet_v1_1.safetensors"),
        },
        "quantize": {"recipe": "paper", "activations": {}},
        "calibration": {"data": str(test_data / "images" / "imagenet_sample_1000.tar"), "batch_size": 32},
        "store": {"uri": str(tmp_path / "store")},
    }
    grown, asked = growth("calibrate", document)
    assert asked / 2 < grown < asked


@pytest.mark.parametrize("arch", ["test_resnet", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_a_real_export_takes_less_than_it_asks_for_and_more_than_half(tmp_path: Path, arch: str) -> None:
    """The graph, its ranges on images and all: from the exporter's own hundred MB to a network of a hundred more."""
    model = {"library": "timm", "arch": arch, "kwargs": {}}
    checkpoint = save_state(random_state("timm", arch, {}, seed=7), tmp_path / "weights.safetensors")
    noise = np.random.default_rng(3).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", x=noise)
    document = {
        "name": "net",
        "model": {**model, "checkpoint": str(checkpoint)},
        "quantize": {"recipe": "paper", "rounding": "nearest", "scheme": "symmetric", "activations": {}},
        "preprocess": {"size": 224},
        "calibration": {"data": str(tmp_path / "noise.npz"), "samples": 8, "batch_size": 4},
        "store": {"uri": str(tmp_path / "store")},
    }
    run_job(parse_spec(document, where="test"), InProcessExecutor())
    grown, asked = growth("export", {**document, "export": {"engines": ["onnx"]}})
    print(f"{arch}: {grown / 1e6:.0f} MB taken, {asked / 1e6:.0f} asked for")
    assert asked / 2 < grown < asked


def needs(document: dict[str, Any], folder: Path) -> dict[str, Need]:
    spec = parse_spec(document, where="test")
    return dict(prepare(spec, InProcessExecutor(), folder, StageClock(lambda _: None)).needs)


def test_every_stage_asks_and_a_batch_more_asks_for_as_much_more(tiny_document: Document, tmp_path: Path) -> None:
    first = needs(tiny_document(), tmp_path)
    assert list(first) == ["calibrate", "quantize", "evaluate"]
    more = needs(tiny_document(calibration__batch_size=24, evaluate__batch_size=25), tmp_path)
    grown = more["calibrate"].memory_bytes - first["calibrate"].memory_bytes
    shrunk = first["evaluate"].memory_bytes - more["evaluate"].memory_bytes
    assert (grown % 16, shrunk % 25) == (0, 0)
    assert grown // 16 == shrunk // 25  # what one image costs
    image = 4 * 3 * 32 * 32
    assert grown // 16 > 2 * image
    assert more["quantize"] == first["quantize"]


def test_a_machine_too_small_is_refused_by_the_stage_that_needs_most(tiny_document: Document, tmp_path: Path) -> None:
    document = tiny_document(evaluate__batch_size=10_000_000)
    with pytest.raises(DoesNotFit, match=r"A task of the stage 'evaluate' needs \d+\.\d GB and 1 CPUs; this machine"):
        needs(document, tmp_path)
    with pytest.raises(DoesNotFit, match=r"Make tasks smaller \(calibration\.batch_size, "):
        needs(tiny_document(calibration__batch_size=10_000_000, calibration__samples=10_000_000), tmp_path)
    assert not (tmp_path / "store" / "blobs").exists()


class Watching(InProcessExecutor):
    """Keeps what each task was said to need."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, int] = {}

    def map(self, function: Callable[[A], R], items: Sequence[A], *, memory_bytes: int = 0) -> Iterator[tuple[int, R]]:
        self.asked[function.__name__] = memory_bytes
        return super().map(function, items)

    @contextmanager
    def gang(self, member: Callable[[A], Any], items: Sequence[A], *, memory_bytes: int = 0) -> Iterator[Gang]:
        self.asked["gang"] = memory_bytes
        with super().gang(member, items) as made:
            yield made


@pytest.mark.parametrize("recipe", ["paper", "calibrated", "data_free"])
def test_every_task_of_a_stage_asks_for_what_was_checked_before_work(
    tiny_document: Document, tmp_path: Path, recipe: str
) -> None:
    document = tiny_document(quantize__recipe=recipe, quantize__mixed={"mean_bits": 4.0, "samples": 4})
    if recipe == "data_free":
        del document["calibration"]
    executor, checked = Watching(), needs(document, tmp_path)
    run_job(parse_spec(document, where="test"), executor)
    stages = {
        "measure_layer": "sensitivity",
        "synthesize": "synthesize",
        "join": "synthesize",
        "equalize_network": "equalize",
        "observe": "calibrate",
        "gang": "reconstruct",
        "run_bundle": "quantize",
        "measure": "evaluate",
    }
    assert {stages[name]: asked for name, asked in executor.asked.items()} == {
        stage: need.memory_bytes for stage, need in checked.items()
    }
    assert min(executor.asked.values()) > PROCESS_BYTES


def test_a_forward_pass_is_counted_by_its_traced_activations_wherever_there_is_one(
    tiny_document: Document, tmp_path: Path
) -> None:
    analysed = needs(tiny_document(analysis={"samples": 8}), tmp_path)
    wider = needs(tiny_document(analysis={"samples": 9}, calibration__batch_size=32), tmp_path)
    one = needs(tiny_document(evaluate__batch_size=1), tmp_path)["evaluate"].memory_bytes
    two = needs(tiny_document(evaluate__batch_size=2), tmp_path)["evaluate"].memory_bytes
    image = 4 * 3 * 32 * 32
    # One image more: itself, and its forward pass.
    assert wider["sensitivity"].memory_bytes - analysed["sensitivity"].memory_bytes == image + (two - one)
    document = tiny_document(quantize__recipe="data_free")
    del document["calibration"]
    synthesized = needs(document, tmp_path)["synthesize"].memory_bytes
    assert synthesized > PROCESS_BYTES + CHUNK * (two - one)


def test_without_images_only_quantizing_asks(tiny_document: Document, tmp_path: Path) -> None:
    document = tiny_document()
    del document["calibration"], document["evaluate"], document["quantize"]["activations"]
    assert list(needs(document, tmp_path)) == ["quantize"]
