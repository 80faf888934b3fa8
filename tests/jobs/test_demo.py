"""What ``make demo`` shows: a real network's weights out of a package, and photographs that calibration never sees."""

from __future__ import annotations

import os
import pty
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from jobs.cli import photographs
from jobs.errors import SpecError

SILENCE_S = 10.0


def test_the_packages_weights_are_those_of_the_architecture(test_data: Path) -> None:
    expected = load_file(test_data / "weights" / "efficientnet_lite0.safetensors")
    state = photographs.network().state_dict()
    assert set(state) == set(expected)
    weights = [key for key in expected if not key.endswith("num_batches_tracked")]
    assert len(weights) == 49 * (1 + 4) + 2  # convolutions with their norms, and the classifier
    assert all(torch.equal(state[key], expected[key]) for key in weights)


def test_photographs_of_evaluation_are_not_among_those_of_calibration() -> None:
    held_out = photographs.photographs("")
    assert [path.name for path in held_out] == ["chelsea.png", "coffee.png", "rocket.jpg", "china.jpg"]
    views = np.stack([view for path in held_out for view in photographs.views(Image.open(path))])
    calibration = photographs.calibration_views()
    assert views.shape == (120, 224, 224, 3)
    assert calibration.dtype == np.uint8
    assert not {view.tobytes() for view in views} & {view.tobytes() for view in calibration}


def test_the_float_network_knows_a_cat_and_an_espresso() -> None:
    pixels = np.stack([photographs.whole(Image.open(path)) for path in photographs.photographs("")[:2]])
    classes, probabilities = photographs.answers(photographs.network(), pixels)
    assert classes.tolist() == [285, 967]  # Egyptian cat, espresso
    assert (probabilities > 0.3).all()


def test_a_folder_without_photographs_is_said(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(SpecError, match="no photograph in this folder"):
        photographs.photographs(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--toy", "1"], []], ids=["toy", "photographs"])
def test_the_demo_is_never_silent_on_a_terminal(words: list[str], tmp_path: Path) -> None:
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        root = str(Path(__file__).resolve().parents[2])
        os.execve(
            sys.executable,
            [sys.executable, "-m", "jobs.cli.demo", *words],
            {**os.environ, "PYTHONPATH": root, "COLUMNS": "100", "TERM": "xterm-256color"},
        )
    output, silence, heard = b"", 0.0, time.monotonic()
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # how a pseudo-terminal says that the other end is closed
            break
        if not chunk:
            break
        silence, heard = max(silence, time.monotonic() - heard), time.monotonic()
        output += chunk
    _, status = os.waitpid(pid, 0)
    text = output.decode()
    assert os.waitstatus_to_exitcode(status) == 0, text
    assert "runs full-bit" in text
    assert silence < SILENCE_S
    if not words:
        with Image.open(tmp_path / ".demo" / "photographs.png") as picture:
            assert picture.size == (4 * 232 + 8, 224 + 24 + 3 * 18)
