"""``import nestquant``: a network in memory is nested, saved, loaded, published, pulled; mistakes are one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jobs
import nestquant
import storage
import workers
from jobs import JobSpec, parse_spec, run_job
from jobs.errors import PlanError, SpecError
from nestquant.engines.images import Preprocessing
from nestquant.modules import nested_layers
from storage.device import Device, StoreSource
from storage.stores.uri import open_store
from workers import runtime
from workers.errors import ArtifactError, CheckpointError, DataError, ModelError
from workers.executor import InProcessExecutor
from workers.inputs.checkpoint import load_network
from workers.inputs.images import open_images
from workers.tasks import TensorSource

Document = Callable[..., dict[str, Any]]


class Own(nn.Module):
    """A network that no library knows."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, stride=2, groups=4)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def own() -> Own:
    torch.manual_seed(11)
    return Own().eval()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def answer(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        result = model(inputs)
    assert isinstance(result, Tensor)
    return result


def test_each_package_exports_what_is_listed_here_and_nothing_else() -> None:
    assert set(nestquant.__all__) == {"NestedModel", "load", "pull", "quantize"}
    assert set(jobs.__all__) == {"JobResult", "JobSpec", "load_spec", "open_executor", "parse_spec", "run_job"}
    for package in (nestquant, jobs):
        assert set(package.__all__) <= set(dir(package))
        for name in package.__all__:
            assert getattr(package, name).__name__ == name
    for package in (workers, storage):
        assert not hasattr(package, "__all__")
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        nestquant.quantise  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("package", ["nestquant", "jobs", "workers", "storage"])
def test_importing_a_package_costs_neither_torch_nor_pydantic(package: str) -> None:
    heavy = "sorted({'torch', 'numpy', 'pydantic', 'ray', 'timm', 'rich', 'yaml'} & set(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys, {package}; print({heavy})"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"


def test_help_of_every_command_imports_neither_pydantic_nor_asyncio() -> None:
    program = """
import sys, typer
from jobs.cli.main import app
def walk(command, context, *names):
    print(' '.join(names), len(command.get_help(context)))
    for name, child in getattr(command, 'commands', {}).items():
        walk(child, child.make_context(name, [], parent=context, resilient_parsing=True), *names, name)
command = typer.main.get_group(app)
walk(command, command.make_context('nestquant', [], resilient_parsing=True), 'nestquant')
print(sorted({'torch', 'ray', 'pydantic', 'asyncio', 'numpy', 'rich', 'yaml', 'boto3'} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *commands, modules = ran.stdout.splitlines()
    assert len(commands) > 40
    assert modules == "[]"


@pytest.mark.parametrize("words", [["--help"], ["pull", "--help"]], ids=" ".join)
def test_help_imports_neither_torch_nor_ray_nor_the_manifest(words: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "jobs.cli.main", *words]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "typer" in modules
    assert not modules & {"torch", "ray", "pydantic", "numpy", "rich", "yaml"}
    assert "storage.manifest" not in modules


@pytest.mark.parametrize("name", ["jobs", "workers", "storage"])
@pytest.mark.parametrize("how", ["script", "module", "command", "folder"])
def test_a_file_that_hides_a_package_is_named_in_one_line(tmp_path: Path, name: str, how: str) -> None:
    if how == "folder":
        (tmp_path / name).mkdir()
        hidden = tmp_path / name / "__init__.py"
    else:
        hidden = tmp_path / f"{name}.py"
    hidden.write_text("MINE = 1\n")
    (tmp_path / "own.py").write_text("import nestquant\nnestquant.quantize\n")
    words, environment = [str(tmp_path / "own.py")], dict(os.environ)
    if how == "module":
        words = ["-m", "own"]
    if how == "command":
        environment["PYTHONPATH"] = str(tmp_path)
        words = [str(Path(sys.executable).parent / "nestquant"), "pull", "--help"]
    ran = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert ran.returncode == 1
    if how == "command" and name == "jobs":  # Python finds no command in it
        assert "jobs" in ran.stderr
        return
    assert f"needs its own package {name!r}" in ran.stderr.splitlines()[-1]
    assert str(hidden) in ran.stderr.splitlines()[-1]
    if how == "command":
        assert len(ran.stderr.splitlines()) == 1


def test_the_function_is_not_hidden_by_a_module_of_its_name(own: Own) -> None:
    nestquant.quantize(own)
    assert callable(nestquant.quantize)


@pytest.mark.parametrize("recipe", ["paper", "calibrated", "data_free"])
@pytest.mark.parametrize("activations", [None, {"observer": "mse"}], ids=["weights", "activations"])
def test_the_integers_are_those_of_a_job(
    *,
    tiny_document: Document,
    tiny_checkpoint: Path,
    tiny_images: Path,
    tmp_path: Path,
    recipe: Any,
    activations: dict[str, Any] | None,
) -> None:
    if recipe == "data_free" and activations is not None:
        activations = {"observer": "minmax"}
    quantize = {"recipe": recipe, "bits": [8, 6, 4], "overrides": {"fc": {"bits": [8]}}, "activations": activations}
    document = tiny_document(
        quantize=quantize, preprocess={"size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}
    )
    del document["evaluate"]
    if recipe == "data_free" or (recipe == "paper" and activations is None):
        del document["calibration"]
    run_job(parse_spec(document, where="test"), InProcessExecutor())
    device = Device(tmp_path / "device", StoreSource(open_store(document["store"]["uri"])), unsigned=True)
    device.pull("tiny", level=2)
    by_job = runtime.load(device.manifest("tiny"), device.blob_path, level=2)
    by_job.quantize_activations(enabled=activations is not None)

    network = load_network(
        "timm", "test_resnet", {"num_classes": 10, "in_chans": 3}, TensorSource(None, str(tiny_checkpoint))
    )
    preprocessing = Preprocessing.from_record(by_job.manifest.preprocessing or {})
    images = open_images(tiny_images).sample(24)
    batches = [batch for batch, _ in images.batches(preprocessing, batch_size=5)]
    in_memory = nestquant.quantize(
        network,
        bits=(8, 6, 4),
        recipe=recipe,
        calibration=batches if "calibration" in document else None,
        batch_size=8,
        activations=activations,
        overrides={"fc": {"bits": (8,)}},
        input_shape=(3, 32, 32),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.2, 0.3),
    )
    assert [layer.name for layer in in_memory.manifest.layers] == [layer.name for layer in by_job.manifest.layers]
    assert [layer.activation for layer in in_memory.manifest.layers] == [
        layer.activation for layer in by_job.manifest.layers
    ]
    ours, theirs = nested_layers(in_memory.network), nested_layers(by_job.network)
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        expected = theirs[name].nested
        assert layer.nested.level_count == expected.level_count
        for key, value in expected.named_buffers():
            assert torch.equal(layer.nested.get_buffer(key), value), (name, key)
        assert (layer.nested.biases is None) == (recipe == "paper")
    for level in (2, 0, 1):
        in_memory.set_level(level)
        by_job.to_level(level)
        assert torch.equal(answer(in_memory, batches[0]), answer(by_job.network, batches[0]))
        by_job.to_level(2)


def test_levels_go_out_and_come_back_and_the_float_model_stays(own: Own, inputs: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, torch.zeros(24)), batch_size=7)
    model = nestquant.quantize(own, calibration=loader)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    assert type(own.first) is nn.Conv2d
    assert (model.levels, model.bits, model.level, model.paged_in) == ((0, 1), (4, 8), 1, (0, 1))
    reference, full = answer(own, inputs), answer(model, inputs)
    model.set_level(0)
    part = answer(model, inputs)
    assert model.level == 0
    assert model.paged_in == (0, 1)
    whole_bytes = model.resident_bytes()
    model.page_out()
    assert model.paged_in == (0,)
    low = sum(
        5 * -(-layer.get_buffer("part_0").numel() // 4)
        for layer in (one.nested for one in nested_layers(model).values())
    )
    assert 0 < whole_bytes - model.resident_bytes() <= low
    assert torch.equal(answer(model, inputs), part)
    model.page_in()
    assert model.level == 1
    assert torch.equal(answer(model, inputs), full)
    assert (full - reference).norm() < (part - reference).norm() < reference.norm()


def test_a_saved_file_is_loaded_by_a_model_of_the_same_shape_and_pages_in_from_it(
    own: Own, inputs: Tensor, tmp_path: Path
) -> None:
    model = nestquant.quantize(own, calibration=inputs, activations=8)
    full = answer(model, inputs)
    model.set_level(0)
    part = answer(model, inputs)
    model.save(tmp_path / "own.nq")
    model.page_out()
    model.page_in()
    assert torch.equal(answer(model, inputs), full)
    for given in (Own(), Own):
        loaded = nestquant.load(tmp_path / "own.nq", model=given)
        assert loaded.level == 0
        assert torch.equal(answer(loaded, inputs), part)
        loaded.page_in()
        assert torch.equal(answer(loaded, inputs), full)
    loaded.save(tmp_path / "again.nq")
    assert (tmp_path / "again.nq").read_bytes() == (tmp_path / "own.nq").read_bytes()


def test_a_published_model_is_loaded_and_pulled(own: Own, inputs: Tensor, tmp_path: Path) -> None:
    model = nestquant.quantize(own, bits=(8, 6, 4))
    full = answer(model, inputs)
    store = str(tmp_path / "store")
    first, again = model.publish("own", store), model.publish("own", store, tags=("stable",))
    assert (first.version, first.created, again.version, again.created) == (1, True, 1, False)
    read = nestquant.load(store, "own", "stable", model=Own, level=2)
    assert torch.equal(answer(read, inputs), full)
    pulled = nestquant.pull("own", store=store, cache=tmp_path / "cache", model=Own, unsigned=True)
    device = Device(tmp_path / "cache")
    assert (pulled.level, device.levels("own")) == (0, (0,))
    pulled.page_in()
    assert device.levels("own") == (0, 1, 2)
    assert torch.equal(answer(pulled, inputs), full)


def test_a_network_that_is_one_layer_and_one_on_tokens() -> None:
    linear = nn.Linear(32, 8)
    inputs = torch.randn(16, 32)
    model = nestquant.quantize(linear, calibration=inputs)
    assert answer(model, inputs).shape == (16, 8)
    tokens = nn.Sequential(nn.Embedding(20, 16), nn.Flatten(), nn.Linear(96, 4))
    model = nestquant.quantize(tokens, calibration=torch.randint(0, 20, (12, 6)))
    assert [layer.biases for layer in model.manifest.layers] == [True]
    assert [kept.name for kept in model.manifest.kept_float] == ["0.weight"]


def test_mistakes_are_one_line_with_the_place(own: Own, inputs: Tensor, tmp_path: Path) -> None:
    def refused(kind: type[Exception], message: str, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(kind) as caught:
            nestquant.quantize(*args, **kwargs)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    refused(PlanError, "Nothing to quantize in ReLU", nn.ReLU())
    refused(SpecError, "'calibrated' needs calibration=", own, recipe="calibrated")
    refused(SpecError, "'data_free' needs input_shape=", own, recipe="data_free")
    refused(SpecError, "leave calibration out", own, recipe="data_free", calibration=inputs)
    refused(SpecError, "'recipe'", own, recipe="best")
    refused(SpecError, "'bits'", own, bits=(4, 8))
    refused(SpecError, "unknown key 'overrides.head.bit'", own, overrides={"head": {"bit": (8,)}})
    refused(SpecError, "activations without calibration need input_shape=", own, activations=8)
    refused(SpecError, "takes a torch.nn.Module; got a OrderedDict", own.state_dict())
    refused(PlanError, "'heads' matches none of the 3 layers. Did you mean 'head'?", own, ignore=["heads"])
    refused(
        ModelError,
        "Own cannot run on inputs of 1 x 4 x 12 x 12: in layer 'first'",
        own,
        calibration=torch.zeros(8, 4, 12, 12),
    )
    refused(
        DataError,
        "batch 1 has inputs of 3 x 8 x 8, those before 3 x 12 x 12",
        own,
        calibration=[inputs, inputs[:, :, :8, :8]],
    )
    refused(DataError, "batch 0 is a ndarray", own, calibration=[np.zeros((2, 3, 12, 12))])
    refused(DataError, "it holds no input", own, calibration=iter([]))
    refused(DataError, "an input holds NaN", own, calibration=inputs * float("nan"))
    model = nestquant.quantize(own)
    for level in (2, -1):
        with pytest.raises(ValueError, match=f"model has levels 0 to 1; got {level}"):
            model.set_level(level)
    model.save(tmp_path / "own.nq")
    with pytest.raises(
        ArtifactError, match=r"layer 'first' is conv2d \(16, 3, 3, 3\) in the version; the model given has"
    ):
        nestquant.load(tmp_path / "own.nq", model=Own(8))
    with pytest.raises(ArtifactError, match=r"test_api:Own, a network of somebody's own.*give model="):
        nestquant.load(tmp_path / "own.nq")
    with torch.no_grad():
        own.second.weight[0, 0, 0, 0] = float("nan")
    refused(CheckpointError, "'second.weight'", own)


@pytest.mark.parametrize("place", [0.5, 0.05, 0.95])
def test_a_damaged_file_is_refused(own: Own, tmp_path: Path, place: float) -> None:
    path = tmp_path / "own.nq"
    nestquant.quantize(own).save(path)
    whole = bytearray(path.read_bytes())
    content = [at for at, byte in enumerate(whole) if byte]
    whole[content[int(len(content) * place)]] ^= 1
    path.write_bytes(whole)
    with pytest.raises((ArtifactError, ValueError)):
        nestquant.load(path, model=Own, level=1)
    path.write_bytes(bytes(whole[: len(whole) // 2]))
    with pytest.raises(ArtifactError):
        nestquant.load(path, model=Own, level=1)
    with pytest.raises(ArtifactError, match="No such file"):
        nestquant.load(tmp_path / "none.nq", model=Own)


def test_the_specs_of_jobs_are_exported() -> None:
    assert JobSpec.__module__ == "jobs.spec.job"
