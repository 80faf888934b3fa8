"""Architectures that neither timm nor pytorchcv has: from a file that travels, in process, on Ray, and on a device."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.driver import run_job
from jobs.errors import SpecError
from jobs.executors import open_executor
from jobs.spec.file import parse_spec
from jobs.spec.job import ClusterSpec, JobSpec
from jobs.spec.zoo import load_zoo
from storage.device import Device, StoreSource
from storage.registry import Registry
from storage.stores.uri import open_store
from tests.conftest import ROOT
from workers import runtime
from workers.errors import ArtifactError, ModelError, WorkError
from workers.executor import InProcessExecutor
from workers.inputs import own

CODE = ROOT / "tests" / "own" / "team_nets.py"
SIDES = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


@pytest.fixture(autouse=True)
def nobody_trusted() -> Iterator[None]:
    """Each test is a process that has trusted nothing, as far as one process can be."""
    path, modules = list(sys.path), dict(sys.modules)
    own._factories.clear()
    yield
    own._factories.clear()
    sys.path[:] = path
    for name in [name for name in sys.modules if name not in modules and name.startswith("team_nets")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def spec(store: Path | str, *, code: str | None = str(CODE), entry: str = "team_nets:build", **keys: Any) -> JobSpec:
    model = {"factory": entry, "kwargs": {"channels": 24}, "random_seed": 3}
    document = {
        "name": "team",
        "model": {**model, **({} if code is None else {"code": code})},
        "preprocess": SIDES,
        "quantize": {"recipe": "paper"},
        "store": {"uri": str(store), "shard_bytes": 4096},
        **keys,
    }
    return parse_spec(document, where="test")


def test_the_same_bytes_in_process_and_on_ray_and_a_device_runs_them(
    tmp_path: Path, tiny_images: Path, ray_cluster: None
) -> None:
    """Calibrated and measured: every task of the job builds the network from the code that travelled."""
    keys = {
        "quantize": {"recipe": "calibrated", "activations": {"observer": "mse"}},
        "calibration": {"data": str(tiny_images), "samples": 16, "batch_size": 8},
        "evaluate": {"data": str(tiny_images), "accept_chance": True},
    }
    here = run_job(spec(tmp_path / "here", **keys), InProcessExecutor())
    with open_executor(ClusterSpec(), local=False) as executor:
        there = run_job(spec(tmp_path / "there", **keys), executor)
    assert here.digest == there.digest
    assert [one.total for one in there.measured] == [40] * 5

    device = Device(tmp_path / "device", StoreSource(open_store(tmp_path / "here")), unsigned=True)
    device.pull("team")
    device.upgrade("team")
    manifest = device.manifest("team")
    assert (manifest.model.library, manifest.model.arch) == ("own", "team_nets:build")
    own._factories.clear()
    with pytest.raises(ArtifactError, match=r"its code does not come with the version, and is not run because a man"):
        runtime.load(manifest, device.blob_path)
    module = importlib.import_module("tests.own.team_nets")
    model = runtime.load(manifest, device.blob_path, level=1, network=module.build(channels=24))
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model.network(inputs)
        model.downgrade()
        assert not torch.equal(model.network(inputs), full)
        model.upgrade()
        assert torch.equal(model.network(inputs), full)
    with pytest.raises(ArtifactError, match=r"team version 1: team_nets:build with the manifest's arguments has"):
        runtime.load(manifest, device.blob_path, network=module.build(channels=16))


def test_other_code_is_another_job_and_the_same_code_in_another_form_is_not(tmp_path: Path) -> None:
    first = run_job(spec(tmp_path / "s"), InProcessExecutor())
    archive = tmp_path / "code.zip"
    archive.write_bytes(own.pack(CODE, "x"))
    assert own.pack(archive, "x") == archive.read_bytes()
    again = run_job(spec(tmp_path / "s", code=str(archive)), InProcessExecutor())
    assert (again.job, again.digest, again.work.reused) == (first.job, first.digest, first.work.units)
    changed = tmp_path / "team_nets.py"
    changed.write_text(CODE.read_text().replace(".relu()", ".sigmoid()"))
    with pytest.raises(ModelError, match=r"a module named 'team_nets' is loaded here already"):
        run_job(spec(tmp_path / "s", code=str(changed)), InProcessExecutor())
    del sys.modules["team_nets"]
    with pytest.raises(ModelError, match=r"team_nets:build was built by other code in this process before"):
        run_job(spec(tmp_path / "s", code=str(changed)), InProcessExecutor())
    own._factories.clear()
    assert run_job(spec(tmp_path / "s", code=str(changed)), InProcessExecutor()).job != first.job


def test_a_package_travels_with_what_it_imports(tmp_path: Path) -> None:
    package = tmp_path / "team_nets_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text(CODE.read_text())
    (package / "outer.py").write_text(
        "from team_nets_package.inner import build as plain\n\ndef build():\n    return plain()\n"
    )
    (package / "notes.txt").write_text("stays here")
    asked = spec(tmp_path / "s", code=str(package), entry="team_nets_package.outer:build")
    asked = asked.model_copy(update={"model": asked.model.model_copy(update={"kwargs": {}})})
    assert run_job(asked, InProcessExecutor()).version == 1
    assert b"notes" not in own.pack(package, "x")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"entry": "team_nets:bild"},
            r"model.factory team_nets:bild: team_nets has no function 'bild'. Did you mean 'build'",
        ),
        ({"code": None}, r"there is no module 'team_nets' on this machine; install it .* model.code: path/to/file.py"),
        ({"entry": "team_nets:build_nothing"}, r"could not build .*unexpected keyword argument 'channels'"),
        ({"code": "nowhere.py"}, r"No code at nowhere.py: expected a .py file, a package's folder, or a .zip of them"),
        ({"code": str(ROOT / "README.md")}, r"README.md is neither a .py file, a package's folder nor a .zip of them"),
        ({"code": str(ROOT / "docs")}, r"docs is a folder without __init__.py; expected a package or a file"),
        ({"preprocess": {"size": 32}}, r"Nothing says how images become inputs of an architecture of one's own"),
    ],
)
def test_what_cannot_be_built_is_one_line_before_work(tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    with pytest.raises(WorkError, match=told) as caught:
        run_job(spec(tmp_path / "s", **keys), InProcessExecutor())
    assert "\n" not in str(caught.value)
    assert Registry(open_store(tmp_path / "s")).models() == []


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("team_nets:build_nothing", r"team_nets:build_nothing returned a str; expected a torch.nn.Module"),
        ("team_nets:build_badly", r"the factory could not build 'team_nets:build_badly' .*RuntimeError: no such depth"),
    ],
)
def test_what_a_factory_does_wrong_is_told(tmp_path: Path, entry: str, told: str) -> None:
    asked = spec(tmp_path / "s", entry=entry)
    asked = asked.model_copy(update={"model": asked.model.model_copy(update={"kwargs": {}})})
    with pytest.raises(ModelError, match=told):
        run_job(asked, InProcessExecutor())


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"factory": "nets", "random_seed": 0}, r"factory is 'nets'; expected package.module:function"),
        ({"factory": "nets:build", "pretrained": True}, r"has no pretrained weights by name; give 'checkpoint'"),
        ({"factory": "nets:build", "arch": "x", "random_seed": 0}, r"'factory' stands in the place of"),
        ({"library": "timm", "arch": "resnet18", "random_seed": 0, "code": "x.py"}, r"'code' is that of a 'factory'"),
    ],
)
def test_the_spec_says_what_a_factory_is(model: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        parse_spec({"name": "x", "model": model, "store": {"uri": "s"}}, where="test")


def test_an_installed_module_is_held_against_the_submitters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has another release of the same module refuses, instead of computing with it."""
    from workers.tasks import Code

    monkeypatch.syspath_prepend(str(CODE.parent))
    digest = own.installed_digest("team_nets:build")
    own.use(Code(entry="team_nets:build", digest=digest))
    assert isinstance(own.build("team_nets:build", {}), torch.nn.Module)
    own._factories.clear()
    other = "sha256:" + "0" * 64
    with pytest.raises(ModelError, match=r"this machine has other code than the one that submitted the job"):
        own.use(Code(entry="team_nets:build", digest=other))
    with pytest.raises(ModelError, match="its code does not come with the version"):
        own.build("team_nets:build", {})


