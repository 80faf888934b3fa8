"""What a device has: Python, the wheel and its extra ``onnx``, in an environment of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

UV = Path(sys.executable).parent / "uv"
_OURS = ("PYTHON", "NESTQUANT", "VIRTUAL")


def run(*words: object, cwd: Path, **environment: str) -> str:
    """Run a program with nothing of ours in its environment; return what it prints. Raises RuntimeError where it
    fails.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith(_OURS)} | environment
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))} ended {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def install(folder: Path) -> Path:
    """Build the wheel and install it into an empty environment below ``folder``, at the pinned versions; return the
    environment.
    """
    place = folder / "environment"
    run(UV, "build", "--quiet", "--out-dir", folder, ROOT, cwd=folder)
    run(UV, "venv", "--quiet", "--python", sys.executable, place, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    pinned = ("--python", place / "bin" / "python", "--constraint", ROOT / "constraints.txt")
    run(UV, "pip", "install", "--quiet", *pinned, f"{wheel}[onnx]", cwd=folder)
    return place
