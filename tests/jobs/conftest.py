"""The command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Signing:
    """Keys of a model's publisher, all in one folder, and the root of trust that names them."""

    folder: Path

    @property
    def trust(self) -> Path:
        """Return the file of the root of trust."""
        return self.folder / "root.json"

    @property
    def options(self) -> tuple[str, ...]:
        """Return what a command that signs takes: the keys of publisher and online."""
        return ("--key", self.key("publisher"), "--key", self.key("online"))

    def key(self, role: str) -> str:
        """Return the file of a role's private key."""
        return str(self.folder / f"{role}.pem")

    def public(self, role: str) -> str:
        """Return the file of a role's public key."""
        return f"{self.key(role)}.pub"


InitSigning = Callable[[Path | str], Signing]


@pytest.fixture
def signing(nestquant: Run, tmp_path: Path) -> InitSigning:
    """Generate keys and make a store one whose devices trust them, by the commands that a person types."""

    def init(store: Path | str) -> Signing:
        signing = Signing(tmp_path)
        for role in ("root", "publisher", "online"):
            assert nestquant("keys", "generate", signing.key(role))[0] == 0
        keys = ("--root-key", signing.key("root"), "--publisher", signing.public("publisher"))
        keys += ("--online", signing.public("online"))
        assert nestquant("keys", "init", *keys, "--out", signing.trust, "--store", store)[0] == 0
        return signing

    return init