def test_prepared_inputs_take_the_place_of_images(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).standard_normal((12, 3, 32, 32), dtype=np.float32)
    np.savez(tmp_path / "inputs.npz", inputs=inputs)
    keys = {
        "quantize": {"recipe": "calibrated"},
        "calibration": {"data": str(tmp_path / "inputs.npz"), "batch_size": 4},
    }
    result = run_job(spec(tmp_path / "s", **keys), InProcessExecutor())
    assert result.skipped_images == {} or not result.skipped_images
    np.savez(tmp_path / "wrong.npz", inputs=inputs[:, :, :16])
    keys["calibration"] = {"data": str(tmp_path / "wrong.npz")}
    with pytest.raises(WorkError, match=r"its inputs are \(3, 16, 32\); the network takes \(3, 32, 32\)"):
        run_job(spec(tmp_path / "s", **keys), InProcessExecutor())
    np.savez(tmp_path / "nan.npz", inputs=np.full_like(inputs, np.nan))
    keys["calibration"] = {"data": str(tmp_path / "nan.npz")}
    with pytest.raises(WorkError, match=r"nan.npz: inputs\[0\] holds NaN or infinity"):
        run_job(spec(tmp_path / "s", **keys), InProcessExecutor())
    np.savez(tmp_path / "double.npz", inputs=inputs.astype(np.float64))
    keys["calibration"] = {"data": str(tmp_path / "double.npz")}
    with pytest.raises(WorkError, match=r"inputs is float64 .*expected float32 \(N, C, H, W\)"):
        run_job(spec(tmp_path / "s", **keys), InProcessExecutor())


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_commands_take_the_factory_from_their_user_alone(tmp_path: Path, tiny_images: Path) -> None:
    store = str(tmp_path / "s")
    run_job(spec(store, quantize={"scheme": "symmetric"}), InProcessExecutor())
    own._factories.clear()
    asked = ("evaluate", "team", "--store", store, "--data", str(tiny_images))
    refused = run(*asked)
    assert isinstance(refused.exception, ArtifactError)
    assert "Say where it is: --factory team_nets:build, with --code FILE" in str(refused.exception)
    trusted = ("--factory", "team_nets:build", "--code", str(CODE))
    measured = json.loads(run(*asked, *trusted, "--json").stdout)
    assert [one["total"] for one in measured["measured"]] == [40, 40]
    own._factories.clear()
    exported = json.loads(run("export", "team", "--store", store, *trusted, "--json").stdout)
    assert exported["version"] == 2
    assert "give both" in run(*asked, "--code", str(CODE)).output
    wrong = run(*asked, "--factory", "nets")
    assert str(wrong.exception) == "--factory nets: expected package.module:function, such as my_nets:build."


