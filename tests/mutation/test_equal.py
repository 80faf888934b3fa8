"""Survivors that are listed as equal are still in the code that they were changes of."""

from __future__ import annotations

import ast
import textwrap

from tests.mutation import equal
from tests.mutation.equal import ROOT, Equal


def _source(entry: Equal) -> str:
    """Return the function's source as the diffs have it."""
    text = (ROOT / entry.module).read_text()
    nodes: list[ast.stmt] = ast.parse(text).body
    node: ast.stmt | None = None
    for part in entry.function.split("."):
        node = next(n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part)
        nodes = node.body
    assert isinstance(node, ast.FunctionDef)
    assert node.end_lineno is not None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno])) + "\n"


def test_an_entry_is_of_code_that_there_is() -> None:
    for entry in equal.read():
        for hunk in entry.diff.removeprefix("@@\n").split("@@\n"):
            lines = hunk.splitlines()
            assert any(line.startswith(("-", "+")) for line in lines), entry
            before = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
            assert "\n" + before in "\n" + _source(entry), entry


def test_an_entry_says_why_and_stands_once() -> None:
    entries = equal.read()
    assert all(len(entry.why.split()) > 3 for entry in entries)
    assert len({(entry.module, entry.function, entry.diff) for entry in entries}) == len(entries)
