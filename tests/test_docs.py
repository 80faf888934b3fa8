"""What the pages show works: two of them from the first block to the last; in all, every spec is one, every command
line is taken by the real parser, and every import is there.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup

from jobs.cli.main import app
from jobs.spec.file import parse_as
from jobs.spec.job import JobSpec
from jobs.spec.zoo import ZooSpec
from storage.agent.settings import AgentSettings
from tests import tiny
from tests.conftest import ROOT
from tests.site import outside_requests

BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = typer.main.get_group(app)
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # of the click that typer brings
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return ``(language, title, text)`` of a page's fenced blocks that have a language."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def test_the_tutorial_works_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NESTQUANT_STORE", raising=False)
    names: dict[str, Any] = {}
    ran = []
    for language, title, text in blocks(ROOT / "docs" / "tutorial.md"):
        if language == "python":
            exec(compile(text, "tutorial.md", "exec"), names)
        elif title:
            (tmp_path / title).write_text(text)
        else:
            for line in text.splitlines():
                program, *words = shlex.split(line)
                assert program == "nestquant"
                app(words, standalone_mode=False)
        ran.append(language)
    assert ran == ["python", "yaml", "bash", "bash", "python"]
    assert not names["torch"].equal(names["part_bit"], names["full_bit"])
    assert "first version 1 runs part-bit" in capsys.readouterr().out


def test_the_page_on_models_in_memory_works_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = str(tiny.write_checkpoint(tmp_path / "w.safetensors")), str(tiny.write_images(tmp_path / "x.npz"))
    job = tiny.job_document(checkpoint=files[0], images=files[1], store=str(tmp_path / "jobs"))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    names: dict[str, Any] = {"__name__": "python_page"}
    ran = 0
    for language, _, text in blocks(ROOT / "docs" / "python.md"):
        if language == "python":
            exec(compile(text, "python.md", "exec"), names)
            ran += 1
    assert ran == 6
    assert (names["result"].name, names["result"].version) == ("tiny", 1)
    assert 0 < names["full_bit"] < names["part_bit"] < 1
    with names["torch"].inference_mode():
        answers = [names[name](names["images"]) for name in ("nested", "loaded", "device")]
    assert names["torch"].equal(answers[0], answers[1])
    assert names["torch"].equal(answers[0], answers[2])


def test_every_spec_in_the_pages_is_one() -> None:
    specs = [(page, text) for page in PAGES for language, _, text in blocks(page) if language == "yaml"]
    indented = re.compile(r"^    name: .*\n(?:(?:    .*)?\n)+", re.MULTILINE)
    specs += [(page, dedent(text)) for page in PAGES for text in indented.findall(page.read_text(encoding="utf-8"))]
    kinds, agents = {}, 0
    for page, text in specs:
        document = yaml.safe_load(text)
        if "cache" in document:  # the agent's
            assert parse_as(AgentSettings, document, where=page.name).models
            agents += 1
            continue
        kind: type[JobSpec | ZooSpec] | None = (
            ZooSpec if "models" in document else JobSpec if "model" in document else None
        )
        if kind is not None:
            assert parse_as(kind, document, where=page.name).name == document["name"]
            kinds[page.name, kind] = document
    assert {("README.md", JobSpec), ("tutorial.md", JobSpec), ("cluster.md", ZooSpec)} <= set(kinds)
    assert agents == 1


def command_lines(text: str) -> list[list[str]]:
    """Return the words of every ``nestquant`` line of a text's code: fenced or indented, continued or commented."""
    lines, fenced = [], False
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif (fenced or line.startswith("    ")) and line.strip().startswith("nestquant "):
            words = shlex.split(re.sub(r"   \(.*\)$", "", line.partition(" # ")[0]))
            if len(words) > 1 and words[1] in COMMAND.commands:
                lines.append(words[1:])
    return lines


