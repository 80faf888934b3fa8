from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nestquant.rounding import adaptive_round, round_nearest
from tests.nestquant.rounding_reference import reference_round


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_equals_the_published_implementation_on_real_layers(test_data: Path) -> None:
    golden = load_file(test_data / "golden" / "adaptive_round.safetensors")
    cases = [key.removesuffix("/x") for key in golden if key.endswith("/x")]
    assert len(cases) == 24
    for case in cases:
        bits = int(case.rsplit("/n", 1)[1])
        half = 1 << (bits - 1)
        q = adaptive_round(golden[f"{case}/x"], qmin=-half, qmax=half - 1)
        assert torch.equal(q, golden[f"{case}/expected"]), case


def test_kernel_pass_flips_the_largest_error_first() -> None:
    # Errors -3/8, -2/8, -3/8, 0: S = -1, one flip, of the first of the two largest; then S = 0.
    x = torch.tensor([1.375, 2.25, 3.375, 4.0]).view(1, 1, 2, 2)
    assert adaptive_round(x, qmin=-8, qmax=7).flatten().tolist() == [2, 2, 3, 4]


def test_channel_pass_flips_one_candidate_a_kernel() -> None:
    # Two kernels with S = -0.4 each: neither flips alone, together S = -0.8 flips the candidate with the larger error.
    x = torch.tensor([1.25, 2.15, 1.3, 2.1]).view(1, 2, 1, 2)
    assert adaptive_round(x, qmin=-8, qmax=7).flatten().tolist() == [1, 2, 2, 2]


def test_channel_pass_takes_back_the_last_flip_of_an_overcompensated_kernel() -> None:
    # Each kernel: S = -0.6, one flip, S = +0.4. Together +0.8: the flip with the larger error (+0.7) is taken back.
    x = torch.tensor([1.3, 2.3, 1.35, 2.25]).view(1, 2, 1, 2)
    assert adaptive_round(x, qmin=-8, qmax=7).flatten().tolist() == [1, 2, 2, 2]


def test_linear_layers_flip_over_the_whole_channel_and_ties_go_to_the_lower_index() -> None:
    x = torch.full((2, 8), 0.25)
    assert adaptive_round(x, qmin=-8, qmax=7).tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]] * 2


def test_nothing_is_flipped_out_of_the_range() -> None:
    # Errors -0.4 throughout: S = -1.6, two flips wanted, but 7.4 lies beyond the end.
    x = torch.tensor([[7.4, 7.4, 7.4, 3.4]])
    assert adaptive_round(x, qmin=-8, qmax=7).tolist() == [[7, 7, 7, 4]]
    assert adaptive_round(-x - 1, qmin=-8, qmax=7).tolist() == [[-8, -8, -8, -5]]


def test_values_far_beyond_the_range_are_clamped() -> None:
    assert adaptive_round(torch.tensor([[300.2, -300.2]]), qmin=-128, qmax=127).tolist() == [[127, -128]]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (3, 4, 5), (3, 4, 3, 3), (4, 1, 7, 7), (2, 3, 2, 2, 2), (1, 1)])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_equals_the_reference(shape: tuple[int, ...], bits: int) -> None:
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    generator = torch.Generator().manual_seed(bits)
    x = torch.empty(shape).uniform_(qmin - 0.7, qmax + 0.7, generator=generator)
    for values in (x, (x * 16).round() / 16):
        q = adaptive_round(values, qmin=qmin, qmax=qmax)
        assert q.dtype == torch.int8
        assert np.array_equal(q.numpy(), reference_round(values.numpy(), qmin, qmax))


@pytest.mark.usefixtures("threads")
def test_the_integers_do_not_depend_on_the_thread_count() -> None:
    x = torch.randn(257, 64, 3, 3, generator=torch.Generator().manual_seed(0)) * 40
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(adaptive_round(x, qmin=-128, qmax=127))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_slice_of_channels_gives_the_rows_of_the_whole() -> None:
    x = torch.randn(33, 16, 3, 3, generator=torch.Generator().manual_seed(1)) * 40
    whole = adaptive_round(x, qmin=-128, qmax=127)
    parts = [adaptive_round(rows, qmin=-128, qmax=127) for rows in x.split([1, 20, 12])]
    assert torch.equal(whole, torch.cat(parts))


def test_memory_layout_does_not_matter() -> None:
    x = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(2)) * 40
    laid_out = x.to(memory_format=torch.channels_last)
    assert torch.equal(adaptive_round(laid_out, qmin=-128, qmax=127), adaptive_round(x, qmin=-128, qmax=127))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_integers_of_the_cpu() -> None:
    x = torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(3)) * 40
    q = adaptive_round(x.cuda(), qmin=-128, qmax=127)
    assert q.is_cuda
    assert torch.equal(q.cpu(), adaptive_round(x, qmin=-128, qmax=127))


def test_round_nearest_takes_halves_to_even_and_clamps() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 9.0, -9.0]])
    assert round_nearest(x, qmin=-4, qmax=3).tolist() == [[0, 2, 2, 0, -2, 3, -4]]


@pytest.mark.parametrize(
    ("x", "qmin", "qmax", "message"),
    [
        (torch.zeros(3), -8, 7, "at least 2 dimensions"),
        (torch.zeros(0, 3), -8, 7, "one element"),
        (torch.zeros(2, 3, dtype=torch.int8), -8, 7, "floating point"),
        (torch.tensor([[1.0, float("nan")]]), -8, 7, "NaN"),
        (torch.tensor([[1.0, float("inf")]]), -8, 7, "infinity"),
        (torch.zeros(2, 3), 7, -8, "range"),
        (torch.zeros(2, 3), -129, 127, "int8"),
    ],
)
def test_bad_arguments_are_refused(x: torch.Tensor, qmin: int, qmax: int, message: str) -> None:
    for function in (adaptive_round, round_nearest):
        with pytest.raises(ValueError, match=message):
            function(x, qmin=qmin, qmax=qmax)


def test_running_a_model_needs_no_numba() -> None:
    # A device has no numba: importing the modules must not ask for it, and rounding must say what is missing.
    program = """
import sys, json
sys.modules["numba"] = None
import nestquant.modules, nestquant.nesting, nestquant.quantized_weight, torch
try:
    nestquant.rounding.adaptive_round(torch.zeros(1, 1), qmin=-8, qmax=7)
except ImportError as error:
    print(json.dumps(str(error)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "nestquant-service[service]" in json.loads(result.stdout)
