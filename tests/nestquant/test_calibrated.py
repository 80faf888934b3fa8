"""The recipe ``calibrated``: input columns, moments, error feedback, targets, biases."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn import functional

from nestquant import moments as moments_module
from nestquant.calibrated import calibrate_weight
from nestquant.config import NestConfig, Scheme
from nestquant.error_feedback import damped, error_feedback_round
from nestquant.modules import from_float
from nestquant.moments import (
    POSITIONS,
    Moments,
    UnreadableInputs,
    from_blocks,
    input_blocks,
    input_columns,
    read_inputs,
)
from nestquant.nesting import recompose
from nestquant.quantized_weight import quantize_weight
from nestquant.surgery import channel_first


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYERS = [
    nn.Linear(6, 4),
    nn.Conv1d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    nn.Conv2d(4, 8, (3, 2), stride=(1, 2), groups=2),
    nn.Conv2d(6, 6, 3, padding="same", groups=6),
    nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
]
INPUTS = [(2, 5, 6), (2, 4, 9), (2, 4, 7, 7), (2, 4, 6, 6), (2, 6, 5, 5), (2, 3, 6, 6)]


@pytest.mark.parametrize(("layer", "shape"), list(zip(LAYERS, INPUTS, strict=True)), ids=str)
def test_weights_times_columns_are_the_layers_outputs(layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...]) -> None:
    inputs = random(*shape)
    with torch.no_grad():
        layer.bias.zero_()  # type: ignore[union-attr]
        expected = layer(inputs)
        columns = input_columns(layer, inputs)
        groups = columns.shape[0]
        outputs = layer.weight.reshape(groups, layer.weight.shape[0] // groups, -1) @ columns
    flat = expected if isinstance(layer, nn.Linear) else expected.movedim(1, -1)
    seen = outputs.flatten(0, 1).t().sort(dim=0).values
    assert torch.allclose(seen, flat.flatten(0, -2).sort(dim=0).values, atol=1e-5)


def test_large_images_count_at_the_same_few_positions() -> None:
    layer = nn.Conv2d(2, 2, 1)
    inputs = random(3, 2, 40, 40)
    columns = input_columns(layer, inputs)
    assert columns.shape == (1, 2, 3 * POSITIONS)
    first = input_columns(layer, inputs[:1])
    assert torch.equal(columns.reshape(2, POSITIONS, 3)[..., 0], first[0])


def test_the_positions_that_count_lie_all_over_the_image() -> None:
    rows, columns = 40, 40
    where = torch.arange(rows * columns, dtype=torch.float32).reshape(1, 1, rows, columns)
    chosen = input_columns(nn.Conv2d(1, 1, 1), where).flatten().long()
    assert chosen.unique().numel() == POSITIONS
    # Evenly drawn, each quarter of the rows and of the columns holds 32 of the 128, give or take 15 (three deviations).
    for parts in (chosen // columns // (rows // 4), chosen % columns // (columns // 4)):
        counts = parts.bincount(minlength=4)
        assert counts.sum() == POSITIONS
        assert counts.min() >= 17, counts
        assert counts.max() <= 47, counts


class Padded(nn.Conv2d):
    """Pads behind alone, and runs the convolution as a functional call."""

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(inputs, (0, 1, 0, 1)), weight=self.weight, bias=self.bias, stride=2)


class Rooted(nn.Linear):
    """Runs over the root of its input."""

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs.abs().sqrt(), self.weight, bias=self.bias)


def test_a_forward_of_its_own_is_read_at_the_call_with_the_weight() -> None:
    inputs = random(2, 2, 4, 4)
    columns = input_columns(Padded(2, 2, 3), inputs)
    whole = nn.Conv2d(2, 2, 3, stride=2)
    assert torch.equal(columns, input_columns(whole, functional.pad(inputs, (0, 1, 0, 1))))
    assert torch.equal(input_columns(Rooted(4, 3), inputs[0]), input_columns(nn.Linear(4, 3), inputs[0].abs().sqrt()))
    same = timm.layers.create_conv2d(4, 4, 3, stride=2, padding="same", depthwise=True)
    assert type(same) is timm.layers.Conv2dSame
    inputs = random(2, 4, 7, 8)  # an odd height and an even width: SAME pads them differently
    outputs = same.weight.reshape(4, 1, -1) @ input_columns(same, inputs)
    assert torch.allclose(outputs[:, 0].reshape(4, 16, 2).permute(2, 0, 1).reshape(2, 4, 4, 4), same(inputs), atol=1e-6)


class Absolute(nn.Conv2d):
    """Convolves with the sizes of its weights alone."""

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.conv2d(inputs, self.weight.abs())


class Multiplied(nn.Linear):
    """Multiplies each input by a weight of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight


