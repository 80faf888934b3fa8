"""Jobs and real layers come to the same bytes as ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.golden.jobs import FOLDER, RECIPES, job, layers


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_a_job_comes_to_the_same_bytes(name: str, threads: int, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert job(name, tmp_path) == json.loads((FOLDER / "jobs.json").read_text())[name]
    finally:
        torch.set_num_threads(before)


def test_high_and_low_of_real_layers_are_the_same_integers(test_data: Path) -> None:
    assert layers(test_data) == json.loads((FOLDER / "layers.json").read_text())
