from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from nestquant.surgery import (
    LayerSite,
    channel_first,
    channel_first_shape,
    execution_order,
    find_layers,
    from_channel_first,
    kind_of,
    replace,
)


def _names(model: nn.Module) -> list[str]:
    return [site.name for site in find_layers(model).layers]


def test_every_kind_is_found_with_shape_and_groups() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.Conv1d(4, 6, 3, groups=2),
            "b": nn.Conv2d(4, 6, (3, 5), dilation=2),
            "c": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "d": nn.Linear(4, 6),
            "e": nn.MultiheadAttention(4, 2),
        }
    )
    scan = find_layers(model)
    assert scan.layers == (
        LayerSite("a", "conv1d", "weight", (6, 2, 3), 2),
        LayerSite("b", "conv2d", "weight", (6, 4, 3, 5), 1),
        LayerSite("c", "conv_transpose2d", "weight", (4, 3, 3, 3), 2),
        LayerSite("d", "linear", "weight", (6, 4)),
        LayerSite("e", "linear", "in_proj_weight", (12, 4)),
        LayerSite("e.out_proj", "linear", "weight", (4, 4)),
    )
    assert scan.kept_float == ()
    assert [site.state_key in model.state_dict() for site in scan.layers] == [True] * 6
    assert scan.layers[2].channel_first_shape == (6, 2, 3, 3)


def test_what_stays_float_is_listed_with_its_reason() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
            self.gamma = nn.Parameter(torch.ones(8))
            self.embedding = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10)
            self.head.weight = self.embedding.weight
            self.volume = nn.Conv3d(1, 2, 3)
            self.lstm = nn.LSTM(8, 8)
            self.new_norm = weight_norm(nn.Conv2d(2, 2, 3))
            self.lazy = nn.LazyLinear(3)
            self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
            self.integers = nn.Linear(2, 2)
            self.integers.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
            self.plain = nn.Linear(8, 8)

    scan = find_layers(Model())
    assert [site.name for site in scan.layers] == ["cross.out_proj", "plain"]
    reasons = dict(scan.kept_float)
    assert "not the weight of a supported layer" in reasons.pop("pos_embed")
    assert reasons.pop("embedding.weight") == "Embedding.weight is not the weight of a supported layer"
    assert reasons.pop("head") == "weight is shared: embedding.weight, head.weight are one parameter"
    assert reasons.pop("volume.weight") == "Conv3d.weight is not the weight of a supported layer"
    assert "LSTM" in reasons.pop("lstm.weight_ih_l0")
    assert "LSTM" in reasons.pop("lstm.weight_hh_l0")
    assert "parametrization" in reasons.pop("new_norm")
    assert "ParametrizationList" in reasons.pop("new_norm.parametrizations.weight.original0")
    assert "ParametrizationList" in reasons.pop("new_norm.parametrizations.weight.original1")
    assert "not initialized" in reasons.pop("lazy")
    assert "different widths" in reasons.pop("cross")
    assert "torch.int8" in reasons.pop("integers")
    assert reasons == {}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_weight_norm_stays_float() -> None:
    scan = find_layers(nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4))))
    assert scan.layers == ()
    assert scan.kept_float[0] == (
        "0",
        "weight is computed before each forward (weight_norm, spectral_norm): fold it in to quantize",
    )


def test_a_module_under_two_names_counts_once_and_is_replaced_everywhere() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "block": nn.Sequential(shared, nn.ReLU())})
    (site,) = find_layers(model).layers
    assert (site.name, site.aliases) == ("first", ("block.0",))
    assert site.state_keys == ("first.weight", "block.0.weight")
    new = nn.Identity()
    replace(model, "block.0", new)
    assert model["first"] is new
    assert model["block"][0] is new


def test_replace_refuses_what_is_not_there() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(KeyError, match="no module 'nothing'"):
        replace(model, "nothing", nn.Identity())
    with pytest.raises(ValueError, match="root"):
        replace(model, "", nn.Identity())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_channel_first_of_a_transposed_convolution_follows_its_outputs(groups: int) -> None:
    layer = nn.ConvTranspose2d(8, 12, 3, groups=groups, bias=False)
    first = channel_first(layer.weight, "conv_transpose2d", groups)
    assert (
        first.shape
        == (12, 8 // groups, 3, 3)
        == channel_first_shape(tuple(layer.weight.shape), "conv_transpose2d", groups)
    )
    assert torch.equal(from_channel_first(first, "conv_transpose2d", groups), layer.weight)
    # Changing row 7 changes output channel 7 and no other.
    x = torch.randn(1, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    before = layer(x)
    with torch.no_grad():
        changed = first.clone()
        changed[7] += 1
        layer.weight.copy_(from_channel_first(changed, "conv_transpose2d", groups))
    different = (layer(x) != before).flatten(2).any(dim=2)[0]
    assert different.nonzero().flatten().tolist() == [7]


def test_order_is_that_of_the_calls() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(4, 4)
            self.last = nn.Linear(4, 4)
            self.first = nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return self.last(self.first(self.first(x)))

    model = Model().train()
    for device in ("cpu", "meta"):
        order = execution_order(model.to(device), torch.zeros(1, 4, device=device))
        assert order.names == ("first", "last", "unused")
        assert order.never_ran == ("unused",)
    assert model.training
    assert not model.first._forward_pre_hooks


@pytest.mark.parametrize(
    ("arch", "size", "layers", "kept"),
    [
        ("resnet18", 64, 21, 0),
        ("tf_efficientnet_lite0", 64, 50, 0),
        ("deit_tiny_patch16_224", 224, 50, 2),
        ("test_nfnet", 64, 34, 25),
    ],
)
def test_timm_models_on_the_meta_device(arch: str, size: int, layers: int, kept: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(arch, pretrained=False)
        scan = find_layers(model)
        order = execution_order(model, torch.zeros(1, 3, size, size))
    assert len(scan.layers) == layers
    assert len(scan.kept_float) == kept
    assert sorted(order.names) == sorted(_names(model))
    assert order.never_ran == ()
    # Every weight is either found or listed.
    listed = {site.state_key for site in scan.layers} | {name for name, _ in scan.kept_float}
    assert {key for key, value in model.named_parameters() if value.ndim >= 2} == listed


def test_functional_use_is_reported_as_never_run() -> None:
    with torch.device("meta"):
        model = timm.create_model("beit_base_patch16_224", pretrained=False, depth=1)
        order = execution_order(model, torch.zeros(1, 3, 224, 224))
    assert order.never_ran == ("blocks.0.attn.qkv",)
    assert order.names[-1] == "blocks.0.attn.qkv"


def test_kind_of() -> None:
    assert kind_of(timm.layers.Conv2dSame(2, 2, 3)) == ("conv2d", "weight")
    assert kind_of(timm.layers.ScaledStdConv2d(2, 2, 3)) == ("conv2d", "weight")
    assert kind_of(nn.BatchNorm2d(2)) is None


def test_a_layer_of_which_only_the_bias_is_computed_is_quantized() -> None:
    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    scan = find_layers(nn.Sequential(layer))
    assert [(site.name, site.kind, site.shape) for site in scan.layers] == [("0", "linear", (4, 3))]
    assert scan.kept_float == ()
