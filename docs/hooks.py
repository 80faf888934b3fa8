"""What the reference takes from the code: keys of specs from pydantic, commands from the command line."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent
TABLE = "| key | value | default |\n| --- | --- | --- |"
REPOSITORY = ("../README.md", "../CHANGELOG.md", "../tests/", "../deploy/", "../ray_cluster.yaml")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the decisions, which are many and numbered, to the navigation."""
    pages = sorted((ROOT / "docs" / "adr").glob("*.md"))
    config.nav = [*(config.nav or []), {"Decisions": [f"adr/{page.name}" for page in pages]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from jobs.spec.job import JobSpec
    from jobs.spec.zoo import ZooSpec

    pages = {
        "reference/spec.md": spec_page("Keys of a job's spec", JobSpec),
        "reference/zoo.md": spec_page("Keys of a zoo's spec", ZooSpec),
        "reference/cli.md": command_page(),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def spec_page(title: str, root: type[BaseModel]) -> str:
    """Return a page with a table of keys for a spec and for every section in it."""
    parts = [f"# {title}", "Generated from the models that read the spec."]
    for path, model in sections(root):
        parts += [f"## {path or 'The document'}", inspect.getdoc(model) or "", TABLE]
        rows = [
            f"| `{path + '.' if path else ''}{name}` | {cell(kind(field))} | {cell(default(field))} |"
            for name, field in model.model_fields.items()
        ]
        parts[-1] += "\n" + "\n".join(rows)
    return "\n\n".join(parts) + "\n"


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield ``(dotted path, model)`` of a spec and its sections, outermost first."""
    yield path, model
    for name, field in model.model_fields.items():
        for inner in models(field.annotation):
            yield from sections(inner, f"{path}.{name}" if path else name)


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the pydantic models that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models(argument)


def kind(field: FieldInfo) -> str:
    """Return a field's type as people read it, with its limits."""
    annotation = field.annotation
    if any(models(annotation)):
        return "a section, below"
    text = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    ours = (f"jobs.spec.{name}." for name in ("job", "model", "quantize", "zoo"))
    for module in ("typing.", "pathlib.", "collections.abc.", *ours):
        text = text.replace(module, "")
    limits = ", ".join(str(one) for one in field.metadata if type(one).__name__ in ("Ge", "Gt", "Le", "Lt"))
    return f"{text}{'; ' + limits if limits else ''}"


def default(field: FieldInfo) -> str:
    """Return what a key is where the spec leaves it out."""
    if field.is_required():
        return "(needed)"
    if field.default_factory is not None or isinstance(field.default, BaseModel):
        return "(its own defaults)"
    return repr(field.default)


def cell(text: str) -> str:
    """Return text as code in one cell of a table."""
    return f"`{text}`".replace("|", "\\|")


def command_page() -> str:
    """Return the ``--help`` of every command."""
    parts = ["# Command line", "What `--help` prints."]
    for words in commands():
        printed = subprocess.run(
            [sys.executable, "-c", _HELP, *words, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
        parts += [f"## nestquant {' '.join(words)}".rstrip(), f"```text\n{printed.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


_HELP = """
import os, sys
os.environ.update(COLUMNS="100", TERMINAL_WIDTH="100")
sys.argv[0] = "nestquant"
from jobs.cli.start import main
main()
"""


def commands() -> Iterator[tuple[str, ...]]:
    """Yield every command as the words that call it, groups first."""
    import typer.main

    from jobs.cli.main import app

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, inner in sorted(getattr(command, "commands", {}).items()):
            yield from walk(inner, (*words, name))

    yield from walk(typer.main.get_command(app), ())


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links to files of the repository that are no pages into their names: the site knows no repository."""

    def told(match: re.Match[str]) -> str:
        return f"{match[1]} (`{match[2].removeprefix('../')}`)" if match[2].startswith(REPOSITORY) else match[0]

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)]+)\)", told, markdown)
