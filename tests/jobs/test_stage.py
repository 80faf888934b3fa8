"""What is found out about a network before any of its weights is read, and where its weights are brought."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from jobs.errors import PlanError
from jobs.spec.job import ModelSpec, PreprocessSpec
from jobs.stages.weights import outline, resolve_preprocessing, stage
from nestquant.engines.images import Preprocessing
from storage.registry import Registry
from storage.stores.memory import MemoryStore
from tests.storage.wrappers import Step, WatchedStore
from workers.errors import CheckpointError, ModelError
from workers.executor import InProcessExecutor
from workers.inputs.checkpoint import random_state, save_state
from workers.inputs.networks import default_preprocessing
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
    assert staged.trace.order[0] == "conv1.0"
    assert staged.trace.order[-1] == "fc"
    assert len(staged.trace.order) == len(staged.scan.layers)


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


PLAIN = PreprocessSpec()


def preprocessed(library: str, arch: str, spec: PreprocessSpec = PLAIN, **kwargs: Any) -> Preprocessing:
    model = ModelSpec.model_validate({"library": library, "arch": arch, "kwargs": kwargs, "random_seed": 0})
    return resolve_preprocessing(model, outline(model), spec)


def test_preprocessing_is_the_librarys_with_the_specs_on_top() -> None:
    plain = preprocessed("timm", "resnet18")
    assert (plain.size, plain.resize, plain.interpolation) == (224, 236, "bicubic")
    own = preprocessed("timm", "resnet18", PreprocessSpec(size=160, mean=(0.5, 0.5, 0.5)))
    assert (own.size, own.resize, own.mean, own.std) == (160, None, (0.5, 0.5, 0.5), plain.std)
    assert preprocessed("pytorchcv", "resnet20_cifar10").size == 32


def test_preprocessing_follows_the_networks_arguments() -> None:
    """A network built for 96 pixels was judged at 224, and one of one channel ended raw."""
    vit = preprocessed("timm", "vit_tiny_patch16_224", img_size=96)
    assert (vit.size, vit.resize, vit.input_shape) == (96, 107, (3, 96, 96))
    wide = preprocessed("timm", "vit_tiny_patch16_224", img_size=[64, 96], in_chans=1)
    assert (wide.size, wide.resize, wide.input_shape) == ((64, 96), (71, 107), (1, 64, 96))
    assert (wide.mean, wide.std) == ((0.5,), (0.5,))
    grey = preprocessed("timm", "resnet18", in_chans=1)
    assert (grey.size, grey.resize) == (224, 236)
    assert (grey.mean, grey.std) == (pytest.approx((0.449,)), pytest.approx((0.226,)))
    cifar = preprocessed("pytorchcv", "resnet20_cifar10", in_size=[32, 48], in_channels=1)
    assert (cifar.size, cifar.resize, cifar.input_shape) == ((32, 48), None, (1, 32, 48))
    assert cifar.mean == pytest.approx((0.449,))
    large = preprocessed("pytorchcv", "resnet18", in_size=[128, 256])
    assert (large.size, large.resize) == ((128, 256), (146, 293))
    assert preprocessed("pytorchcv", "resnet18", PreprocessSpec(size=(128, 256)), in_size=[128, 256]) == large


def test_a_square_is_one_number_and_two_sides_travel_as_a_list() -> None:
    own = preprocessed("timm", "resnet18", PreprocessSpec(size=(96, 160), resize=(100, 200)))
    assert own.to_record() == {
        "size": [96, 160],
        "resize": [100, 200],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
    }
    assert Preprocessing.from_record(own.to_record()) == own
    assert preprocessed("timm", "resnet18", PreprocessSpec(size=(96, 96))) == preprocessed(
        "timm", "resnet18", PreprocessSpec(size=96)
    )


@pytest.mark.parametrize(
    ("arch", "kwargs", "spec", "seen"),
    [
        (
            "test_vit",
            {"img_size": 64, "dynamic_img_size": False},
            PreprocessSpec(size=96),
            r"preprocess: timm test_vit does not run on inputs of 3 x 96 x 96 \(AssertionError: Input height \(96\) "
            r"doesn't match model \(64\)\.\), but on 3 x 64 x 64; leave preprocess\.size",
        ),
        (
            "test_resnet",
            {"in_chans": 1},
            PreprocessSpec(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            "preprocess: timm test_resnet does not run on inputs of 3 x 160 x 160 .*, but on 1 x 160 x 160",
        ),
        ("test_resnet", {"in_chans": 1}, PreprocessSpec(mean=(0.5,) * 3), "expected a value of each for every channel"),
    ],
)
def test_inputs_that_the_network_does_not_take_are_refused(
    arch: str, kwargs: dict[str, Any], spec: PreprocessSpec, seen: str, tmp_path: Path
) -> None:
    model = ModelSpec.model_validate({"library": "timm", "arch": arch, "kwargs": kwargs, "random_seed": 0})
    with pytest.raises(PlanError, match=seen):
        stage(model, spec, outline(model), tmp_path, executor=InProcessExecutor(), registry=None)


def test_a_network_of_sounds_takes_no_images() -> None:
    network = torch.nn.Linear(64, 2)
    network.in_size = 64  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"^Linear takes no images: its in_size is 64; expected \(height, width\)\.$"):
        default_preprocessing("pytorchcv", network)
