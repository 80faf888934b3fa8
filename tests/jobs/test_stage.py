"""What is found out about a network before any of its weights is read."""

from __future__ import annotations

from pathlib import Path

from jobs.spec import ModelSpec, PreprocessSpec
from jobs.stage import outline, resolve_preprocessing, stage
from workers.checkpoint import random_state, save_state


def test_a_grey_network_is_traced_at_the_size_that_the_spec_says(tmp_path: Path) -> None:
    kwargs = {"num_classes": 10, "in_chans": 1}
    weights = save_state(random_state("timm", "test_resnet", kwargs, seed=0), tmp_path / "w.safetensors")
    spec = ModelSpec(library="timm", arch="test_resnet", kwargs=kwargs, checkpoint=str(weights))
    staged = stage(spec, PreprocessSpec(size=32, mean=(0.5,), std=(0.5,)), outline(spec), tmp_path, None)
    assert staged.notes == ()
    assert staged.order[0] == "conv1.0"
    assert staged.order[-1] == "fc"
    assert len(staged.order) == len(staged.scan.layers)


def test_preprocessing_is_the_librarys_with_the_specs_on_top() -> None:
    timm = outline(ModelSpec(library="timm", arch="resnet18", random_seed=0))
    plain = resolve_preprocessing("timm", timm, PreprocessSpec())
    assert (plain.size, plain.resize, plain.interpolation) == (224, 236, "bicubic")
    own = resolve_preprocessing("timm", timm, PreprocessSpec(size=160, mean=(0.5, 0.5, 0.5)))
    assert (own.size, own.resize, own.mean, own.std) == (160, None, (0.5, 0.5, 0.5), plain.std)
    cifar = outline(ModelSpec(library="pytorchcv", arch="resnet20_cifar10", random_seed=0))
    assert resolve_preprocessing("pytorchcv", cifar, PreprocessSpec()).size == 32
