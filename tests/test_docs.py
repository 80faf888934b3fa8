"""What the pages show works: the tutorial from its first block to its last, and every spec in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli.main import app
from jobs.spec.file import parse_spec
from tests.conftest import ROOT
from tests.site import outside_requests

BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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
    names: dict[str, Any] = {"__name__": "python_page"}
    ran = 0
    for language, _, text in blocks(ROOT / "docs" / "python.md"):
        if language == "python":
            exec(compile(text, "python.md", "exec"), names)
            ran += 1
    assert ran == 5
    assert 0 < names["full_bit"] < names["part_bit"] < 1
    with names["torch"].inference_mode():
        answers = [names[name](names["images"]) for name in ("nested", "loaded", "device")]
    assert names["torch"].equal(answers[0], answers[1])
    assert names["torch"].equal(answers[0], answers[2])


def test_every_spec_in_the_pages_is_one() -> None:
    specs = [(page, text) for page in PAGES for language, _, text in blocks(page) if language == "yaml"]
    jobs = [(page, document) for page, text in specs if "model" in (document := yaml.safe_load(text))]
    assert {"README.md", "tutorial.md"} <= {page.name for page, _ in jobs}
    for page, document in jobs:
        assert parse_spec(document, where=page.name).name == document["name"]


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
