"""Names of classes on their way: from folders, a table or a file of the spec, to what a device prints."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from jobs.cluster.request import request_digest
from jobs.driver import run_job
from jobs.errors import PlanError
from jobs.spec.job import JobSpec
from nestquant.engines.errors import EngineError
from nestquant.engines.onnx import Session
from storage.class_labels import build_labels
from storage.device import Device, StoreSource
from storage.errors import Damaged
from storage.manifest import MEDIA_TYPE_LABELS, canonical_json, parse_manifest
from storage.retention import fsck, gc
from storage.stores.uri import open_store
from tests.engines.published import publish, spec_of
from workers.errors import DataError
from workers.executor import InProcessExecutor

KINDS = tuple(f"kind {letter}" for letter in "abcdefghij")


def image_folder(root: Path, names: tuple[str, ...] = KINDS) -> Path:
    """Make an ImageFolder of noise: one image a class."""
    random = np.random.default_rng(8)
    for name in names:
        (root / name).mkdir(parents=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / name / "0.png")
    return root


def quick(folder: Path, **sections: Any) -> dict[str, Any]:
    """Return the tiny job, rounded by its weights alone; sections on top."""
    return {**spec_of(folder), **sections}


def device_of(document: dict[str, Any], folder: Path) -> Device:
    device = Device(folder / "device", StoreSource(open_store(document["store"]["uri"])), unsigned=True)
    device.pull(document["name"])
    return device


@pytest.mark.parametrize("section", ["evaluate", "calibration"])
def test_folders_name_the_classes(tmp_path: Path, section: str) -> None:
    images = {"data": str(image_folder(tmp_path / "images"))}
    document = quick(tmp_path, labels={"images": section}, evaluate={**images, "accept_chance": True})
    document["calibration"] = images
    registry, manifest = publish(document)
    assert manifest.labels is not None
    assert (manifest.schema_version, manifest.labels.media_type) == (3, MEDIA_TYPE_LABELS)
    assert registry.get_blob(manifest.labels) == build_labels(KINDS)
    for _ in range(2):
        gc(registry.store, grace_s=0, dry_run=False)
    assert not fsck(registry.store).problems
    assert Session(device_of(document, tmp_path), "tiny").labels() == KINDS
    again = run_job(JobSpec.model_validate(document), InProcessExecutor())
    assert (again.version, again.created) == (manifest.version, False)


def test_a_table_names_the_classes_where_every_one_has_a_row(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    rows = [(f"{kind}/0.png", kind.upper(), place) for place, kind in enumerate(KINDS)]

    def write(rows: list[tuple[str, str, int]]) -> None:
        with (root / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file", "name", "label"), *rows])

    document = quick(tmp_path, labels={"images": "calibration"}, calibration={"data": str(root)})
    write(rows)
    registry, manifest = publish(document)
    assert manifest.labels is not None
    assert registry.get_blob(manifest.labels) == build_labels([kind.upper() for kind in KINDS])
    write(rows[1:])  # class 0 has no image, and so no name
    with pytest.raises(DataError, match=r"calibration\.data does not name its classes \(9 classes by labels\.csv"):
        publish(document)


def test_what_names_no_class_is_refused_before_work(tmp_path: Path) -> None:
    document = quick(tmp_path, labels={"images": "calibration"})
    with pytest.raises(DataError, match=r"calibration\.data does not name its classes"):  # an array of numbers
        publish(document)
    few = tmp_path / "few.txt"
    few.write_text("cat\ndog\n")
    with pytest.raises(PlanError, match=r"few\.txt has 2 names, timm test_resnet has 10 classes"):
        publish({**document, "labels": {"file": str(few)}})
    few.write_text("cat\n\n")
    with pytest.raises(DataError, match=r"labels\.file .*few\.txt: line 2 is blank"):
        publish({**document, "labels": {"file": str(few)}})
    with pytest.raises(DataError, match=r"No labels at .*none\.txt"):
        publish({**document, "labels": {"file": str(tmp_path / "none.txt")}})
    assert not (tmp_path / "store" / "models").exists()
    for labels, message in [
        ({}, "give 'file' or 'images', one of them"),
        ({"file": "a", "images": "evaluate"}, "one of them"),
        ({"images": "evaluate"}, "labels.images is 'evaluate', and there is no 'evaluate: "),
    ]:
        with pytest.raises(ValidationError, match=message):
            JobSpec.model_validate({**document, "labels": labels})


def test_a_version_without_labels_has_the_bytes_that_it_always_had(tmp_path: Path) -> None:
    document = spec_of(tmp_path)
    del document["export"]
    _, manifest = publish(document)
    raw = canonical_json(manifest)
    assert b"labels" not in raw
    assert (manifest.schema_version, parse_manifest(raw, name="tiny", version=1)) == (1, manifest)
    with_none = JobSpec.model_validate(document)
    assert "labels" in with_none.model_dump()
    names = tmp_path / "names.txt"
    names.write_text("\n".join(KINDS))
    labelled = JobSpec.model_validate({**document, "labels": {"file": str(names)}})
    before = request_digest(labelled)
    assert before != request_digest(with_none)
    names.write_text("\n".join(reversed(KINDS)))
    assert before != request_digest(labelled)


def test_labels_that_are_none_are_said_in_one_line(tmp_path: Path) -> None:
    registry, manifest = publish(quick(tmp_path))
    wrong = registry.put_blob(b"cat\n\x1b[2J\n", MEDIA_TYPE_LABELS)
    version = registry.publish(manifest.with_additions(engines=manifest.engines, labels=wrong)).version
    device = Device(tmp_path / "device", StoreSource(registry.store), unsigned=True)
    device.pull("tiny", str(version))
    with pytest.raises(EngineError, match="its labels cannot be read: line 2 holds control characters"):
        Session(device, "tiny").labels()
    path = device.blob_path(wrong)
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(Damaged, match="'nestquant pull tiny' brings it anew"):
        Session(device, "tiny").labels()
