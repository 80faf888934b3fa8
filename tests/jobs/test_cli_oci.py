"""``nestquant push`` and a pull from a registry, as a person types them."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from storage.stores.local import LocalStore
from tests.jobs.conftest import Run
from tests.storage.device.artifacts import publish


def test_push_and_pull_by_commands(nestquant: Run, oci_registry: str, tmp_path: Path) -> None:
    place = f"oci://{oci_registry}/vision/{uuid.uuid4().hex}"
    store = LocalStore(tmp_path / "store")
    publish(store)
    code, out, _ = nestquant("push", "net@1", f"{place}:edge", "--store", store.root, "--json")
    assert (code, json.loads(out)["tags"]) == (0, ["1", "edge"])
    words = ("pull", "net", "--store", f"{place}:edge", "--cache", tmp_path / "cache", "--allow-unsigned", "--json")
    code, out, _ = nestquant(*words)
    assert (code, json.loads(out)["version"]) == (0, 1)
    code, out, _ = nestquant("upgrade", "net", "--store", f"{place}:1", "--cache", tmp_path / "cache", "--json")
    assert (code, json.loads(out)["level"]) == (0, 1)
