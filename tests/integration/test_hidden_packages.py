"""A user's file that hides one of our packages from workers: a real Ray whose runtime environment has a working_dir."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import storage
from tests import tiny
from workers.on_ray.imports import import_fault

SCRIPT = """
import json, sys
import ray
ray.init(address="local", num_cpus=2, runtime_env={"working_dir": sys.argv[1]}, log_to_driver=False)
from jobs import JobSpec, run_job
from workers.errors import WorkError
from workers.on_ray.executor import RayExecutor, RaySettings
said = []
for document in json.loads(sys.argv[2]):
    try:
        with RayExecutor(RaySettings()) as executor:
            said.append(str(run_job(JobSpec.model_validate(document), executor).version))
    except WorkError as error:
        said.append(str(error))
print(json.dumps(said))
"""


@pytest.mark.parametrize(("package", "needed"), [("storage", True), ("workers", True), ("jobs", False)])
def test_a_file_in_the_working_dir_that_hides_a_package_is_named(package: str, needed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / f"{package}.py").write_text("x = 1\n")
    checkpoint, images = tiny.write_checkpoint(tmp_path / "w.safetensors"), tiny.write_images(tmp_path / "x.npz")
    documents = []
    for recipe in ("paper", "calibrated") if needed else ("paper",):  # by tasks, and by a gang of actors
        document = tiny.job_document(checkpoint=str(checkpoint), images=str(images), store=str(tmp_path / recipe))
        document |= {"quantize": {"recipe": recipe, "ignore": ["layer*"]}, "evaluate": None}
        documents.append(document)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(documents)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).resolve().parents[2],
        env=environment | {"RAY_AUTH_MODE": "disabled"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    lines = json.loads(ended.stdout.splitlines()[-1])
    if not needed:  # by any task
        assert lines == ["1"]
        return
    for line in lines:
        assert f"/{package}.py in the place of our package '{package}', and cannot go on (No module named '" in line, (
            line
        )
        assert line.endswith("rename that file, or leave it out of the working_dir of Ray's runtime environment.")
        assert len(line.splitlines()) == 1


def test_what_workers_lack_is_told_from_what_they_have_in_another_version(ray_cluster: None) -> None:
    line = str(import_fault(RuntimeError("System error: No module named 'storage.of_tomorrow'")))
    assert line.startswith(
        f"Workers import {storage.__file__}, which is another version of our package 'storage' (No mod"
    )
    assert import_fault(RuntimeError("No module named 'torchvision'")) is None
