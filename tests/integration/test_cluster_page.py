"""The walk of docs/cluster.md, command by command, on a head that asks for a token, and what is found before work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.integration.ray_head import RayHead, ray_head
from tests.servers.s3_server import S3Server
from tests.test_docs import blocks


@dataclass(frozen=True)
class Walk:
    """A head, the folder that the commands are typed in, and the page's blocks."""

    head: RayHead
    folder: Path
    environment: dict[str, str]
    token_commands: str
    commands: str

    def run(self, script: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run lines of a shell as the page's reader would."""
        return subprocess.run(
            ["bash", "-euc", script],
            cwd=self.folder,
            env={**self.environment, **changes},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )


@pytest.fixture(scope="module")
def walk(moto_s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    folder = tmp_path_factory.mktemp("walk")
    named = [(language, title, text) for language, title, text in blocks(ROOT / "docs" / "cluster.md")]
    start = next(i for i, (_, _, text) in enumerate(named) if "ray get-auth-token" in text)
    (_, _, token), (_, title, spec), (_, _, commands) = named[start : start + 3]
    (folder / title).write_text(spec)
    lines = token.splitlines()
    assert lines[-1] == "ray start --head"  # done by ray_head, on ports that nobody has
    environment = {
        **os.environ,
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("RAY_AUTH_MODE", None)
    subprocess.run(["bash", "-euc", lines[0]], env=environment, check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        with ray_head(num_cpus=2, auth_mode="token") as head:
            commands = commands.replace("http://127.0.0.1:8265", head.address)
            commands = re.sub(r"s3://models\?endpoint_url=[^']*", lambda _: moto_s3.uri(), commands)
            yield Walk(head, folder, environment, token, commands)


def test_the_page_leads_from_nothing_to_a_pulled_version(walk: Walk) -> None:
    done = walk.run(walk.commands)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^first version 1 ", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^[0-9a-f]{12}  SUCCEEDED  attempt 1  first$", done.stdout, re.MULTILINE)
    assert "INFO" not in done.stderr  # Ray tells of every package that it uploads


def test_without_the_token_one_line_says_what_is_missing(walk: Walk) -> None:
    done = walk.run(walk.commands.replace("export RAY_AUTH_MODE=token", "export RAY_AUTH_MODE=disabled"))
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == (
        f"nestquant: {walk.head.address} wants a token, or another one: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH to the cluster's."
    )


def test_credentials_that_only_this_machine_has_are_told_with_the_machines_that_lack_them(walk: Walk) -> None:
    """The profile is in a file that neither the head nor its workers read."""
    mine = walk.folder / "mine"
    mine.write_text(
        f"[mine]\naws_access_key_id = {os.environ['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {os.environ['AWS_SECRET_ACCESS_KEY']}\n"
    )
    script = walk.commands.replace("addressing_style=path", "addressing_style=path&profile=mine")
    submit = "\n".join(line for line in script.splitlines() if line.startswith(("export", "nestquant submit")))
    done = walk.run(f"{submit} --set model.random_seed=1", AWS_SHARED_CREDENTIALS_FILE=str(mine))
    assert done.returncode == 3, done.stdout
    faults = [line for line in done.stderr.splitlines() if line.startswith("nestquant: ")]
    told = "connect (bucket) in s3://nestquant-test/...: The config profile (mine) could not be found"
    assert [re.sub(r"(head|worker) \S+:", r"\1:", re.sub(r"test/\w+:", "test/...:", line)) for line in faults] == [
        f"nestquant: head: {told}; check the profile and its credentials.",
        f"nestquant: worker: {told}; check the profile and its credentials.",
        f"nestquant: Nothing was submitted to {walk.head.address}.",
    ]
