from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from nestquant.config import NestConfig, Scheme
from nestquant.modules import (
    NestedConv1d,
    NestedConv2d,
    NestedConvTranspose2d,
    NestedLayer,
    NestedLinear,
    NestedMultiheadAttention,
    from_float,
    from_packed,
    nest_model,
    nested_layers,
    page_in,
    page_out,
    resident_bytes,
    set_level,
    set_residency,
)
from nestquant.nested_weight import _unpack_on_device, pack_parts
from nestquant.observers import ActivationQParams, fake_quantize
from nestquant.packing import pack, packed_size, unpack
from nestquant.quantized_weight import QuantizedWeight, quantize_weight
from nestquant.surgery import channel_first, find_layers, from_channel_first

BITS = (8, 6, 4)


def _quantize(model: nn.Module, config: NestConfig) -> dict[str, QuantizedWeight]:
    return {
        site.name: quantize_weight(channel_first(model.get_parameter(site.state_key), site.kind, site.groups), config)
        for site in find_layers(model).layers
    }


def _with_weights(model: nn.Module, weights: dict[str, QuantizedWeight], level: int) -> nn.Module:
    """Return the float model with its weights replaced by what ``level`` stands for: the oracle of a nested model."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for site in find_layers(result).layers:
            weight = from_channel_first(weights[site.name].dequantize(level), site.kind, site.groups)
            result.get_parameter(site.state_key).copy_(weight)
    return result


def _assert_runs_at_every_level(model: nn.Module, *inputs: Tensor, config: NestConfig, tolerance: float = 0.0) -> None:
    weights = _quantize(model, config)
    nested = copy.deepcopy(model).eval()
    nest_model(nested, weights)
    with torch.no_grad():
        for level in reversed(range(config.level_count)):
            expected = _with_weights(model, weights, level).eval()(*inputs)
            assert not torch.equal(expected, model.eval()(*inputs))
            set_residency(nested, "packed")
            torch.testing.assert_close(nested(*inputs), expected, rtol=0, atol=tolerance)
            set_residency(nested, "expanded")
            torch.testing.assert_close(nested(*inputs), expected, rtol=0, atol=tolerance)
            if level:
                page_out(nested)


LAYERS = [
    (nn.Conv1d(6, 4, 5, stride=2, padding=2, groups=2), (2, 6, 20), NestedConv1d),
    (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 9), NestedConv2d),
    (nn.Conv2d(6, 6, 3, dilation=2, groups=6, bias=False), (2, 6, 9, 9), NestedConv2d),
    (nn.Conv2d(6, 6, (1, 3), padding="same", groups=3), (2, 6, 9, 9), NestedConv2d),
    (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 6, 5, 5), NestedConvTranspose2d),
    (nn.Linear(7, 5), (3, 7), NestedLinear),
]


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize(("layer", "shape", "nested_type"), LAYERS)
def test_every_kind_runs_at_every_level(
    layer: nn.Module, shape: tuple[int, ...], nested_type: type[NestedLayer], scheme: Scheme
) -> None:
    model = nn.Sequential(layer)
    _assert_runs_at_every_level(model, torch.randn(shape), config=NestConfig(BITS, scheme))
    weight = _quantize(model, NestConfig(BITS, scheme))["0"]
    assert type(from_float(layer, weight)) is nested_type


@pytest.mark.parametrize("fast", [True, False])
def test_multihead_attention_runs_at_every_level(fast: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.attention(x, x, x, need_weights=False)[0]

    model = Attention()
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        # Off the fast path torch itself differs in the last bit between a Parameter and a tensor of the same values.
        tolerance = 0.0 if fast else 1e-6
        _assert_runs_at_every_level(model, torch.randn(2, 5, 8), config=NestConfig(BITS), tolerance=tolerance)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    nested = copy.deepcopy(model)
    nest_model(nested, _quantize(model, NestConfig(BITS)))
    assert isinstance(nested.attention, NestedMultiheadAttention)
    assert isinstance(nested.attention.out_proj, NestedLinear)


@pytest.mark.parametrize(
    ("arch", "size", "settings"),
    [
        ("test_resnet", 64, {}),
        ("test_vit", 160, {}),
        ("test_efficientnet", 64, {}),
        ("test_convnext", 64, {}),
        ("test_byobnet", 64, {}),
        # Dynamic "same" padding (Conv2dSame) on an odd size.
        ("tf_mobilenetv3_small_minimal_100", 61, {}),
        # Weight standardisation in forward (ScaledStdConv2d).
        ("test_nfnet", 64, {}),
        # F.linear(x, self.qkv.weight) and F.conv2d(x, self.qkv_proj.weight[...]): the weight is used without a call.
        ("beit_base_patch16_224", 32, {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}),
        ("mobilevitv2_050", 64, {}),
        # Modules registered under two names.
        ("coat_lite_tiny", 64, {"img_size": 64}),
    ],
)
def test_timm_models_run_at_every_level(arch: str, size: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(arch, pretrained=False, num_classes=10, **settings).eval()
    for parameter in model.parameters():
        # Zero-initialised branches and heads would hide mistakes.
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    _assert_runs_at_every_level(model, torch.randn(2, 3, size, size), config=NestConfig((8, 4)))


@pytest.mark.parametrize(
    "layer_type",
    [
        timm.layers.Conv2dSame,
        timm.layers.StdConv2d,
        timm.layers.StdConv2dSame,
        timm.layers.ScaledStdConv2d,
        timm.layers.ScaledStdConv2dSame,
    ],
)
def test_timm_convolutions_keep_their_own_forward(layer_type: type[nn.Conv2d]) -> None:
    layer = layer_type(6, 8, 3, stride=2, groups=2)
    _assert_runs_at_every_level(nn.Sequential(layer), torch.randn(2, 6, 10, 9), config=NestConfig(BITS))
    nested = from_float(layer, quantize_weight(layer.weight, NestConfig(BITS)))
    assert isinstance(nested, layer_type)
    assert isinstance(nested, NestedConv2d)


def test_pytorchcv_subclasses_run_at_every_level_or_stay_float() -> None:
    from pytorchcv.models.octresnet import OctConv
    from pytorchcv.models.wrn1bit_cifar import Conv2d1bit
    from pytorchcv.models.xdensenet import XConv2d

    high, low = torch.randn(1, 8, 8, 8), torch.randn(1, 8, 4, 4)
    octave = OctConv(16, 16, 3, stride=1, padding=1, oct_mode="norm", oct_alpha=0.5, oct_value=2)
    weight = quantize_weight(octave.weight, NestConfig((8, 4)))
    nested = from_float(octave, weight)
    assert isinstance(nested, OctConv)
    assert isinstance(nested, NestedConv2d)
    with torch.no_grad():
        octave.weight.copy_(weight.dequantize())
        torch.testing.assert_close(nested(high, low), octave(high, low), rtol=0, atol=0)

    with torch.no_grad():
        masked = XConv2d(8, 4, 3)
    _assert_runs_at_every_level(nn.Sequential(masked), torch.randn(1, 8, 5, 5), config=NestConfig((8, 4)))

    signs = Conv2d1bit(4, 4, 3, 1, binarized=True)
    scan = find_layers(nn.Sequential(signs))
    assert scan.layers == ()
    assert scan.kept_float == (("0", "Conv2d1bit keeps only the signs of its weight"),)


def _layer(bits: tuple[int, ...] = BITS, **settings: Any) -> tuple[nn.Conv2d, QuantizedWeight, NestedLayer]:
    torch.manual_seed(1)
    layer = nn.Conv2d(5, 7, 3)
    weight = quantize_weight(layer.weight, NestConfig(bits))
    return layer, weight, from_float(layer, weight, **settings)


def test_paging_and_levels() -> None:
    layer, weight, _ = _layer()
    packed = pack_parts(weight.parts, BITS)
    nested = from_packed(layer, qparams=weight.qparams, bits=BITS, parts=packed[:1])

    def runs(level: int) -> bool:
        return torch.equal(nested.weight, weight.dequantize(level))

    assert nested.nested.level == 0
    assert runs(0)
    with pytest.raises(RuntimeError, match="only level 0"):
        nested.page_out()
    nested.page_in(packed[1].tobytes())
    assert runs(1)
    nested.page_in(torch.from_numpy(packed[2]))
    assert runs(2)
    with pytest.raises(ValueError, match="all 3 levels are present"):
        nested.page_in(packed[2])
    nested.nested.set_level(0)
    assert runs(0)
    nested.nested.set_level(None)
    assert runs(2)
    nested.nested.set_level(2)
    nested.page_out()
    assert nested.nested.level == 1
    assert runs(1)
    with pytest.raises(ValueError, match="0 to 1; got 2"):
        nested.nested.set_level(2)
    with pytest.raises(IndexError, match="not present"):
        nested.nested.part(2)


@pytest.mark.parametrize("residency", ["packed", "expanded"])
def test_a_refused_part_changes_nothing(residency: Any) -> None:
    layer, weight, _ = _layer()
    packed = pack_parts(weight.parts, BITS)
    nested = from_packed(layer, qparams=weight.qparams, bits=BITS, parts=packed[:1], residency=residency)
    # The largest residual on top of the largest high leaves the 6-bit grid.
    foreign = pack(np.full(weight.parts[0].shape, 3, dtype=np.int8), 3)
    for part, message in (
        (packed[1][:-1], f"takes {packed[1].size} bytes"),
        (np.append(packed[1][:-1], np.uint8(255)), "padding"),
        (pack(np.full(weight.parts[0].shape, -4, dtype=np.int8), 3), "does not belong"),
    ):
        with pytest.raises(ValueError, match=message):
            nested.page_in(part)
        assert nested.nested.level_count == 1
        assert torch.equal(nested.weight, weight.dequantize(0))
    nested.page_in(foreign)  # In range everywhere: only a digest can tell it from the right one.


def test_resident_bytes_are_those_of_the_buffers() -> None:
    count, channels = 7 * 5 * 9, 7
    layer, weight, nested = _layer(bits=(8, 4))
    fixed = channels * (4 + 4)
    high, low = packed_size(count, 4), packed_size(count, 5)
    assert nested.resident_bytes == fixed + high + low
    nested.page_out()
    assert nested.resident_bytes == fixed + high
    nested.nested.set_residency("expanded")
    assert nested.resident_bytes == fixed + high + 4 * count
    assert resident_bytes(nn.Sequential(nested)) == fixed + high + 4 * count + 4 * channels
    # A part that is a view of a larger buffer does not keep that alive.
    buffer = np.concatenate([np.zeros(100, np.uint8), pack_parts(weight.parts, (8, 4))[0]])
    viewed = from_packed(layer, qparams=weight.qparams, bits=(8, 4), parts=[buffer[100:]])
    assert viewed.resident_bytes == fixed + high


def test_a_model_is_paged_in_whole_or_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    weights = _quantize(model, NestConfig((8, 4)))
    lows = {name: pack_parts(weight.parts, (8, 4))[1] for name, weight in weights.items()}
    nest_model(model, weights)
    page_out(model)
    with pytest.raises(RuntimeError, match="no level to page out"):
        page_out(model)
    with pytest.raises(ValueError, match=r"layer 1: shape \(4, 5\) at 5 bits takes 13 bytes; got 1"):
        page_in(model, lows | {"1": np.zeros(1, np.uint8)})
    with pytest.raises(KeyError, match="no nested layer named 7"):
        page_in(model, lows | {"7": np.zeros(1, np.uint8)})
    assert [layer.nested.level for layer in nested_layers(model).values()] == [0, 0]
    page_in(model, {"1": lows["1"]})
    with pytest.raises(ValueError, match="layer 0 has levels 0 to 0; got 1"):
        set_level(model, 1)
    page_in(model, {"0": lows["0"]})
    set_level(model, 0)
    assert [layer.nested.level for layer in nested_layers(model).values()] == [0, 0]
    set_level(model, None)
    assert [layer.nested.level for layer in nested_layers(model).values()] == [1, 1]


def test_the_state_dict_is_the_float_rest_and_an_empty_network_is_enough() -> None:
    torch.manual_seed(2)
    model = timm.create_model("test_vit", pretrained=False).eval()
    weights = _quantize(model, NestConfig((8, 4)))
    nested = copy.deepcopy(model)
    nest_model(nested, weights)
    keys = {site.state_key for site in find_layers(model).layers}
    base = {key: value for key, value in model.state_dict().items() if key not in keys}
    assert nested.state_dict().keys() == base.keys()

    with torch.device("meta"):
        empty = timm.create_model("test_vit", pretrained=False).eval()
    nest_model(empty, weights)
    empty.load_state_dict(base, strict=True, assign=True)
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(empty(x), nested(x))


def test_casts_leave_the_scales_alone() -> None:
    _, weight, nested = _layer()
    nested.half()
    assert nested.weight.dtype == nested.bias.dtype == torch.float16
    assert nested.nested.scale.dtype == torch.float32
    assert torch.equal(nested.weight, weight.dequantize().half())
    nested.float()
    assert torch.equal(nested.weight, weight.dequantize())


def test_copies_are_independent() -> None:
    layer, weight, nested = _layer()
    other = copy.deepcopy(nested)
    other.page_out()
    assert torch.equal(nested.weight, weight.dequantize())
    assert torch.equal(other.weight, weight.dequantize(1))
    assert isinstance(layer.weight, nn.Parameter)
    assert "weight" not in dict(nested.named_parameters())


def test_inputs_are_fake_quantized() -> None:
    layer, weight, _ = _layer()
    activation = ActivationQParams(-1.0, 1.5, True, 4)
    nested = from_float(layer, weight, activation=activation)
    x = torch.randn(2, 5, 6, 6)
    expected = functional.conv2d(fake_quantize(x, activation), weight.dequantize(), layer.bias)
    assert torch.equal(nested(x), expected)
    assert not torch.equal(from_float(layer, weight)(x), expected)


def test_attention_stays_self_attention_when_inputs_are_quantized() -> None:
    class Probe(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args

    attention = Probe(8, 2)
    weight = quantize_weight(attention.in_proj_weight, NestConfig((8, 4)))
    nested = from_float(attention, weight, activation=ActivationQParams(-1.0, 1.0, True, 4))
    x, y = torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    query, key, value = nested(x, x, y)
    assert query is key
    assert query is not value
    assert torch.equal(query, fake_quantize(x, nested.activation))


def test_what_cannot_be_nested_is_refused() -> None:
    layer, weight, _ = _layer()
    with pytest.raises(TypeError, match="BatchNorm2d has no weight parameter"):
        from_float(nn.BatchNorm2d(3), weight)
    with pytest.raises(ValueError, match="3 output channels need as many scales; got 7"):
        from_float(nn.Linear(5, 3), weight)
    with pytest.raises(ValueError, match="bytes"):
        from_float(nn.Conv2d(5, 7, 5), weight)
    with pytest.raises(ValueError, match="1 to 2 parts"):
        from_packed(layer, qparams=weight.qparams, bits=(8, 4), parts=[])
    with pytest.raises(ValueError, match="residency"):
        from_float(layer, weight, residency="float")  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_on_another_device_is_the_same(bits: int) -> None:
    low = -(1 << (bits - 1))
    for shape in ((3, 5, 7), (2, 8)):
        values = np.random.default_rng(0).integers(low, -low, shape, dtype=np.int8)
        packed = pack(values, bits)
        on_device = _unpack_on_device(torch.from_numpy(packed), bits, shape)
        assert np.array_equal(on_device.numpy(), unpack(packed, bits, shape))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_computes_the_weights_of_the_cpu() -> None:
    layer, weight, nested = _layer()
    moved = copy.deepcopy(nested).cuda()
    for level in (2, 1, 0):
        set_level(moved, level)
        assert torch.equal(moved.weight.cpu(), weight.dequantize(level))
    del layer


def test_a_class_of_nested_layers_reads_weight_and_bias_of_the_active_level() -> None:
    class Fused(NestedLayer, nn.Linear, parameter="weight"):
        pass

    class Projection(NestedLayer, nn.MultiheadAttention, parameter="in_proj_weight"):
        pass

    assert (Fused.parameter, Projection.parameter) == ("weight", "in_proj_weight")
    for owner, name in ((Fused, "weight"), (Fused, "bias"), (Projection, "in_proj_weight")):
        assert isinstance(vars(owner)[name], property)
    assert "bias" not in vars(Projection)
    assert vars(Fused)["weight"].__doc__ == "The float weight of the active level."
    assert vars(Fused)["bias"].__doc__ == "The bias of the active level."
