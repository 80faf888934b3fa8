"""Mutants of a folder's functions, made by mutmut, and samples of them.

Mutated is what stands in a function or method: mutmut leaves out decorated ones (but static and class methods), module
level, annotations, and calls of ``len`` and ``isinstance``. We leave out the words of errors as well (plain strings
inside ``raise``): tests that pin every word would pin no behaviour.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import random
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.file_mutation import Mutation, create_mutations, deep_replace

from tests.mutation.equal import ROOT


@dataclass(frozen=True)
class Mutant:
    """One change of one function.

    Attributes:
        module: the file, relative to the root.
        function: the qualified name, ``Class.method`` or ``function``.
        number: counts the mutants of the module, from 0.
        line: the first line of the changed statement, counted from the function's first line, 0.
        tree: the module as it is.
        mutation: what mutmut changes in it.
    """

    module: str
    function: str
    number: int
    line: int
    tree: cst.Module = field(repr=False)
    mutation: Mutation = field(repr=False)

    @cached_property
    def diff(self) -> str:
        """What changes in the function, with one line around it, without line numbers."""
        function = self.mutation.contained_by_top_level_function
        assert function is not None
        before, after = (self.tree.code_for_node(node) for node in (function, _changed(function, self.mutation)))
        return difference(before.strip("\n"), after.strip("\n"))

    @cached_property
    def source(self) -> str:
        """The whole module, changed."""
        changed = _changed(self.tree, self.mutation)
        assert isinstance(changed, cst.Module)
        return changed.code

    @property
    def name(self) -> str:
        """The mutant's name: another one once the function reads differently."""
        digest = hashlib.sha256(self.diff.encode()).hexdigest()[:8]
        return f"{self.module}::{self.function}::{self.number}::{digest}"


def files(folders: Sequence[str]) -> list[Path]:
    """Return the modules of folders, given relative to the root, in order."""
    for folder in folders:
        if not (ROOT / folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder in {ROOT}")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def mutants(path: Path) -> Iterator[Mutant]:
    """Yield every mutant of one module."""
    tree, mutations, _, _ = create_mutations(str(path), path.read_text())
    wrapper = MetadataWrapper(tree, unsafe_skip_copy=True)
    positions, parents = wrapper.resolve(PositionProvider), wrapper.resolve(ParentNodeProvider)
    starts = _statement_starts(tree.code)
    owners = {
        method: node.name.value for node in tree.body if isinstance(node, cst.ClassDef) for method in node.body.body
    }
    number = 0
    for mutation in mutations:
        function, original = mutation.contained_by_top_level_function, mutation.original_node
        if not isinstance(function, cst.FunctionDef) or _is_wording(original, parents):
            continue
        if tree.code_for_node(original) == tree.code_for_node(mutation.mutated_node):
            continue
        first = min(positions[node].start.line for node in (function, *function.decorators))
        yield Mutant(
            module=path.relative_to(ROOT).as_posix(),
            function=".".join([*([owners[function]] if function in owners else []), function.name.value]),
            number=number,
            line=max(0, starts.get(positions[original].start.line, first) - first),
            tree=tree,
            mutation=mutation,
        )
        number += 1


def _changed(tree: cst.CSTNode, mutation: Mutation) -> cst.CSTNode:
    changed = deep_replace(tree, mutation.original_node, mutation.mutated_node)
    assert isinstance(changed, cst.CSTNode)
    return changed


def _is_wording(node: cst.CSTNode, parents: Mapping[cst.CSTNode, cst.CSTNode]) -> bool:
    if not isinstance(node, cst.SimpleString):
        return False
    while node in parents and not isinstance(node, cst.BaseStatement | cst.BaseSmallStatement):
        node = parents[node]
    return m.matches(node, m.Raise())


def _statement_starts(code: str) -> dict[int, int]:
    """Return the first line of the innermost statement of each line, as coverage counts it."""
    starts: dict[int, int] = {}
    for node in ast.walk(ast.parse(code)):  # breadth first: the innermost comes last
        if isinstance(node, ast.stmt):
            assert node.end_lineno is not None
            starts.update(dict.fromkeys(range(node.lineno, node.end_lineno + 1), node.lineno))
    return starts


def difference(before: str, after: str) -> str:
    """Return the diff of a function's source: one line around each change, no line numbers, no indentation shared."""
    old, new = (textwrap.dedent(text).splitlines() for text in (before, after))
    lines = list(difflib.unified_diff(old, new, lineterm="", n=1))[2:]
    return "\n".join("@@" if line.startswith("@@") else line for line in lines) + "\n"


def sample(population: Sequence[Mutant], size: int, seed: int) -> list[Mutant]:
    """Return ``size`` mutants, or all there are: each module has its share (largest remainders), chosen by ``seed``."""
    by_module: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in population:
        by_module[mutant.module].append(mutant)
    size = min(size, len(population))
    exact = {name: len(members) * size / len(population) for name, members in by_module.items()}
    shares = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: (shares[name] - exact[name], name))[: size - sum(shares.values())]:
        shares[name] += 1
    chosen = [
        mutant
        for name, members in sorted(by_module.items())
        for mutant in random.Random(f"{seed} {name}").sample(members, shares[name])
    ]
    random.Random(seed).shuffle(chosen)
    return chosen