def test_a_zoo_has_networks_of_ones_own_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = {
        "name": "mixed",
        "store": {"uri": str(tmp_path / "s")},
        "recipes": {"w84": {"recipe": "paper", "bits": [8, 4]}},
        "models": [
            {"models": "timm/test_resnet", "random_seed": 0},
            {"factory": "team_nets:build", "code": str(CODE), "random_seed": 0, "preprocess": SIDES},
        ],
    }
    path = tmp_path / "zoo.yaml"
    path.write_text(json.dumps(document))
    _, jobs = load_zoo(path)
    assert [job.spec.model.arch for job in jobs] == ["test_resnet", "team_nets:build"]
    monkeypatch.chdir(tmp_path)
    done = run("zoo", str(path), "--local")
    assert done.exit_code == 0, done.output
    assert Registry(open_store(tmp_path / "s")).models() == ["own.team_nets-build.w84", "timm.test_resnet.w84"]
    document["models"] = [{"factory": "team_nets:build", "arch": "x"}]
    path.write_text(json.dumps(document))
    with pytest.raises(SpecError, match=r"'factory' stands in the place of 'library' and 'arch'"):
        load_zoo(path)


_TWO_NODES = """
import sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.driver import run_job
from jobs.executors import open_executor
from jobs.spec.file import load_spec

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
spec = load_spec(sys.argv[1])
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
with open_executor(spec.cluster.model_copy(update={"address": cluster.address}), local=False) as executor:
    result = run_job(spec, executor)
print("digest", result.digest, len(ray.nodes()))
ray.shutdown()
cluster.shutdown()
"""


def test_a_cluster_of_two_nodes_builds_the_network_from_the_code_that_travels(tmp_path: Path) -> None:
    here = run_job(spec(tmp_path / "here"), InProcessExecutor())
    folder = tmp_path / "submits"
    folder.mkdir()
    path = folder / "job.yaml"
    path.write_text(spec(tmp_path / "there").model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", _TWO_NODES, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert f"digest {here.digest} 2" in done.stdout, done.stderr[-3000:]
