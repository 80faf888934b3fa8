from __future__ import annotations

import pytest
import torch

from nestquant.affine import QParams, choose_qparams, dequantize, to_grid
from nestquant.config import Scheme


def test_asymmetric_grid() -> None:
    weight = torch.tensor([[-1.0, 0.0, 1.55], [0.5, 1.0, 2.55], [-2.55, -1.0, -0.5]])
    qparams = choose_qparams(weight, bits=8, scheme="asymmetric")
    torch.testing.assert_close(qparams.scale, torch.tensor([0.01, 0.01, 0.01]))
    # -128 - round(low / scale), with low = -1, 0 (widened) and -2.55.
    assert qparams.zero_point.tolist() == [-28, -128, 127]
    assert qparams.zero_point.dtype == torch.int32
    grid = to_grid(weight, qparams)
    torch.testing.assert_close(grid[0], torch.tensor([-128.0, -28.0, 127.0]))
    torch.testing.assert_close(dequantize(grid.round().to(torch.int8), qparams), weight)


def test_symmetric_grid() -> None:
    weight = torch.tensor([[-1.27, 0.5, 0.0], [0.1, 0.2, 12.7]])
    qparams = choose_qparams(weight, bits=8, scheme="symmetric")
    torch.testing.assert_close(qparams.scale, torch.tensor([0.01, 0.1]))
    assert qparams.zero_point.tolist() == [0, 0]
    torch.testing.assert_close(to_grid(weight, qparams)[:, 0], torch.tensor([-127.0, 1.0]))


def test_one_bit_grid() -> None:
    qparams = choose_qparams(torch.tensor([[-1.0, 0.25], [0.5, 2.0]]), bits=1, scheme="asymmetric")
    assert qparams.scale.tolist() == [1.25, 2.0]
    assert qparams.zero_point.tolist() == [0, -1]


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_an_all_zero_channel_gets_scale_one_and_comes_back_as_zero(scheme: Scheme) -> None:
    weight = torch.zeros(2, 3, 3, 3)
    qparams = choose_qparams(weight, bits=4, scheme=scheme)
    assert qparams.scale.tolist() == [1.0, 1.0]
    assert torch.equal(to_grid(weight, qparams), qparams.zero_point.float().view(2, 1, 1, 1).expand_as(weight))
    assert torch.equal(dequantize(to_grid(weight, qparams).to(torch.int8), qparams), weight)


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("size", [1e-45, 1e-39, 3.4e38])
def test_extreme_ranges_keep_a_normal_scale_and_the_range_of_integers(scheme: Scheme, size: float) -> None:
    weight = torch.tensor([[-size, size]])
    qparams = choose_qparams(weight, bits=8, scheme=scheme)
    assert torch.finfo(torch.float32).tiny <= qparams.scale.item() < float("inf")
    grid = to_grid(weight, qparams)
    assert torch.isfinite(grid).all()
    assert grid.abs().max() <= 128.5


def test_rows_and_halves() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    qparams = choose_qparams(weight, bits=8, scheme="asymmetric")
    rows = choose_qparams(weight[2:5], bits=8, scheme="asymmetric")
    assert torch.equal(qparams.rows(2, 5).scale, rows.scale)
    assert torch.equal(qparams.rows(2, 5).zero_point, rows.zero_point)
    half = choose_qparams(weight.bfloat16(), bits=8, scheme="asymmetric")
    assert torch.equal(half.scale, choose_qparams(weight.bfloat16().float(), bits=8, scheme="asymmetric").scale)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]),
            "1 of 4 weights are NaN or infinite, the first in output channel 1",
        ),
        (torch.tensor([[float("-inf"), 0.0]]), "infinite"),
        (torch.zeros(4), "2 dimensions"),
        (torch.zeros(4, 0), "one element"),
        (torch.zeros(2, 2, dtype=torch.int32), "floating point"),
    ],
)
def test_bad_weights_are_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_qparams(weight, bits=8, scheme="asymmetric")


def test_bad_qparams_are_refused() -> None:
    with pytest.raises(ValueError, match="one value for each"):
        QParams(torch.ones(2), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="float32"):
        QParams(torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="do not fit"):
        dequantize(torch.zeros(3, 2), QParams(torch.ones(2), torch.zeros(2, dtype=torch.int32)))
    with pytest.raises(ValueError, match="at least 2 bits"):
        choose_qparams(torch.ones(2, 2), bits=1, scheme="symmetric")