def parse(words: list[str]) -> None:
    """Parse words as the command line does; nothing is run.

    Raises:
        click.UsageError: there is no such command, option or value, or one is missing.
    """
    context = COMMAND.make_context("nestquant", list(words), resilient_parsing=False)
    while isinstance(context.command, TyperGroup):
        name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        context = command.make_context(name, rest, parent=context)


def test_every_command_line_in_the_pages_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTQUANT_STORE", "s3://models")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    faults, seen = [], set()
    for page in PAGES:
        for words in command_lines(page.read_text(encoding="utf-8")):
            seen.add((page.name, words[0]))
            try:
                parse(words if words[-1] != "..." else [*words[:-1], "--key", "publisher.pem"])
            except UsageError as error:
                faults.append(f"{page.name}: nestquant {' '.join(words)}: {error}")
    assert not faults, "\n".join(faults)
    assert {("README.md", "quantize"), ("cluster.md", "jobs"), ("hub.md", "export-hf"), ("rollouts.md", "tag")} <= seen


def test_a_wrong_command_line_is_seen() -> None:
    text = (
        "nestquant prose\n\n```\nnestquant pull net \\\n  --store s3://x   # why\n```\n    nestquant jobs logs 3f -f\n"
    )
    assert command_lines(text) == [["pull", "net", "--store", "s3://x"], ["jobs", "logs", "3f", "-f"]]
    for words in (["pull", "net", "--stores", "x"], ["jobs", "no"], ["tag"], ["rollout", "net", "--percent", "many"]):
        with pytest.raises(UsageError):
            parse(words)


def test_every_option_that_a_page_names_beside_a_command_is_one() -> None:
    named = []
    for page in PAGES:
        for span in re.findall(r"`nestquant ([a-z][^`\n]*)`", page.read_text(encoding="utf-8")):
            words: list[str] = span.split()
            command: Any = COMMAND
            while words and isinstance(command, TyperGroup) and words[0] in command.commands:
                command = command.commands[words.pop(0)]
            if command is COMMAND:
                continue
            known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
            named += [(page.name, span, word) for word in words if re.fullmatch(r"--?[a-z][a-z0-9-]*", word)]
            assert {word for _, one, word in named if one == span} <= known, (page.name, span)
    assert len(named) > 5


def test_every_python_block_compiles_and_imports_what_there_is() -> None:
    checked = 0
    for page in PAGES:
        local = {Path(title).stem for _, title, _ in blocks(page) if title}
        for language, _, text in blocks(page):
            if language != "python":
                continue
            for node in ast.walk(ast.parse(text, page.name)):
                if isinstance(node, ast.ImportFrom) and node.module and node.module not in local:
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        found = hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}") is not None
                        assert found, f"{page.name}: {alias.name} is not in {node.module}"
                        checked += 1
                elif isinstance(node, ast.Import):
                    assert all(find_spec(alias.name) is not None for alias in node.names), page.name
    assert checked > 5


def test_the_page_of_own_networks_works_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {}
    for language, title, text in blocks(ROOT / "docs" / "own-networks.md"):
        if title:
            (tmp_path / title).write_text(text)
        if language == "yaml":
            app(["quantize", title, "--local"], standalone_mode=False)
            app(["pull", "mine", "--store", "store", "--allow-unsigned", "--cache", "device"], standalone_mode=False)
        elif language == "python" and not title:
            exec(compile(text, "own-networks.md", "exec"), names)
    model = names["load"]("device")
    assert [layer.name for layer, _ in model.layers()] == ["0", "5"]


def test_what_a_page_loads_from_elsewhere_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="https://a.example/">x</a><link rel="canonical" href="https://b.example/">'
        '<script src="//c.example/x.js"></script><link rel="stylesheet" href="main.css"><img src="https://d.example/i.png">'
    )
    (tmp_path / "main.css").write_text("@import 'https://e.example/f.css'; a { background: url(x.svg) }")
    assert outside_requests(tmp_path) == [
        "a.html: //c.example/x.js",
        "a.html: https://d.example/i.png",
        "main.css: https://e.example/f.css",
    ]
