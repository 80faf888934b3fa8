"""The files that start clusters: Ray's own validator accepts them, and their pins agree with the project's."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.errors import SpecError

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_FILES = ("ray_cluster.yaml", "deploy/ray_cluster_local.yaml")


def _read(name: str) -> dict[str, Any]:
    document = yaml.safe_load((ROOT / name).read_text())
    assert isinstance(document, dict)
    return document


def _pin(name: str) -> str:
    found = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def _version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_rays_own_validator_accepts_the_file(name: str) -> None:
    validate_config(prepare_config(_read(name)))


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_rays_own_validator_refuses_the_file_with_a_key_it_does_not_know(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        validate_config(prepare_config(_read(name)) | {"max_wokers": 3})


def test_the_cloud_cluster_scales_from_no_worker_to_sixteen() -> None:
    config = prepare_config(_read("ray_cluster.yaml"))
    workers = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    assert {name: (kind["min_workers"], kind["max_workers"]) for name, kind in workers.items()} == {"worker": (0, 16)}
    assert config["max_workers"] == 16


def test_no_task_runs_on_a_head() -> None:
    cloud = _read("ray_cluster.yaml")
    assert cloud["available_node_types"][cloud["head_node_type"]]["resources"] == {"CPU": 0}
    assert any("--num-cpus=0" in line for line in _read("deploy/ray_cluster_local.yaml")["head_start_ray_commands"])
    assert _read("deploy/rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_the_nodes_get_the_pinned_ray_the_constraints_and_the_wheel(name: str) -> None:
    config = _read(name)
    assert config["docker"]["image"] == f"rayproject/ray:{_pin('ray')}-py311-cpu"
    mounted = {path.rpartition("/")[2]: target for target, path in config["file_mounts"].items()}
    (install,) = config["setup_commands"]
    assert f"--constraint {mounted['constraints.txt']} " in install
    assert f"{mounted['dist']}/nestquant_service-*.whl)[service]" in install


def test_the_rayjob_pins_one_image_and_ray_version_for_head_and_workers() -> None:
    cluster = _read("deploy/rayjob.yaml")["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {box["image"] for group in groups for box in group["template"]["spec"]["containers"]}
    assert cluster["rayVersion"] == _pin("ray")
    assert images == {f"nestquant:{_version()}-ray{_pin('ray')}"}
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    assert f"FROM rayproject/ray:{_pin('ray')}-py311-cpu\n" in dockerfile
    assert f"nestquant_service-{_version()}-py3-none-any.whl[service]" in dockerfile


# What KubeRay's definition of a RayJob (CRD ray.io/v1) knows at the places that we use; the API server refuses others.
KNOWN_TO_KUBERAY = {
    (): {"apiVersion", "kind", "metadata", "spec"},
    ("spec",): {
        *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "entrypoint", "entrypointNumCpus", "metadata"),
        *("entrypointNumGpus", "entrypointResources", "jobId", "rayClusterSpec", "runtimeEnvYAML", "suspend"),
        *("shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate", "managedBy"),
        *("ttlSecondsAfterFinished", "deletionStrategy"),
    },
    ("spec", "rayClusterSpec"): {
        *("autoscalerOptions", "enableInTreeAutoscaling", "headGroupSpec", "headServiceAnnotations", "rayVersion"),
        *("suspend", "workerGroupSpecs"),
    },
    ("spec", "rayClusterSpec", "autoscalerOptions"): {
        *("env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources", "securityContext"),
        *("upscalingMode", "volumeMounts"),
    },
    ("spec", "rayClusterSpec", "headGroupSpec"): {
        *("enableIngress", "headService", "rayStartParams", "serviceType", "template"),
    },
    ("spec", "rayClusterSpec", "workerGroupSpecs", 0): {
        *("groupName", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas", "scaleStrategy"),
        *("idleTimeoutSeconds", "template"),
    },
}
REQUIRED_BY_KUBERAY = {
    ("spec", "rayClusterSpec"): {"headGroupSpec"},
    ("spec", "rayClusterSpec", "headGroupSpec"): {"rayStartParams", "template"},
    ("spec", "rayClusterSpec", "workerGroupSpecs", 0): {
        *("groupName", "maxReplicas", "minReplicas", "rayStartParams", "template"),
    },
}


def test_the_rayjob_has_the_keys_that_kuberay_knows_and_those_that_it_requires() -> None:
    document = _read("deploy/rayjob.yaml")
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayJob")
    for place, known in KNOWN_TO_KUBERAY.items():
        at: Any = document
        for step in place:
            at = at[step]
        assert set(at) <= known, place
        assert set(at) >= REQUIRED_BY_KUBERAY.get(place, set()), place
    cluster = document["spec"]["rayClusterSpec"]
    assert cluster["autoscalerOptions"]["upscalingMode"] in ("Default", "Aggressive", "Conservative")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (box,) = group["template"]["spec"]["containers"]
        # Ray takes its memory from the limit; a request below it could be killed by the node.
        assert box["resources"]["limits"] == box["resources"]["requests"]


def test_the_rayjob_ends_with_its_cluster_and_is_tried_again() -> None:
    spec = _read("deploy/rayjob.yaml")["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert (spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"], spec["backoffLimit"]) == (True, 600, 2)
    assert RuntimeEnv(**yaml.safe_load(spec["runtimeEnvYAML"]))["env_vars"] == {"OMP_NUM_THREADS": "1"}
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (0, 1, 16)


def test_the_rayjob_reads_the_spec_that_it_mounts() -> None:
    spec = _read("deploy/rayjob.yaml")["spec"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    words = shlex.split(spec["entrypoint"])
    (mount,) = head["containers"][0]["volumeMounts"]
    assert words[:2] == ["nestquant", "zoo"]
    assert Path(words[2]).parent == Path(mount["mountPath"])
    assert [volume["name"] for volume in head["volumes"]] == [mount["name"]]


def test_the_rayjobs_command_is_one_that_we_have() -> None:
    words = shlex.split(_read("deploy/rayjob.yaml")["spec"]["entrypoint"])
    ended = CliRunner().invoke(app, words[1:])
    assert isinstance(ended.exception, SpecError)
    assert str(ended.exception) == "No spec at /etc/nestquant/zoo.yaml: there is no such file."