class Twice(nn.Linear):
    """Uses its weight for two things."""

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(functional.linear(inputs, self.weight), self.weight)


class Fed(nn.Linear):
    """Wants something beside its input."""

    def forward(self, inputs: Tensor, scale: Tensor) -> Tensor:
        return super().forward(inputs * scale)


UNREADABLE = [
    (Absolute(2, 2, 3), "Absolute transforms its weight in a way that is not known"),
    (Multiplied(4, 4), "Multiplied uses its weight in no convolution or linear map"),
    (Twice(4, 4), "Twice uses its weight 2 times"),
    (Fed(4, 4), "Fed does not run on its first input alone"),
]


@pytest.mark.parametrize(("layer", "reason"), UNREADABLE, ids=str)
def test_layers_that_read_their_input_otherwise_have_no_columns(layer: nn.Module, reason: str) -> None:
    with pytest.raises(UnreadableInputs, match=reason):
        input_columns(layer, random(1, 2, 4, 4))


TRANSPOSED = [
    nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(4, 6, 2, stride=2),
    nn.ConvTranspose2d(4, 6, (2, 3), stride=(1, 3), padding=(1, 0), dilation=(2, 1), groups=2),
]


@pytest.mark.parametrize("layer", TRANSPOSED, ids=str)
def test_a_transposed_convolution_is_one_over_spaced_inputs(layer: nn.ConvTranspose2d) -> None:
    inputs = random(2, 4, 4, 3)
    with torch.no_grad():
        expected = layer(inputs) - layer.bias[:, None, None]  # type: ignore[index]
        columns = input_columns(layer, inputs)
        weight = channel_first(layer.weight, "conv_transpose2d", layer.groups)
        outputs = (weight.reshape(layer.groups, 6 // layer.groups, -1) @ columns).flatten(0, 1)
    # Positions are ascending, and for each of them come all images.
    assert torch.allclose(outputs.reshape(6, -1, 2).permute(2, 0, 1), expected.flatten(2), atol=1e-5)


STANDARDISED = [
    timm.layers.StdConv2d(4, 6, 3, bias=True),
    timm.layers.StdConv2dSame(4, 6, 3, stride=2, padding="same", bias=True),
    timm.layers.ScaledStdConv2d(4, 6, 3, gamma=1.7),
    timm.layers.ScaledStdConv2dSame(4, 6, 3, stride=2, padding="same", groups=2),
]


@pytest.mark.parametrize("layer", STANDARDISED, ids=str)
@pytest.mark.parametrize("bits", [(8, 4), (8, 3)])
def test_standardised_weights_are_solved_for_what_the_layer_makes_of_them(
    layer: nn.Conv2d, bits: tuple[int, int]
) -> None:
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.copy_(0.2 * random(*layer.weight.shape, seed=3) + 0.1)
    mixed = random(4, 4, seed=4)
    inputs = torch.einsum("ij,njhw->nihw", mixed, random(40, 4, 6, 6, seed=5)) + 1
    with torch.no_grad():
        read = read_inputs(layer, inputs)
        assert read.transform is not None
        assert read.transform.centred
        config, groups = NestConfig(bits=bits), layer.groups
        moments = [Moments.of(read.columns, read.columns)] * 2
        solved = calibrate_weight(layer.weight, config, moments, groups=groups, transform=read.transform)
        blind = calibrate_weight(layer.weight, config, moments, groups=groups)
        plain = quantize_weight(layer.weight, config)
        # The stored weight is the layer's own: its scale is that of the float weights, not of the standardised ones.
        assert (solved.dequantize(1) - layer.weight).abs().max() < 0.05
        expected = layer(inputs)
        errors = []
        for weight in (solved, blind, plain):
            nested = from_float(layer, weight)
            nested.nested.set_level(0)
            errors.append((nested(inputs) - expected).double())
    biased, unaware, _ = (float(error.mean(dim=(0, 2, 3)).abs().max()) for error in errors)
    assert biased < 2e-2
    assert biased < 0.5 * unaware
    assert errors[0].square().mean() < 0.7 * errors[2].square().mean()


def test_a_scaled_weight_is_solved_as_it_is() -> None:
    class Scaled(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return functional.linear(inputs, self.weight * 0.5, self.bias)

    layer, inputs = Scaled(6, 4), random(2, 9, 6)
    read = read_inputs(layer, inputs)
    assert read.transform is not None
    assert not read.transform.centred
    assert torch.equal(read.transform.apply(torch.ones(4, 6)), torch.full((4, 6), 0.5))
    with torch.no_grad():
        moments = [Moments.of(read.columns, read.columns)] * 2
        solved = calibrate_weight(layer.weight, NestConfig(), moments, transform=read.transform)
        same = calibrate_weight(layer.weight, NestConfig(), moments)
    assert all(torch.equal(one, other) for one, other in zip(solved.parts, same.parts, strict=True))
    assert solved.biases is not None
    assert same.biases is not None
    assert torch.allclose(solved.biases.float(), 0.5 * same.biases.float(), atol=1e-3)


def test_many_inputs_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = nn.Conv2d(22, 8, 1, groups=2), random(60, 22, 3, 3) + 0.5
    whole = input_columns(layer, inputs)
    monkeypatch.setattr(moments_module, "MAX_INPUTS", 10)
    monkeypatch.setattr(moments_module, "BLOCK_INPUTS", 4)
    assert input_blocks(11) == (3, 4)
    columns = input_columns(layer, inputs)
    assert columns.shape == (6, 4, 540)
    assert torch.equal(from_blocks(columns.mT, 2, 11).mT, whole)
    assert torch.equal(columns[2, 3], torch.zeros(540))
    weight, config = random(8, 11, 1, 1, seed=3), NestConfig(bits=(8, 3))
    solved = calibrate_weight(weight, config, [Moments.of(columns, columns)] * 2, groups=2)
    plain = quantize_weight(weight, config)
    assert solved.biases is not None
    with torch.no_grad():
        expected = functional.conv2d(inputs, weight, groups=2)
        ours = functional.conv2d(inputs, solved.dequantize(0), solved.biases[0].float(), groups=2) - expected
        theirs = functional.conv2d(inputs, plain.dequantize(0), groups=2) - expected
    assert ours.mean(dim=(0, 2, 3)).abs().max() < 1e-2
    assert ours.square().mean() < 0.7 * theirs.square().mean()


def test_merged_moments_are_those_of_all_the_columns() -> None:
    x, y = random(2, 3, 50), random(2, 3, 50, seed=1)
    whole = Moments.of(x, y)
    merged = Moments.merge([Moments.of(x[..., :20], y[..., :20]), Moments.of(x[..., 20:], y[..., 20:])])
    assert merged.count == 50
    for name in ("x", "y", "xy", "yy"):
        assert torch.allclose(getattr(merged, name), getattr(whole, name), rtol=1e-6, atol=1e-5), name
    cross, own = whole.centred()
    for group in range(2):
        expected = torch.cov(torch.cat([x[group], y[group]]).double(), correction=0)
        assert torch.allclose(cross[group], expected[:3, 3:], atol=1e-6)
        assert torch.allclose(own[group], expected[3:, 3:], atol=1e-6)


def test_a_large_mean_does_not_drown_the_covariances() -> None:
    """A token's outlier channel may have a mean a thousand times its deviation; float32 squares would lose it."""
    x = random(1, 3, 4000) + torch.tensor([3000.0, 0.0, -50.0])[:, None]
    y = x + 0.1 * random(1, 3, 4000, seed=1)
    cross, own = Moments.merge(
        [Moments.of(x[..., :900], y[..., :900]), Moments.of(x[..., 900:], y[..., 900:])]
    ).centred()
    expected = torch.cov(torch.cat([x[0], y[0]]).double(), correction=0)
    assert torch.allclose(cross[0], expected[:3, 3:], atol=1e-5)
    assert torch.allclose(own[0], expected[3:, 3:], atol=1e-5)


def loss(q: Tensor, x: Tensor, second: Tensor) -> Tensor:
    error = q - x
    return ((error @ second) * error).sum(-1)


def test_error_feedback_comes_near_the_best_of_all_roundings() -> None:
    """Four inputs have 81 neighbours to try; nearest is far from the best of them where inputs go together."""
    mixed = random(4, 4, seed=3).double()
    second = (mixed @ mixed.t() + 0.05 * torch.eye(4))[None].double()
    x = 3 * random(1, 200, 4, seed=4).double()
    bound = torch.full_like(x, 100)
    q = error_feedback_round(x, second=second, low=-bound, high=bound, damping=0.0)
    steps = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=4)), dtype=torch.float64)
    best = loss(x.round()[0, :, None] + steps, x[0, :, None], second[0]).amin(dim=1)
    nearest, found = loss(x.round(), x, second)[0], loss(q, x, second)[0]
    assert torch.equal(q, q.round())
    assert found.mean() < 0.5 * nearest.mean()
    assert found.mean() < 1.25 * best.mean()


