"""Words that two packages use without knowing each other mean the same."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

import jobs.cli.options
import nestquant.config
import nestquant.surgery
import storage.manifest
from jobs.spec.quantize import check_bits


def test_the_method_and_the_store_name_the_same_schemes_and_layers() -> None:
    assert get_args(nestquant.config.Scheme) == get_args(storage.manifest.Scheme)
    assert get_args(nestquant.surgery.LayerKind) == get_args(storage.manifest.LayerKind)


def test_the_command_line_and_the_store_name_the_same_engines() -> None:
    assert get_args(jobs.cli.options.Engine) == get_args(storage.manifest.Engine)


def test_every_kind_of_layer_is_one_that_surgery_finds() -> None:
    modules = {
        "conv1d": torch.nn.Conv1d(2, 2, 1),
        "conv2d": torch.nn.Conv2d(2, 2, 1),
        "conv_transpose2d": torch.nn.ConvTranspose2d(2, 2, 1),
        "linear": torch.nn.Linear(2, 2),
    }
    assert tuple(modules) == get_args(nestquant.surgery.LayerKind)
    for kind, module in modules.items():
        (site,) = nestquant.surgery.find_layers(torch.nn.Sequential(module)).layers
        assert site.kind == kind


def test_the_spec_and_the_method_refuse_the_same_bits() -> None:
    for bits in ((), (9,), (8, 8), (4, 8), (8, 0), (8, 4, 4), (True,)):
        for check in (check_bits, nestquant.config.check_bits):
            try:
                check(bits)
            except ValueError:
                continue
            raise AssertionError(f"{check.__module__} took {bits}")
    assert check_bits((8, 6, 4)) == (8, 6, 4)


# They say that something happened to a value, not what the value is. ``read`` counts as a value's name; as a function's
# it is a verb.
PARTICIPLES = frozenset(
    {"asked", "done", "found", "given", "held", "kept", "known"}
    | {"left", "made", "read", "seen", "taken", "told", "wanted"}
)
NOUNS_ONLY = ("storage", "jobs", "workers", "nestquant")
# Keys of published documents and events, and what an error says of itself.
PUBLISHED = {("storage/errors.py", "seen"), ("jobs/events.py", "done"), ("jobs/cluster/record.py", "done")}


def names_bound(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every name that a module gives: to a value, a parameter, a field, a function or a class."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                if name.strip("_") != "read":
                    yield name, node.lineno
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                yield name, node.lineno


@pytest.mark.parametrize("package", NOUNS_ONLY)
def test_no_name_is_a_bare_participle(package: str) -> None:
    root = Path(__file__).parent.parent
    modules = sorted((root / package).rglob("*.py"))
    assert modules
    participles = [
        f"{path.relative_to(root)}:{line}: {name}"
        for path in modules
        for name, line in names_bound(ast.parse(path.read_text(encoding="utf-8")))
        if name.strip("_") in PARTICIPLES and (str(path.relative_to(root)), name) not in PUBLISHED
    ]
    assert not participles, "say what the value is: " + ", ".join(participles)


def test_the_check_sees_every_way_to_give_a_name() -> None:
    source = """
def found(given, *, held=1):
    (seen := 2)
    self.kept = left = 3
    for told in (): ...
def read(): ...
"""
    names = {name for name, _ in names_bound(ast.parse(source))}
    assert names & PARTICIPLES == {"found", "given", "held", "seen", "kept", "left", "told"}
