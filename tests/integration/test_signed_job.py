"""A job with keys in its spec signs the version and the tags that it moved, each with its entry's number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.driver import run_job
from jobs.spec.file import parse_spec
from storage.device import Device, StoreSource
from storage.registry import Registry
from storage.signing.keys import generate_key
from storage.signing.root import create_root
from storage.signing.staging import newest_targets
from storage.stores.local import LocalStore
from workers.executor import InProcessExecutor


def test_a_job_signs_what_it_moved_and_leaves_a_persons_move_back(
    tiny_document: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    store = LocalStore(tmp_path / "store")
    key = generate_key(tmp_path / "key.pem")
    anchor = create_root(store, [key], publishers=[key.public_key], online=[key.public_key])

    def run(bits: list[int]) -> tuple[str, ...]:
        changes = {"calibration": None, "evaluate": None, "quantize__activations": None, "quantize__bits": bits}
        document = tiny_document(store__signing_keys=[str(tmp_path / "key.pem")], store__tags=["latest"], **changes)
        return run_job(parse_spec(document, where="test"), InProcessExecutor()).tags

    assert run([8, 4]) == ("latest",)
    assert run([8, 5]) == ("latest",)
    device = Device(tmp_path / "cache", StoreSource(store), root_of_trust=anchor)
    assert device.pull("tiny").version == 2
    targets = newest_targets(store, "tiny")
    assert targets["models/tiny/tags/latest"].custom == {"version": 2, "entry": 2}
    assert targets["models/tiny/versions/00000001.json"].custom == {"version": 1}

    Registry(store).tag("tiny", "latest", 1, back=True)
    assert run([8, 5]) == (), "version 2 is published already, and a person took it back"
    assert Registry(store).read_tag("tiny", "latest").version == 1
    assert run([8, 6]) == ("latest",)
    assert device.pull("tiny").version == 3
    assert newest_targets(store, "tiny")["models/tiny/tags/latest"].custom == {"version": 3, "entry": 4}