def test_independent_inputs_are_rounded_to_nearest_within_their_bounds() -> None:
    x = 4 * random(3, 5, 7).double()
    second = torch.diag_embed(torch.rand(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1)
    low, high = torch.full_like(x, -3), torch.full_like(x, 2)
    q = error_feedback_round(x, second=second, low=low, high=high)
    assert torch.equal(q, x.round().clamp(-3, 2))


def test_inputs_that_are_always_zero_have_no_preference() -> None:
    x = random(1, 2, 3).double()
    bound = torch.full_like(x, 9)
    q = error_feedback_round(x, second=torch.zeros(1, 3, 3).double(), low=-bound, high=bound)
    assert torch.equal(q, x.round())
    assert torch.equal(damped(torch.zeros(1, 3, 3), 0.01), torch.eye(3)[None])


def test_moments_that_do_not_fit_are_refused() -> None:
    x = random(1, 2, 3).double()
    with pytest.raises(ValueError, match=r"must have shape \(1, 3, 3\)"):
        error_feedback_round(x, second=torch.eye(2)[None], low=x, high=x)
    with pytest.raises(ValueError, match="NaN or infinity"):
        error_feedback_round(x, second=torch.full((1, 3, 3), torch.nan), low=x, high=x)
    columns = random(1, 3, 40)
    with pytest.raises(ValueError, match="2 levels need as many moments; got 1"):
        calibrate_weight(random(4, 3), NestConfig(), [Moments.of(columns, columns)])
    with pytest.raises(ValueError, match="do not fit a weight"):
        calibrate_weight(random(4, 5), NestConfig(), [Moments.of(columns, columns)] * 2)


CONFIGS: list[tuple[tuple[int, ...], Scheme]] = [
    ((8, 4), "asymmetric"),
    ((8, 3), "symmetric"),
    ((8, 6, 4), "asymmetric"),
    ((6, 4), "asymmetric"),
    ((8, 1), "symmetric"),
    ((2, 1), "asymmetric"),
    ((8,), "asymmetric"),
    ((1,), "asymmetric"),
]


@pytest.mark.parametrize(("bits", "scheme"), CONFIGS)
@pytest.mark.parametrize("groups", [1, 4])
def test_every_level_is_nearer_to_the_float_outputs_than_without_data(
    bits: tuple[int, ...], scheme: Scheme, groups: int
) -> None:
    """The float layer on ``x`` is what counts, the quantized one sees ``y``: on the very columns, with their bias."""
    weight = random(8, 12 // groups, 2, 1, seed=5)
    mixed = random(groups, 24 // groups, 24 // groups, seed=6)
    x = mixed @ random(groups, 24 // groups, 2000, seed=7) + 1
    y = x + 0.1 * random(groups, 24 // groups, 2000, seed=8)
    config = NestConfig(bits=bits, scheme=scheme)
    solved = calibrate_weight(weight, config, [Moments.of(x, y)] * len(bits), groups=groups)
    plain = quantize_weight(weight, config)
    recompose(solved.parts, bits)  # raises where a level leaves its grid
    for part, width in zip(solved.parts, config.level_bits, strict=True):
        assert int(part.min()) >= -(1 << (width - 1))
        assert int(part.max()) < 1 << (width - 1)
    assert solved.biases is not None

    def outputs(values: Tensor, columns: Tensor) -> Tensor:
        return (values.reshape(groups, 8 // groups, -1) @ columns).flatten(0, 1)

    wanted = outputs(weight, x)
    for level in range(len(bits)):
        ours = outputs(solved.dequantize(level), y) + solved.biases[level].float()[:, None]
        theirs = outputs(plain.dequantize(level), y)
        assert (ours - wanted).mean(dim=1).abs().max() < 2e-2
        if config.grid_bits(level) > 1:  # two integers for all weights: nothing to choose from
            assert (ours - wanted).square().mean() < (theirs - wanted).square().mean()


def test_a_nested_layer_adds_the_bias_of_the_level_that_runs() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    inputs = random(2, 4, 5, 5)
    columns = input_columns(layer, inputs)
    weight = calibrate_weight(layer.weight, NestConfig(), [Moments.of(columns, columns)] * 2)
    assert weight.biases is not None
    nested = from_float(layer, weight)
    assert set(nested.state_dict()) == {"bias"}
    for level in (1, 0):
        nested.nested.set_level(level)
        bias = layer.bias + weight.biases[level]  # type: ignore[operator]
        expected = functional.conv2d(inputs, weight.dequantize(level), bias, padding=1)
        assert torch.equal(nested(inputs), expected)
    without = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    nested = from_float(without, weight)
    expected = functional.conv2d(inputs, weight.dequantize(1), weight.biases[1].float(), padding=1)
    assert torch.equal(nested(inputs), expected)
    assert nested.resident_bytes == from_float(without, quantize_weight(layer.weight, NestConfig())).resident_bytes + 24
    half = nested.half()
    assert half.nested.biases is not None
    assert half.nested.biases.dtype == torch.float16
    assert torch.equal(half.nested.biases, weight.biases)


def test_inputs_of_equal_strength_are_rounded_in_their_order() -> None:
    inputs = 200
    mixed = random(inputs, inputs, seed=8).double()
    correlation = torch.corrcoef(mixed)
    equal = correlation.fill_diagonal_(1.0)[None]
    # The same, with each input stronger than the next by next to nothing.
    ordered = equal + torch.diag_embed(1e-12 * torch.arange(inputs, 0, -1, dtype=torch.float64))
    x = 3 * random(1, 4, inputs, seed=9).double()
    bound = torch.full_like(x, 100)
    q = error_feedback_round(x, second=equal, low=-bound, high=bound)
    assert torch.equal(q, error_feedback_round(x, second=ordered, low=-bound, high=bound))
    backwards = equal + torch.diag_embed(1e-12 * torch.arange(inputs, dtype=torch.float64))
    assert not torch.equal(q, error_feedback_round(x, second=backwards, low=-bound, high=bound))
