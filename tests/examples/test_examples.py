"""Every script of examples/ runs, in the order of its page, in one empty folder, and prints what it should."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"
PRINTED = {
    "in_memory.py": [r"part-bit: error \d+\.\d\d%", r"full-bit: error \d+\.\d\d%", r"as saved: True"],
    "job_to_a_folder.py": [r"first version 1: latest", r"level 0: [\d,]+ bytes", r"level 1: [\d,]+ bytes"],
    "switch_on_a_device.py": [
        r"part-bit: [\d,]+ bytes resident, class \d+",
        r"full-bit: [\d,]+ bytes resident, class \d+",
        r"part-bit again: True",
    ],
    "model_zoo.py": [
        r"timm.test_resnet.w84 done",
        r"timm.test_resnet.w86 done",
        r"timm.test_vit.w84 done",
        r"timm.test_vit.w86 done",
        r"results.csv results.jsonl results.parquet",
    ],
    "own_network.py": [r"part-bit answers \(64, 10\)"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs(folder: Path, name: str) -> None:
    words = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(PRINTED[name]), done.stdout
    for line, pattern in zip(lines, PRINTED[name], strict=True):
        assert re.fullmatch(pattern, line), line


def test_the_page_names_every_script() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    named = set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text()))
    assert named == scripts == {*PRINTED, "my_nets.py"}
