"""Fixtures that every part of the suite shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

pytest_plugins = ["tests.servers.plugin", "tests.browser"]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with real weights, images and golden vectors; without it a test skips, and fails where CI=true."""
    folder = Path(os.environ.get("NESTQUANT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "weights").is_dir():
        message = f"no test data at {folder}: set NESTQUANT_TEST_DATA"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole session: starting one takes 15 s on two cores."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small timm ResNet (373 k weights), as safetensors."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty 32x32 colour images of noise with labels, as npz."""
    return tiny.write_images(tmp_path_factory.mktemp("images") / "noise.npz")


@pytest.fixture
def tiny_document(tiny_checkpoint: Path, tiny_images: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that builds a whole spec for the tiny model; dotted keys change it."""
    from jobs.spec.file import with_changes

    def build(**changes: Any) -> dict[str, Any]:
        document = tiny.job_document(
            checkpoint=str(tiny_checkpoint), images=str(tiny_images), store=str(tmp_path / "store")
        )
        return with_changes(document, {key.replace("__", "."): value for key, value in changes.items()})

    return build
