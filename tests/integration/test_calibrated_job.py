"""The recipe ``calibrated`` as a job: the same bytes here and on Ray, resumed where it was killed, run by a device."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm.models
import torch
from torch import Tensor, nn

from jobs.driver import run_job
from jobs.errors import SpecError
from jobs.events import Event
from jobs.result import JobResult
from jobs.spec.file import parse_spec
from nestquant.engines.images import Preprocessing
from storage.device import Device, StoreSource
from storage.registry import Registry
from storage.stores.uri import open_store
from workers import reconstruct, runtime
from workers.executor import InProcessExecutor
from workers.inputs.checkpoint import load_network
from workers.inputs.images import open_images
from workers.on_ray.executor import RayExecutor, RaySettings
from workers.solutions import read_solution
from workers.tasks import PieceTask, TensorSource

Document = Callable[..., dict[str, Any]]
QUANTIZE = {"recipe": "calibrated", "bits": [8, 6, 4], "overrides": {"fc": {"bits": [8]}}}


def local(document: dict[str, Any]) -> JobResult:
    return run_job(parse_spec(document, where="test"), InProcessExecutor())


def blobs(uri: str) -> dict[str, bytes]:
    store = open_store(uri)
    return {info.key: store.get(info.key) for info in store.list("blobs/")}


def test_workers_and_task_sizes_change_no_byte_and_a_device_runs_it(
    tiny_document: Document, tiny_checkpoint: Path, tiny_images: Path, tmp_path: Path, ray_cluster: None
) -> None:
    document = tiny_document(quantize=QUANTIZE)
    result = local(document)
    other = tiny_document(quantize=QUANTIZE, store__uri=str(tmp_path / "ray"), cluster={"task_weights": 20_000})
    with RayExecutor(RaySettings(max_in_flight=3)) as executor:
        on_ray = run_job(parse_spec(other, where="test"), executor)
    uri = document["store"]["uri"]
    assert on_ray.digest == result.digest
    assert blobs(other["store"]["uri"]) == blobs(uri)

    registry = Registry(open_store(uri))
    manifest = registry.resolve("tiny").manifest
    assert manifest.calibration is not None
    assert (manifest.calibration.samples, manifest.calibration.observer) == (24, "moments")
    assert all(layer.biases for layer in manifest.layers)
    device = Device(tmp_path / "device", StoreSource(registry.store), unsigned=True)
    device.pull("tiny")
    device.upgrade("tiny")
    model = runtime.load(manifest, device.blob_path)
    inputs, _ = next(open_images(tiny_images).batches(Preprocessing.from_record(manifest.preprocessing), batch_size=8))  # type: ignore[arg-type]
    source = TensorSource(None, str(tiny_checkpoint))
    for level in (0, 1, 2, 0):
        model.to_level(level)
        reference = load_network("timm", "test_resnet", {"num_classes": 10, "in_chans": 3}, source)
        for index, layer in enumerate(manifest.layers):
            piece = whole_piece(layer.model_dump(), index)
            weight = read_solution(registry, result.job, piece)
            module = reference.get_submodule(layer.name)
            at = min(level, len(layer.bits) - 1)
            assert weight.biases is not None
            module.weight = torch.nn.Parameter(weight.dequantize(at))
            own = 0 if module.bias is None else module.bias.detach()
            module.bias = torch.nn.Parameter(own + weight.biases[at].float())
        with torch.inference_mode():
            assert torch.equal(model.network(inputs), reference(inputs)), level


def whole_piece(layer: dict[str, Any], index: int) -> PieceTask:
    keys = ("kind", "parameter", "shape", "groups", "bits", "scheme")
    rest = {key: layer[key] for key in keys}
    return PieceTask(layer=layer["name"], start=0, stop=layer["shape"][0], rounding="adaptive", solution=index, **rest)


def test_a_job_killed_between_layers_goes_on_where_it_stopped(
    tiny_document: Document, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    undisturbed = local(tiny_document(quantize=QUANTIZE, store__uri=str(tmp_path / "undisturbed")))
    document = tiny_document(quantize=QUANTIZE)
    solved: list[int] = []
    solve = reconstruct.Member.solve

    def killed(member: reconstruct.Member, layer: int, *rest: Any) -> reconstruct.SolvedRecord:
        if len(solved) == 4:
            raise KeyboardInterrupt
        solved.append(layer)
        return solve(member, layer, *rest)

    monkeypatch.setattr(reconstruct.Member, "solve", killed)
    with pytest.raises(KeyboardInterrupt):
        local(document)
    assert len(solved) == 4
    again: list[int] = []

    def noted(member: reconstruct.Member, layer: int, *rest: Any) -> reconstruct.SolvedRecord:
        again.append(layer)
        return solve(member, layer, *rest)

    monkeypatch.setattr(reconstruct.Member, "solve", noted)
    result = local(document)
    assert not set(again) & set(solved)
    assert len(again) + len(solved) == len(result.layers)
    assert result.digest == undisturbed.digest


class Unreadable(nn.Module):
    """One layer of each kind whose input does not tell how to round its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, stride=2)
        self.turned, self.keyed, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc = nn.Linear(4, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.stem(inputs).flatten(2).permute(2, 0, 1)
        tokens = self.turned(torch.cat([tokens, tokens[:2]]))[:-2].transpose(0, 1)
        tokens = self.keyed(input=tokens)
        tokens = self.attention(tokens, tokens, tokens)[0]
        answer: Tensor = self.fc(tokens.mean(dim=1))
        return answer


@timm.models.register_model
def nestquant_unreadable(pretrained: bool = False, **_: Any) -> nn.Module:
    return Unreadable()


def test_a_layer_is_rounded_without_data_for_a_reason_that_the_notes_name(tiny_document: Document) -> None:
    document = tiny_document(
        model={"library": "timm", "arch": "nestquant_unreadable", "random_seed": 1},
        preprocess={"size": 64, "mean": [0.5] * 3, "std": [0.5] * 3},
        quantize={"recipe": "calibrated", "bits": [8, 4]},
        evaluate=None,
    )
    expected = [
        "1 layers were rounded without data (its input does not come image by image along the first axis): turned.",
        "1 layers were rounded without data (neither it is called with its input first, nor linear() with its weight): "
        "unused.",
    ]
    notes = [note for note in local(document).notes if "without data" in note]
    assert sorted(notes) == expected


def members() -> list[int]:
    """Return the processes of the session's own Ray that are members of a gang."""

    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            named = (folder / "cmdline").read_bytes().startswith(b"ray::Seat")
            if named and parent(parent(int(folder.name))) == os.getpid():
                found.append(int(folder.name))
    return found


def test_a_lost_member_costs_no_solved_layer_and_changes_no_byte(
    tiny_document: Document, tmp_path: Path, ray_cluster: None
) -> None:
    undisturbed = local(tiny_document(quantize=QUANTIZE, store__uri=str(tmp_path / "undisturbed")))
    killed: list[int] = []

    def listen(event: Event) -> None:
        if event.stage == "reconstruct" and event.done == 5 and not killed:
            killed.extend(members()[-1:])
            os.kill(killed[0], signal.SIGKILL)

    with RayExecutor(RaySettings()) as executor:
        result = run_job(parse_spec(tiny_document(quantize=QUANTIZE), where="test"), executor, listen)
    assert len(killed) == 1
    assert result.digest == undisturbed.digest


def test_a_gang_takes_what_there_is_and_leaves_nothing(ray_cluster: None) -> None:
    with RayExecutor(RaySettings()) as executor:
        with executor.gang(Multiples, [2, 3], memory_bytes=1000) as gang:
            assert gang.each("times", 10) == [20, 30]
            assert gang.reduce("total", 1, over="times", calls=[(1, (5,)), (0, (7,))]) == [1, 15, 14]
            with pytest.raises(ValueError, match="no multiple of 0"):
                gang.each("times", 0)
        assert dict(executor.map(math.factorial, range(3))) == {0: 1, 1: 1, 2: 2}  # the CPUs are free again
    with InProcessExecutor().gang(Multiples, [2, 3]) as here:
        assert here.reduce("total", 1, over="times", calls=[(1, (5,)), (0, (7,))]) == [1, 15, 14]


class Multiples:
    """A member that knows one number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def times(self, factor: int) -> int:
        if not factor:
            raise ValueError("no multiple of 0")
        return self.number * factor

    def total(self, first: int, results: Iterator[int]) -> list[int]:
        return [first, *results]

    def close(self) -> None:
        """Nothing is held."""


def test_the_recipe_needs_images(tiny_document: Document) -> None:
    document = tiny_document(quantize=QUANTIZE)
    del document["calibration"]
    with pytest.raises(SpecError, match=r"quantize\.recipe 'calibrated' needs 'calibration"):
        parse_spec(document, where="test")
