"""The command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from jobs.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def nestquant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process; return exit code, standard output, standard error."""
    monkeypatch.delenv("NESTQUANT_STORE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nestquant", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, captured.out, captured.err

    return run
