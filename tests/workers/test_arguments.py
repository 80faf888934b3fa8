"""What may stand in model.kwargs: a description of a network's shape, never a file, an address or weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.errors import SpecError
from jobs.spec.file import parse_spec
from workers.errors import ModelError
from workers.inputs import networks
from workers.inputs.arguments import check_arguments
from workers.inputs.budget import MOST_TENSORS


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "/etc/passwd"},
        {"root": "/home/user/.torch/models"},
        {"pretrained": True},
        {"pretrained_cfg": {"url": "http://example.org/x.pth"}},
        {"pretrained_cfg_overlay": {"file": "x.pth"}},
        {"cache_dir": "x"},
        {"hf_hub_id": "a"},
        {"Checkpoint-Path": "x"},
        {"act_layer": {"inner": {"file": 1}}},
    ],
)
def test_arguments_about_files_and_weights_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"^model\.kwargs"):
        check_arguments(arguments)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("/etc/passwd", "the text '/etc/passwd'"),
        ("http://x", "the text 'http://x'"),
        ("..", r"the text '\.\.'"),
        ("a\nb", r"the text 'a\\nb'"),
        ("x" * 65, "the text 'x"),
        (float("nan"), "a number beyond 1e12"),
        (10**13, "a number beyond 1e12"),
        ([[[[[1]]]]], "nested more than 4 levels deep"),
        ([0] * 1001, "more than 1000 values"),
        (b"x", "a bytes"),
        ({"a b": 1}, "'a b' is no argument's name"),
    ],
)
def test_values_that_describe_no_shape_are_refused(value: object, told: str) -> None:
    with pytest.raises(ModelError, match=rf"^model\.kwargs\.x: .*{told}.*; expected numbers"):
        check_arguments({"x": value})


def test_what_people_say_passes() -> None:
    check_arguments(
        {
            "num_classes": 1000,
            "img_size": [224, 192],
            "in_chans": 1,
            "drop_path_rate": 0.1,
            "path_dropout": 0.0,
            "class_token": False,
            "global_pool": "avg",
            "act_layer": "gelu_tanh",
            "norm_layer": None,
            "weight_init": "jax",
            "block_args": [["ds_r1_k3_s1_c16_noskip"], ["ir_r2_k3_s2_e6_c24"]],
            "features_only": True,
            "local_up_to_layer": 3,
        }
    )


def test_no_name_that_the_libraries_read_files_by_passes() -> None:
    """What timm's and pytorchcv's builders take by name today; a new one must be looked at."""
    import timm
    from pytorchcv.models.resnet import get_resnet

    known = set(inspect.signature(timm.create_model).parameters) - {"model_name", "kwargs"}
    assert known == {
        "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
        "scriptable", "exportable", "no_jit",
    }  # fmt: skip
    for name in (*known - {"scriptable", "exportable", "no_jit"}, "root"):
        with pytest.raises(ModelError):
            check_arguments({name: "x"})
    assert {"pretrained", "root"} <= set(inspect.signature(get_resnet).parameters)


def test_a_spec_and_a_build_are_held_to_the_same_rules(tmp_path: Path) -> None:
    document: dict[str, Any] = {
        "name": "net",
        "model": {"library": "timm", "arch": "resnet18", "random_seed": 1, "kwargs": {"checkpoint_path": "x.pth"}},
        "store": {"uri": str(tmp_path)},
    }
    with pytest.raises(SpecError, match=r"spec: 'model\.kwargs': checkpoint_path: an argument about files, addresses"):
        parse_spec(document, where="spec")
    for library, arch in (("timm", "resnet18"), ("pytorchcv", "resnet18")):
        with pytest.raises(ModelError, match=r"^model\.kwargs\.root: an argument about files"):
            networks.build(library, arch, {"root": str(tmp_path)}, meta=True)


@pytest.mark.parametrize("meta", [True, False])
def test_a_network_larger_than_meant_is_refused_before_memory_is_taken(meta: bool) -> None:
    small = sum(one.numel() for one in networks.build("timm", "vit_tiny_patch16_224", meta=True).parameters())
    with pytest.raises(ModelError, match=r"vit_tiny_patch16_224 with these arguments has more than [\d,]+ values"):
        networks.build("timm", "vit_tiny_patch16_224", {"embed_dim": 48_000}, meta=True, most_values=4 * small)
    if not meta:
        return
    with pytest.raises(ModelError, match=rf"has more than {MOST_TENSORS + 1:,} tensors"):
        networks.build("timm", "vit_tiny_patch16_224", {"depth": 9_999, "embed_dim": 3}, meta=True)


def test_the_bound_ends_with_the_build() -> None:
    with pytest.raises(ModelError):
        networks.build("timm", "test_resnet", most_values=10)
    assert torch.nn.Linear(1000, 1000).weight.numel() == 1_000_000
