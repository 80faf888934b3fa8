"""What is found out about a network before any of its weights is read, and where its weights are brought."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from jobs.spec.job import ModelSpec, PreprocessSpec
from jobs.stages.weights import outline, resolve_preprocessing, stage
from storage.registry import Registry
from storage.stores.memory import MemoryStore
from tests.storage.wrappers import Step, WatchedStore
from workers.errors import CheckpointError
from workers.executor import InProcessExecutor
from workers.inputs.checkpoint import random_state, save_state
from workers.inputs.tensors import TensorReader
from workers.inputs.weights import make_weights

KWARGS = {"num_classes": 10, "in_chans": 1}
GREY = PreprocessSpec(size=32, mean=(0.5,), std=(0.5,))


class Recording(InProcessExecutor):
    """Keeps what it was asked to run, and with how much memory."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[object, int]] = []

    @override
    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], *, memory_bytes: int = 0
    ) -> Iterator[tuple[int, Any]]:
        self.asked.append((function, memory_bytes))
        return super().map(function, items, memory_bytes=memory_bytes)


def test_a_grey_network_is_traced_at_the_size_that_the_spec_says(tmp_path: Path) -> None:
    weights = save_state(random_state("timm", "test_resnet", KWARGS, seed=0), tmp_path / "w.safetensors")
    spec = ModelSpec(library="timm", arch="test_resnet", kwargs=KWARGS, checkpoint=str(weights))
    staged = stage(spec, GREY, outline(spec), tmp_path, executor=InProcessExecutor(), registry=None)
    assert staged.notes == ()
    assert staged.order[0] == "conv1.0"
    assert staged.order[-1] == "fc"
    assert len(staged.order) == len(staged.scan.layers)


@pytest.mark.parametrize("in_store", [True, False])
def test_random_weights_are_made_by_a_worker_and_are_the_same_bytes_everywhere(tmp_path: Path, in_store: bool) -> None:
    spec = ModelSpec(library="timm", arch="test_resnet", kwargs=KWARGS, random_seed=3)
    registry = Registry(MemoryStore.named(f"staged-{tmp_path.name}")) if in_store else None
    executor = Recording()
    staged = stage(spec, GREY, outline(spec), tmp_path, executor=executor, registry=registry)

    path = save_state(random_state("timm", "test_resnet", KWARGS, seed=3), tmp_path / "expected.safetensors")
    raw = path.read_bytes()
    assert staged.source_digest == f"sha256:{hashlib.sha256(raw).hexdigest()}"
    if registry is not None:
        assert staged.network.source.store == registry.store.uri
        assert registry.store.get(staged.network.source.key) == raw
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["expected.safetensors"]
    else:
        assert staged.network.source.store is None
        assert Path(staged.network.source.key).read_bytes() == raw
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["expected.safetensors", "weights.safetensors"]
    tensors = TensorReader(staged.network.source).tensors
    assert executor.asked == [(make_weights, 2 * sum(info.size_bytes for info in tensors.values()))]


def test_a_checkpoint_that_changes_while_it_is_staged_is_refused(tmp_path: Path) -> None:
    weights = save_state(random_state("timm", "test_resnet", KWARGS, seed=0), tmp_path / "w.safetensors")
    spec = ModelSpec(library="timm", arch="test_resnet", kwargs=KWARGS, checkpoint=str(weights))

    class Meddling(WatchedStore):
        @override
        def before(self, index: int, step: Step) -> None:
            if step.operation == "put":
                with weights.open("ab") as stream:
                    stream.write(b"more")

    registry = Registry(Meddling(MemoryStore("meddled")))
    with pytest.raises(CheckpointError, match=r"w\.safetensors was written to while it was read; wait for its writer"):
        stage(spec, GREY, outline(spec), tmp_path, executor=InProcessExecutor(), registry=registry)


def test_messages_and_notes_name_the_users_file(tmp_path: Path) -> None:
    folder, mine = tmp_path / "scratch", tmp_path / "mine.pth"
    folder.mkdir()
    state = random_state("timm", "test_resnet", KWARGS, seed=0)
    torch.save({"state_dict": state, "state_dict_ema": {name: tensor * 1 for name, tensor in state.items()}}, mine)
    asked = {"library": "timm", "arch": "test_resnet", "checkpoint": str(mine)}
    spec = ModelSpec.model_validate({**asked, "kwargs": KWARGS})
    staged = stage(spec, GREY, outline(spec), folder, executor=InProcessExecutor(), registry=None)
    assert staged.notes == (
        f"{mine}: took the averaged weights in 'state_dict_ema'; 'model.weights: model' takes those in 'state_dict'.",
    )
    assert str(staged.network.source) == str(mine)
    assert Path(staged.network.source.key).parent == folder
    other = ModelSpec.model_validate({**asked, "kwargs": {"num_classes": 12, "in_chans": 1}, "weights": "model"})
    with pytest.raises(CheckpointError) as caught:
        stage(other, GREY, outline(other), folder, executor=InProcessExecutor(), registry=None)
    assert str(caught.value) == (
        f"{mine} does not fit the network: the checkpoint has 10 classes; set kwargs: {{num_classes: 10}}."
    )


def test_preprocessing_is_the_librarys_with_the_specs_on_top() -> None:
    timm = outline(ModelSpec(library="timm", arch="resnet18", random_seed=0))
    plain = resolve_preprocessing("timm", timm, PreprocessSpec())
    assert (plain.size, plain.resize, plain.interpolation) == (224, 236, "bicubic")
    own = resolve_preprocessing("timm", timm, PreprocessSpec(size=160, mean=(0.5, 0.5, 0.5)))
    assert (own.size, own.resize, own.mean, own.std) == (160, None, (0.5, 0.5, 0.5), plain.std)
    cifar = outline(ModelSpec(library="pytorchcv", arch="resnet20_cifar10", random_seed=0))
    assert resolve_preprocessing("pytorchcv", cifar, PreprocessSpec()).size == 32
