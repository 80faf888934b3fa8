"""The runner: a mutant changes one function, a sample follows the modules, and a function takes its mutant's code."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("mutmut", reason="mutants are made by the extra 'mutation': make mutation")

from tests.mutation.covers import _modules
from tests.mutation.equal import ROOT
from tests.mutation.mutants import files, mutants, sample


def test_a_mutant_changes_one_function_and_still_compiles() -> None:
    path = ROOT / "nestquant" / "packing.py"
    for mutant in sample(list(mutants(path)), 20, 1):
        compile(mutant.source, "mutant", "exec")
        assert mutant.source != path.read_text()
        changed = [line for line in mutant.diff.splitlines() if line[0] in "+-"]
        assert {line[0] for line in changed} == {"+", "-"}
        assert all(line[1:].strip() in path.read_text() for line in changed if line[0] == "-")


def test_a_sample_is_the_same_twice_and_has_each_modules_share() -> None:
    population = [mutant for path in files(["storage/device"]) for mutant in mutants(path)]
    first, second = (sample(population, 60, 7) for _ in range(2))
    assert [mutant.name for mutant in first] == [mutant.name for mutant in second]
    assert [mutant.name for mutant in first] != [mutant.name for mutant in sample(population, 60, 8)]
    everything, chosen = (Counter(mutant.module for mutant in group) for group in (population, first))
    assert all(abs(chosen[name] - 60 * count / len(population)) < 1 for name, count in everything.items())
    assert len({mutant.name for mutant in sample(population, 10**9, 1)}) == len(population)


def test_templates_that_were_measured_are_no_modules() -> None:
    assert _modules(["/a/jobs/x.py", "/a/jobs/pages/x.html"]) == [Path("/a/jobs/x.py")]


def _run(script: str) -> str:
    head = (
        "from tests.mutation.equal import ROOT\n"
        "from tests.mutation.mutants import mutants\n"
        "from tests.mutation.trials import mutate\n"
    )
    words = [sys.executable, "-c", head + script]
    done = subprocess.run(words, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_function_behaves_as_its_mutant_wherever_it_was_imported_to() -> None:
    script = (
        "from nestquant.surgery import replace\n"
        "from nestquant.config import check_bits\n"
        "check_bits((8, 1))\n"
        "(mutant,) = (m for m in mutants(ROOT / 'nestquant/config.py') if 'not 2 <= width' in m.diff)\n"
        "mutate(mutant)\n"
        "try:\n    check_bits((8, 1))\n"
        "except ValueError as error:\n    print(error)\n"
    )
    assert _run(script) == "bits must be integers from 1 to 8; got 1 in (8, 1)\n"


def test_a_method_takes_a_mutants_default_and_keeps_its_class() -> None:
    script = (
        "import inspect\n"
        "from nestquant.nested_weight import NestedWeight\n"
        "(mutant,) = (m for m in mutants(ROOT / 'nestquant/nested_weight.py') if 'recurse: bool = False' in m.diff)\n"
        "cells = NestedWeight._apply.__closure__\n"
        "mutate(mutant)\n"
        "print(inspect.signature(NestedWeight._apply).parameters['recurse'].default)\n"
        "print(NestedWeight._apply.__closure__ == cells, NestedWeight._apply.__code__.co_freevars)\n"
    )
    assert _run(script) == "False\nTrue ('__class__',)\n"
