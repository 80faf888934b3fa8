"""The job on real S3 servers, with workers that do not see this machine's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.driver import run_job
from jobs.result import JobResult
from jobs.spec.file import parse_spec
from storage.device import Device, open_source
from storage.errors import UnsafeStore
from storage.registry import Registry
from storage.stores.s3 import S3Store
from storage.stores.uri import open_store
from tests.integration.test_job import whole_document
from tests.servers.s3_server import S3Server
from workers.executor import InProcessExecutor


class Elsewhere(InProcessExecutor):
    """This process, treated as a worker on another machine: it gets weights and shards from the store alone."""

    same_machine = False


def run(document: dict[str, Any]) -> JobResult:
    return run_job(parse_spec(document, where="test"), Elsewhere())


@pytest.fixture(params=["moto_s3", "ceph_s3"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    return found


def test_the_same_version_from_a_folder_and_from_s3(
    server: S3Server, tiny_checkpoint: Path, tiny_images: Path, tmp_path: Path
) -> None:
    uri = server.uri()
    on_s3 = run(whole_document(tiny_checkpoint, tiny_images, uri))
    in_folder = run(whole_document(tiny_checkpoint, tiny_images, str(tmp_path / "folder")))
    assert on_s3.digest == in_folder.digest
    device = Device(tmp_path / "device", open_source(uri), unsigned=True)
    assert device.pull("tiny").received_bytes == on_s3.pull.level_bytes[0]
    assert device.upgrade("tiny").received_bytes == sum(on_s3.pull.level_bytes[1:])
    assert device.verify("tiny").whole


def test_weights_and_images_come_from_s3_as_well(
    moto_s3: S3Server, tiny_checkpoint: Path, tiny_images: Path, tmp_path: Path
) -> None:
    uri = moto_s3.uri()
    store = open_store(uri)
    assert isinstance(store, S3Store)
    query = uri.partition("?")[2]
    places = {}
    for name, file in (("Weights/ResNet 18.safetensors", tiny_checkpoint), ("Images/noise.npz", tiny_images)):
        store.client.upload_file(str(file), store.bucket, name)
        places[name.split("/")[0]] = f"s3://{store.bucket}/{name}?{query}"
    document = whole_document(tiny_checkpoint, tiny_images, str(tmp_path / "store"))
    reference = run(document)
    document["model"]["checkpoint"] = places["Weights"]
    document["calibration"]["data"] = document["evaluate"]["data"] = places["Images"]
    document["store"]["uri"] = str(tmp_path / "other")
    assert run(document).digest == reference.digest


def test_a_store_that_ignores_preconditions_is_refused_before_any_work(
    rclone_s3: S3Server, tiny_checkpoint: Path, tiny_images: Path
) -> None:
    uri = rclone_s3.uri()
    document = whole_document(tiny_checkpoint, tiny_images, uri)
    with pytest.raises(UnsafeStore, match=r"ignores put-if-absent.*--single-writer"):
        run(document)
    assert list(open_store(uri).list("jobs/")) == []
    document["store"]["single_writer"] = True
    run(document)
    assert Registry(open_store(uri)).resolve("tiny").manifest.single_writer
