from __future__ import annotations

import pytest
import torch

from nestquant.config import NestConfig, Rounding, Scheme, signed_range
from nestquant.nesting import decompose, recompose, to_full_grid
from nestquant.quantized_weight import quantize_weight
from tests.nestquant.test_config import ALL_PAIRS


@pytest.mark.parametrize("rounding", ["adaptive", "nearest"])
@pytest.mark.parametrize("bits", [*ALL_PAIRS, (8, 6, 4), (8, 5, 3), (8, 7, 6, 5, 4, 3, 2, 1), (8,)])
def test_every_integer_comes_back_exactly_and_every_part_fits_its_bits(
    bits: tuple[int, ...], rounding: Rounding
) -> None:
    low, high = signed_range(bits[0])
    every = torch.arange(low, high + 1, dtype=torch.int8)
    shuffled = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    for q in (every.view(1, -1), every.view(-1, 1), shuffled.repeat(9).view(-1, 1, 3, 3)):
        parts = decompose(q, bits, rounding=rounding)
        assert len(parts) == len(bits)
        for part, width in zip(parts, NestConfig(bits).level_bits, strict=True):
            part_low, part_high = signed_range(width)
            assert part.dtype == torch.int8
            assert part_low <= int(part.min())
            assert int(part.max()) <= part_high
        assert torch.equal(recompose(parts, bits), q)
        for count in range(1, len(bits)):
            coarse = recompose(parts[:count], bits)
            # Floor or ceiling, or clamped at the top: less than a whole coarse step away, on the full grid.
            step = 1 << (bits[0] - bits[-count])
            assert int((to_full_grid(coarse, bits, count - 1).int() - q.int()).abs().max()) < 2 * step


def test_known_levels() -> None:
    q = torch.tensor([[127, -128, 5, -5]], dtype=torch.int8)
    high, low = decompose(q, (8, 4), rounding="nearest")
    assert high.tolist() == [[7, -8, 0, 0]]
    assert low.tolist() == [[15, 0, 5, -5]]
    assert [part.tolist() for part in decompose(q, (8, 6, 4), rounding="nearest")] == [
        [[7, -8, 0, 0]],
        [[3, 0, 1, -1]],
        [[3, 0, 1, -1]],
    ]


def test_adaptive_decomposition_keeps_the_sum_of_a_channel() -> None:
    q = torch.full((1, 32), 4, dtype=torch.int8)
    high, low = decompose(q, (8, 4), rounding="adaptive")
    # Nearest would give 0 everywhere; adaptively 32 * 4 / 16 = 8 of them become 1.
    assert int(high.sum()) == 8
    assert high[0, :8].tolist() == [1] * 8
    assert set(low.flatten().tolist()) == {4, -12}


def test_to_full_grid() -> None:
    assert to_full_grid(torch.tensor([[-8, 7]]), (8, 6, 4), 0).tolist() == [[-128, 112]]
    assert to_full_grid(torch.tensor([[-32, 31]]), (8, 6, 4), 1).tolist() == [[-128, 124]]
    assert to_full_grid(torch.tensor([[-128, 127]]), (8, 6, 4), 2).tolist() == [[-128, 127]]


def test_mismatched_parts_are_refused() -> None:
    part = torch.zeros(1, 2, dtype=torch.int8)
    with pytest.raises(ValueError, match="1 to 2 parts"):
        recompose([], (8, 4))
    with pytest.raises(ValueError, match="1 to 2 parts"):
        recompose([part] * 3, (8, 4))
    with pytest.raises(ValueError, match="one shape"):
        recompose([part, part.T], (8, 4))
    with pytest.raises(ValueError, match=r"\[-144, 0\]"):
        recompose([torch.tensor([[-8, 0]]), torch.tensor([[-16, 0]])], (8, 4))
    with pytest.raises(ValueError, match="4 signed bits"):
        decompose(torch.tensor([[8]]), (4, 2))
    with pytest.raises(ValueError, match="integers"):
        decompose(torch.zeros(1, 1), (4, 2))


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [*ALL_PAIRS, (8, 6, 4), (8,)])
def test_a_quantized_weight_is_within_a_step_in_every_mode(bits: tuple[int, ...], scheme: Scheme) -> None:
    config = NestConfig(bits, scheme)
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(7))
    quantized = quantize_weight(weight, config)
    for level in range(config.level_count):
        step = quantized.qparams.scale.view(-1, 1, 1, 1) * (1 << (config.full_bits - config.grid_bits(level)))
        error = (quantized.dequantize(level) - weight).abs() / step
        # Below 1 for each rounding stage up to here; values clamped at the top of a coarse grid add at most one more.
        assert float(error.max()) < 3
    full_error = (quantized.dequantize() - weight).abs() / quantized.qparams.scale.view(-1, 1, 1, 1)
    assert float(full_error.max()) < 1.0 + 1e-3
    if scheme == "symmetric":
        assert int(recompose(quantized.parts, bits).min()) >= -(2 ** (bits[0] - 1) - 1)


def test_rows_are_independent() -> None:
    weight = torch.randn(10, 4, 3, 3, generator=torch.Generator().manual_seed(8))
    whole = quantize_weight(weight, NestConfig((8, 6, 4)))
    rows = quantize_weight(weight[3:8], NestConfig((8, 6, 4)))
    for part, part_rows in zip(whole.parts, rows.parts, strict=True):
        assert torch.equal(part[3:8], part_rows)
    assert torch.equal(whole.qparams.scale[3:8], rows.qparams.scale)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_integers_of_any_width_come_apart_into_int8(dtype: torch.dtype) -> None:
    q = torch.tensor([[-128, -1], [0, 127]])
    parts = decompose(q.to(dtype), (8, 6, 4))
    assert [part.dtype for part in parts] == [torch.int8] * 3
    assert all(torch.equal(*pair) for pair in zip(parts, decompose(q.to(torch.int8), (8, 6, 4)), strict=True))
    assert torch.equal(recompose([part.to(dtype) for part in parts], (8, 6, 4)), q.to(torch.int8))


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [(8, 7), (8, 6), (8, 4), (8, 6, 4), (6, 3)])
def test_the_nested_range_keeps_the_largest_weights_in_part_bit_mode(bits: tuple[int, ...], scheme: Scheme) -> None:
    # One weight a channel, as in depthwise 1x1 convolutions: the published range clips each of them.
    weight = torch.linspace(0.25, 4, 16).view(-1, 1, 1, 1)
    top = signed_range(bits[-1])[1] << (bits[0] - bits[-1])
    full = quantize_weight(weight, NestConfig(bits, scheme=scheme))
    nested = quantize_weight(weight, NestConfig(bits, scheme=scheme, range="nested"))
    torch.testing.assert_close(nested.dequantize(0), weight)
    torch.testing.assert_close(nested.dequantize(), weight)
    steps = signed_range(bits[0])[1] - (0 if scheme == "symmetric" else signed_range(bits[0])[0])
    lost = (signed_range(bits[0])[1] - top) / steps
    torch.testing.assert_close(full.dequantize(0), weight * (1 - lost))


def test_below_three_bits_the_nested_range_is_the_published_one() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    ranges = [quantize_weight(weight, NestConfig((8, 2), range=ends)) for ends in ("full", "nested")]
    assert torch.equal(ranges[0].qparams.scale, ranges[1].qparams.scale)
    assert all(map(torch.equal, ranges[0].parts, ranges[1].parts))
