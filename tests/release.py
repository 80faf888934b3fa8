"""Checks of what is released: ``python -m tests.release dist`` installs wheel and sdist and runs a job with each, and
``python -m tests.release wheels`` asks the resolver for wheels of every pinned dependency, Python by Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from tests.test_docs import ROOT, blocks

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28")
EXTRAS = ("s3", "run", "service", "demo")  # what users install; 'docs' needs Python 3.11.5
UV = str(Path(sys.executable).parent / "uv")


def check_dist(folder: Path) -> None:
    """Install each file of ``folder`` into an empty environment, and run the tutorial's blocks there."""
    files = sorted(path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz")))
    if len(files) != 2:
        sys.exit(f"{folder}: {len(files)} distributions; expected one wheel and one sdist.")
    for file in files:
        with tempfile.TemporaryDirectory() as scratch:
            environment = Path(scratch) / "environment"
            program = environment / "bin" / "python"
            _run(UV, "venv", "--quiet", "--python", sys.executable, str(environment))
            pinned = ("--quiet", "--python", str(program), "--constraint", str(ROOT / "constraints.txt"))
            _run(UV, "pip", "install", *pinned, "--compile-bytecode", f"{file.resolve()}[service]")
            work = Path(scratch) / "work"
            work.mkdir()
            _run(str(environment / "bin" / "nestquant"), "--help", cwd=work)
            for language, title, text in blocks(ROOT / "docs" / "tutorial.md"):
                if title:
                    (work / title).write_text(text)
                elif language == "python":
                    _run(str(program), "-c", text, cwd=work)
                else:
                    for line in text.splitlines():
                        _run(str(environment / "bin" / line.split()[0]), *line.split()[1:], cwd=work)
        print(f"{file.name}: installed into an empty environment; --help and the whole tutorial ran.", flush=True)


def check_wheels() -> None:
    """Resolve every dependency to wheels, at the pinned versions, for each Python and machine."""
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    failed = []
    for python, platform in product(PYTHONS, PLATFORMS):
        command = [UV, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:"]
        command += ["--python-version", python, "--python-platform", platform, "--constraint", "constraints.txt"]
        found = subprocess.run(
            [*command, *extras, "pyproject.toml"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        count = len(found.stdout.splitlines())
        print(f"Python {python}, {platform}: {f'{count} wheels' if not found.returncode else 'no'}", flush=True)
        if found.returncode:
            failed.append(f"Python {python}, {platform}: {found.stderr.strip()}")
    if failed:
        sys.exit("\n".join(failed))


def _run(*words: str, cwd: Path | None = None) -> None:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "NESTQUANT_STORE")}
    done = subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words[:3])} ended {done.returncode}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["wheels"]:
        check_wheels()
    elif sys.argv[1:2] == ["dist"]:
        check_dist(Path(sys.argv[2]))
    else:
        sys.exit("python -m tests.release wheels | dist FOLDER")
