"""Trials: each mutant in a fork of a process that has imported and collected all, against the tests that cover it.

The fork gives the function the mutant's code, runs the tests, the quickest first, and stops at the first that fails.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.mutation.covers import Cover, Covers, is_left_out
from tests.mutation.mutants import Mutant

MOST_BYTES = 8 << 30
"""Of memory that a mutant may take beside what the process has."""
_MOST_UNSOUND = 20
"""Of tests that fail in a fork without a mutant: beyond it something is wrong with the forks."""
_SHARED = ("moto_s3", "rclone_s3", "tiny_checkpoint", "tiny_images")
"""Fixtures of the session that are set up once, before the forks."""


@dataclass(frozen=True)
class Verdict:
    """How a trial came out.

    ``verdict`` is ``killed``, ``timeout`` (killed as well), ``survived``, or ``uncovered``: no test runs the statement.
    """

    name: str
    module: str
    function: str
    verdict: str
    diff: str
    test: str = ""
    tests: int = 0
    left_out: int = 0
    seconds: float = 0.0

    @property
    def is_killed(self) -> bool:
        """Whether a test tells the mutant from the code."""
        return self.verdict in ("killed", "timeout")


def mutate(mutant: Mutant) -> None:
    """Give the function, wherever it was imported to, the mutant's code and defaults.

    Raises:
        LookupError: The module has no such function at run time.
    """
    module = importlib.import_module(mutant.module.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
    *owners, name = mutant.function.split(".")
    owner: Any = module
    for part in owners:
        owner = getattr(owner, part)
    function = vars(owner).get(name)
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        raise LookupError(
            f"{mutant.module}: {mutant.function} is {type(function).__name__} at run time, not a function"
        )
    tree = ast.parse(mutant.source)
    definition = _definition(tree, mutant.function)
    # A cell that only the unchanged code reads stays: code and closure must agree.
    for free in function.__code__.co_freevars:
        dead = ast.If(ast.Constant(False), [ast.Expr(ast.Name(free, ast.Load()))], [])
        definition.body.insert(1, dead)
    code = compile(ast.fix_missing_locations(tree), module.__file__ or "", "exec", dont_inherit=True)
    for part in [*owners, name]:
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == part)
    function.__code__ = code
    arguments = definition.args
    function.__defaults__ = _defaults(function, arguments.defaults, function.__defaults__ or ()) or None
    if function.__kwdefaults__:
        names = [a.arg for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default]
        nodes = [default for default in arguments.kw_defaults if default]
        values = _defaults(function, nodes, tuple(function.__kwdefaults__[key] for key in names))
        function.__kwdefaults__ = dict(zip(names, values, strict=True))
    _compile_again(module)


def _definition(tree: ast.Module, qualified: str) -> ast.FunctionDef:
    nodes: list[ast.stmt] = tree.body
    node: ast.stmt | None = None
    for part in qualified.split("."):
        node = next(n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part)
        nodes = node.body
    assert isinstance(node, ast.FunctionDef)
    return node


def _defaults(function: types.FunctionType, nodes: Sequence[ast.expr], now: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the defaults: mutmut changes names and literals alone, the others stay the objects that they are."""
    return tuple(
        eval(compile(ast.Expression(node), "", "eval"), function.__globals__)
        if isinstance(node, ast.Constant | ast.Name)
        else value
        for node, value in zip(nodes, now, strict=True)
    )


def _compile_again(module: types.ModuleType) -> None:
    """Numba's functions were compiled, and are cached, unchanged."""
    if "numba" not in vars(module):
        return
    import numba
    from numba.core.registry import CPUDispatcher

    for name, value in list(vars(module).items()):
        if isinstance(value, CPUDispatcher):
            setattr(module, name, numba.njit(nogil=True)(value.py_func))


