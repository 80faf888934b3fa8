"""Which test runs which lines of which function, taken with coverage, a file of tests at a time, and kept.

A file of tests is recorded again once it reads differently. Left out are tests that start Ray, Ceph or a browser: they
take minutes, and what they run runs in other processes, which neither coverage nor a mutant reaches.
"""

from __future__ import annotations

import ast
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage
import pytest

from tests.mutation.equal import ROOT
from tests.mutation.mutants import Mutant

PACKAGES = ("nestquant", "storage", "workers", "jobs")
LEFT_OUT = ("tests/integration/", "tests/servers/", "tests/benchmarks/", "tests/mutation/", "tests/jobs/test_demo.py")
LEFT_OUT_FIXTURES = {"ray_cluster", "ceph_s3", "browser", "driver"}
# Compiled loops leave no trace: their tests are those of the function that calls them.
COMPILED = {"nestquant/_flip_kernels.py": ("nestquant/rounding.py", "adaptive_round")}


def is_left_out(item: pytest.Item) -> bool:
    """Tell whether a test starts what no mutant reaches."""
    fixtures = set(getattr(item, "fixturenames", ()))
    return item.nodeid.startswith(LEFT_OUT) or "ceph" in item.nodeid.lower() or bool(fixtures & LEFT_OUT_FIXTURES)


@dataclass(frozen=True)
class Cover:
    """What one test runs of one function: ``lines`` from the function's first, None where the module has changed."""

    test: str
    seconds: float
    lines: frozenset[int] | None


class Covers:
    """The records of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_function: dict[tuple[str, str], list[Cover]] | None = None

    def _path(self, test_file: str) -> Path:
        return self.folder / (test_file.replace("/", ".") + ".json")

    def is_recorded(self, test_file: str) -> bool:
        """Tell whether the record is of the file as it reads now."""
        path = self._path(test_file)
        return path.exists() and json.loads(path.read_text())["digest"] == _digest(ROOT / test_file)

    def write(self, test_file: str, tests: dict[str, Any], sources: Iterable[str]) -> None:
        """Keep what the tests of a file ran."""
        self.folder.mkdir(parents=True, exist_ok=True)
        digests = {name: _digest(ROOT / name) for name in sorted(set(sources))}
        record = {"digest": _digest(ROOT / test_file), "sources": digests, "tests": tests}
        self._path(test_file).write_text(json.dumps(record))
        self._by_function = None

    def of(self, mutant: Mutant) -> list[Cover]:
        """Return the tests that run the changed statement, the quickest first."""
        if self._by_function is None:
            self._by_function = self._read()
        if mutant.module in COMPILED:
            return self._by_function.get(COMPILED[mutant.module], [])
        covers = self._by_function.get((mutant.module, mutant.function), [])
        # Line 0 is the signature: a changed default shows in any call.
        return [cover for cover in covers if cover.lines is None or mutant.line == 0 or mutant.line in cover.lines]

    def _read(self) -> dict[tuple[str, str], list[Cover]]:
        by_function: dict[tuple[str, str], list[Cover]] = defaultdict(list)
        now: dict[str, str] = {}
        for path in sorted(self.folder.glob("*.json")):
            record = json.loads(path.read_text())
            same = {
                name: (ROOT / name).exists() and now.setdefault(name, _digest(ROOT / name)) == digest
                for name, digest in record["sources"].items()
            }
            for test, ran in record["tests"].items():
                for name, lines in ran["functions"].items():
                    module, function = name.split("::")
                    kept = frozenset(lines) if same[module] else None
                    by_function[module, function].append(Cover(test, ran["seconds"], kept))
        for covers in by_function.values():
            covers.sort(key=lambda cover: (cover.seconds, cover.test))
        return by_function


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _modules(files: Iterable[str]) -> list[Path]:
    """Return the modules among measured files: templates are measured, too, under the names that Jinja gives them."""
    return [path for path in map(Path, files) if path.suffix == ".py"]


def _functions(path: Path) -> Iterator[tuple[str, range]]:
    """Yield functions and methods as mutmut names them, with their lines."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        inner = [(f"{node.name}.", child) for child in node.body] if isinstance(node, ast.ClassDef) else [("", node)]
        for prefix, function in inner:
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
                assert function.end_lineno is not None
                yield prefix + function.name, range(first, function.end_lineno + 1)


class Recorder:
    """pytest plugin: runs the tests of each file that is not recorded, and records them."""

    def __init__(self, covers: Covers, minutes: float) -> None:
        self.covers = covers
        self.stop = time.monotonic() + 60 * minutes
        self.passed: dict[str, bool] = {}
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep outcome and time of each phase."""
        if report.when == "call":
            self.passed[report.nodeid] = report.passed
        if report.failed:
            self.passed[report.nodeid] = False
            print(f"left out, as it fails: {report.nodeid}", flush=True)
        self.seconds[report.nodeid] += report.duration

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run what is to be recorded, in pytest's order."""
        by_file: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in session.items:
            if not is_left_out(item):
                by_file[item.nodeid.split("::")[0]].append(item)
        todo = {name: items for name, items in by_file.items() if not self.covers.is_recorded(name)}
        order = [item for items in todo.values() for item in items]
        following = dict(zip(order, [*order[1:], None], strict=False))
        for name, items in todo.items():
            if time.monotonic() > self.stop:
                raise TimeoutError("the time is up before every test is recorded: run again, it goes on from here")
            self._record(name, items, following)
        return True

    def _record(self, name: str, items: list[pytest.Item], following: dict[pytest.Item, pytest.Item | None]) -> None:
        started = time.monotonic()
        measured = coverage.Coverage(
            data_file=None, config_file=False, include=[f"{ROOT}/{package}/*" for package in PACKAGES]
        )
        for item in items:
            measured.start()
            measured.switch_context(item.nodeid)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following[item])
            measured.stop()
        data = measured.get_data()
        functions: dict[str, dict[str, list[int]]] = {item.nodeid: {} for item in items}
        modules = _modules(data.measured_files())
        for path in modules:
            contexts = data.contexts_by_lineno(str(path))
            for function, lines in _functions(path):
                key = f"{path.relative_to(ROOT).as_posix()}::{function}"
                for line in lines:
                    for test in contexts.get(line, ()):
                        if test:
                            functions[test].setdefault(key, []).append(line - lines.start)
        tests = {
            test: {"seconds": round(self.seconds[test], 3), "functions": ran}
            for test, ran in functions.items()
            if self.passed.get(test) and ran
        }
        self.covers.write(name, tests, (path.relative_to(ROOT).as_posix() for path in modules))
        print(f"recorded {name}: {len(tests)} tests, {time.monotonic() - started:.0f} s", flush=True)