class Trials:
    """pytest plugin: tries mutants in the place of running the collected tests once."""

    def __init__(
        self, mutants: Sequence[Mutant], covers: Covers, results: Path, minutes: float, seconds: float
    ) -> None:
        self.mutants = mutants
        self.covers = covers
        self.seconds = seconds
        self.results = results
        self.log = results.with_suffix(".log")
        self.stop = time.monotonic() + 60 * minutes
        self.items: dict[str, pytest.Item] = {}
        self.sound: set[str] = set()
        self.unsound: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Try one mutant after the other until the time is up."""
        self.items = {item.nodeid: item for item in session.items if not is_left_out(item)}
        self._warm()
        gc.collect()
        gc.freeze()
        for index, mutant in enumerate(self.mutants):
            if time.monotonic() > self.stop:
                print(f"the time is up with {len(self.mutants) - index} mutants to go: run again, it goes on from here")
                break
            verdict = self._try(mutant)
            with self.results.open("a") as file:
                file.write(json.dumps(asdict(verdict)) + "\n")
            at = f"{index + 1}/{len(self.mutants)} {verdict.seconds:5.1f} s {verdict.verdict:9}"
            print(at, mutant.name, verdict.test and f"by {verdict.test}", flush=True)
        gc.unfreeze()
        return True

    def _warm(self) -> None:
        """Run the quickest test that uses each shared fixture; what follows it stands in another folder."""
        wanted = {cover.test: cover.seconds for mutant in self.mutants for cover in self.covers.of(mutant)}
        for fixture in _SHARED:
            using = [name for name in wanted if fixture in getattr(self.items.get(name), "fixturenames", ())]
            if using:
                item = self.items[min(using, key=lambda name: wanted[name])]
                top = item.nodeid.split("/")[1]
                elsewhere = next(other for name, other in self.items.items() if name.split("/")[1] != top)
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=elsewhere)

    def _try(self, mutant: Mutant) -> Verdict:
        started = time.monotonic()
        covers = [c for c in self.covers.of(mutant) if c.test in self.items and c.test not in self.unsound]
        chosen, seconds = [], 0.0
        for cover in covers:
            if chosen and seconds + cover.seconds > self.seconds:
                break
            chosen.append(cover)
            seconds += cover.seconds
        what = {"name": mutant.name, "module": mutant.module, "function": mutant.function, "diff": mutant.diff}
        if not chosen:
            return Verdict(**what, verdict="uncovered")
        verdict, test = self._fork(chosen, lambda: mutate(mutant))
        if verdict == "killed" and test not in self.sound:
            if self._fork([cover for cover in chosen if cover.test == test], lambda: None)[0] != "survived":
                print(f"left out, as it fails in a fork without a mutant: {test}", flush=True)
                self.unsound.add(test)
                if len(self.unsound) > _MOST_UNSOUND:
                    raise RuntimeError(f"{len(self.unsound)} tests fail in forks without a mutant: see {self.log}")
                return self._try(mutant)
            self.sound.add(test)
        took = round(time.monotonic() - started, 1)
        left_out = len(covers) - len(chosen)
        return Verdict(**what, verdict=verdict, test=test, tests=len(chosen), left_out=left_out, seconds=took)

    def _fork(self, covers: Sequence[Cover], change: Callable[[], None]) -> tuple[str, str]:
        limit = 30 + 5 * sum(cover.seconds for cover in covers)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _run([self.items[cover.test] for cover in covers], change, writing, self.log)
        os.close(writing)
        descriptor = os.pidfd_open(child)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        ended = bool(poll.poll(1000 * limit))
        os.close(descriptor)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it started, and the fork itself where its time is up
        _, status = os.waitpid(child, 0)
        with os.fdopen(reading) as pipe:
            words = pipe.read()
        if not ended:
            return "timeout", ""
        if words.startswith("error "):
            raise RuntimeError(words)
        if os.waitstatus_to_exitcode(status) == 0:
            return "survived", ""
        return "killed", words or f"the process ended with {os.waitstatus_to_exitcode(status)}"


def _run(items: Sequence[pytest.Item], change: Callable[[], None], writing: int, log: Path) -> None:
    """Run in the fork, and end it: 0 once every test has passed, 1 at the first that fails (``log`` says why)."""
    os.setsid()
    null, file = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor, target in enumerate((null, file, file)):
        os.dup2(target, descriptor)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, size + MOST_BYTES))
    try:
        change()
    except BaseException as error:
        os.write(writing, f"error {error!r}".encode())
        os._exit(2)

    failed: list[str] = []

    class Watch:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                print(report.longreprtext, flush=True)
                failed.append(report.nodeid)

    try:
        config = items[0].config
        config.pluginmanager.register(Watch())
        # The last is followed by a test as well: what the session shares must outlive the fork.
        for item, following in zip(items, [*items[1:], items[0]], strict=True):
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if failed:
                os.write(writing, failed[0].encode())
                os._exit(1)
    except BaseException as error:
        os.write(writing, f"{type(error).__name__} in {item.nodeid}".encode())
        os._exit(1)
    os._exit(0)
