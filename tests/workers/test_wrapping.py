"""What training tools save, each made by the tool itself: where the weights are found, and under which names."""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.workers.checkpoints.make import FOLDER, Net
from workers.errors import CheckpointError
from workers.inputs.checkpoint import save_state, to_safetensors
from workers.inputs.torch_file import file_kind, load_pickled
from workers.inputs.wrapping import CONTAINERS, EXTRAS, PREFIXES, unwrap

WANTED = tuple(Net().state_dict())


def found(path: Path, choice: Any = None) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Return the weights that are taken from a file, and what is told about them."""
    folder = path.parent / "scratch"
    folder.mkdir(exist_ok=True)
    weights = to_safetensors(path, folder, WANTED, name="mine", choice=choice)
    return load_file(weights.path), weights.notes


def same(seen: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return seen.keys() == expected.keys() and all(torch.equal(seen[name], expected[name]) for name in expected)


def shifted(by: float) -> Net:
    """Return the network with other weights."""
    net = Net()
    for name, tensor in net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            tensor.add_(by)
    return net


def distributed(net: nn.Module) -> nn.Module:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(net)
    finally:
        torch.distributed.destroy_process_group()


class Inside(nn.Module):
    """A module that holds the network under a name, and something else."""

    def __init__(self, name: str, net: nn.Module) -> None:
        super().__init__()
        setattr(self, name, net)
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(3))


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "": (lambda net: net, ""),
    "module.": (nn.DataParallel, ""),
    "_orig_mod.": (torch.compile, ""),
    "module._orig_mod.": (lambda net: nn.DataParallel(torch.compile(net)), ""),
    "_orig_mod.module.": (lambda net: torch.compile(nn.DataParallel(net)), ""),
    "averaged module.": (torch.optim.swa_utils.AveragedModel, "AveragedModel's count"),
    "averaged module.module.": (
        lambda net: torch.optim.swa_utils.AveragedModel(nn.DataParallel(net)),
        "AveragedModel's",
    ),
    "distributed module.": (distributed, ""),
    "model.": (lambda net: Inside("model", net), "1 names without that prefix (loss.weight)"),
    "model._orig_mod.": (lambda net: Inside("model", torch.compile(net)), "1 names without that prefix (loss.weight)"),
    "student.": (lambda net: Inside("student", net), "1 names without that prefix (loss.weight)"),  # no table names it
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", WRAPPERS)
def test_a_prefix_is_taken_off_in_pickles_and_in_safetensors_alike(tmp_path: Path, case: str, suffix: str) -> None:
    net = Net()
    wrap, left = WRAPPERS[case]
    state = wrap(net).state_dict()
    path = tmp_path / f"mine{suffix}"
    prefix = case.rpartition(" ")[2]
    assert all(name.startswith(prefix) for name in state if name not in ("n_averaged", "loss.weight"))
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    seen, notes = found(path)
    assert same(seen, net.state_dict())
    assert (f"under {prefix!r}" in " ".join(notes)) == bool(prefix)
    assert left in " ".join(notes)
    assert (notes == ()) == (case == "")


def test_a_safetensors_file_under_the_networks_names_is_used_as_it_is(tmp_path: Path) -> None:
    path = save_state(Net().state_dict(), tmp_path / "mine.safetensors")
    assert to_safetensors(path, tmp_path / "nowhere", WANTED).path == path


@pytest.fixture
def timm_saved(tmp_path: Path) -> Path:
    """What timm's own saver writes while it trains with an averaged copy."""
    from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

    net = Net()
    ema = ModelEmaV3(net)
    ema.module.load_state_dict(shifted(1.0).state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    arguments = argparse.Namespace(model="net", lr=0.1, data_dir=Path("data"), mean=None)
    saver = CheckpointSaver(
        net, optimizer, args=arguments, model_ema=ema, amp_scaler=NativeScaler(), checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(3, np.float64(71.5))
    return tmp_path / "model_best.pth.tar"


def test_timm_averaged_weights_are_taken_unless_the_spec_says_otherwise(timm_saved: Path) -> None:
    averaged = (
        "mine: took the averaged weights in 'state_dict_ema'; 'model.weights: model' takes those in 'state_dict'.",
    )
    own = (
        "mine: took the weights that are not averaged in 'state_dict'; 'model.weights: ema' takes those in "
        "'state_dict_ema'.",
    )
    for choice, net, told in ((None, shifted(1.0), averaged), ("ema", shifted(1.0), averaged), ("model", Net(), own)):
        seen, notes = found(timm_saved, choice)
        assert same(seen, net.state_dict())
        assert notes == told


def test_torchvisions_reference_training_file(tmp_path: Path) -> None:
    net, averaged = Net(), torch.optim.swa_utils.AveragedModel(shifted(2.0))  # its ExponentialMovingAverage is one
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.save(
        {
            "model": nn.DataParallel(net).module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1).state_dict(),
            "epoch": 3,
            "args": argparse.Namespace(lr=0.1),
            "model_ema": averaged.state_dict(),
        },
        tmp_path / "mine.pth",
    )
    seen, notes = found(tmp_path / "mine.pth")
    assert same(seen, shifted(2.0).state_dict())
    assert notes[0].startswith("mine: took the averaged weights in 'model_ema' under 'module.'; 'model.weights: model'")
    assert same(found(tmp_path / "mine.pth", "model")[0], net.state_dict())


def test_lightning(tmp_path: Path) -> None:
    for name, own, averaged in (
        ("lightning.ckpt", "state_dict", None),
        ("lightning_averaged.ckpt", "current_model_state", "state_dict"),
    ):
        path = FOLDER / name
        raw = load_pickled(path, name, file_kind(path, name))
        copied = tmp_path / name
        copied.write_bytes(path.read_bytes())
        for choice, key in ((None, averaged or own), ("model", own), ("ema", averaged)):
            if key is None:
                continue
            seen, notes = found(copied, choice)
            assert same(seen, stripped(raw[key]))
            assert f"in '{key}' under 'model.'" in notes[0]
            assert notes[1] == "mine: left out 1 names without that prefix (loss.weight)."
    with pytest.raises(
        CheckpointError, match=r"model\.weights is 'ema', but it holds weights that are not averaged alone"
    ):
        found(tmp_path / "lightning.ckpt", "ema")
    assert not torch.equal(raw["state_dict"]["model.fc.bias"], raw["current_model_state"]["model.fc.bias"])


def stripped(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_profilers_counts_are_left_out(tmp_path: Path, suffix: str) -> None:
    state = torch.load(FOLDER / "thop.pth", weights_only=True)
    assert {name.rpartition(".")[2] for name in state} >= {"total_ops", "total_params"}
    path = tmp_path / f"mine{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_state(state, path)
    seen, notes = found(path)
    assert same(seen, Net().state_dict())
    assert notes == ("mine: left out a profiler's counts.",)


def test_configurations_metrics_and_arguments_beside_the_weights(tmp_path: Path) -> None:
    (tmp_path / "configs.pth").write_bytes((FOLDER / "configs.pth").read_bytes())
    seen, notes = found(tmp_path / "configs.pth")
    assert same(seen, Net().state_dict())
    assert notes == ("mine: the weights are in 'model'.",)


def test_nothing_that_a_file_names_is_imported(tmp_path: Path) -> None:
    path = FOLDER / "configs.pth"
    before = set(sys.modules)
    document = load_pickled(path, "mine", file_kind(path, "mine"))
    assert not {
        name for name in set(sys.modules) - before if name.partition(".")[0] in ("yacs", "omegaconf", "easydict")
    }
    assert type(document["args"]) is collections.Counter


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_before_1_6(tmp_path: Path, *, zipped: bool) -> None:
    document = {"state_dict": nn.DataParallel(Net()).state_dict(), "best_acc1": np.float32(70), "arch": "net"}
    document["args"] = argparse.Namespace(lr=0.1)
    torch.save(document, tmp_path / "mine.pth", _use_new_zipfile_serialization=zipped)
    assert file_kind(tmp_path / "mine.pth", "mine") == ("torch zip" if zipped else "torch legacy")
    assert same(found(tmp_path / "mine.pth")[0], Net().state_dict())


@pytest.mark.parametrize("place", CONTAINERS, ids=lambda place: place.text)
@pytest.mark.parametrize("suffix", [".pth.tar", ".ckpt", ".bin", ".pt", ""])
def test_every_container_of_the_table(tmp_path: Path, place: Any, suffix: str) -> None:
    torch.save({"epoch": 3, place.text: Net().state_dict(), "optimizer": {"state": {}}}, tmp_path / f"mine{suffix}")
    seen, notes = found(tmp_path / f"mine{suffix}")
    assert same(seen, Net().state_dict())
    assert notes == (f"mine: the weights are in '{place.text}'.",)
    other = "model" if place.averaged else "ema"
    with pytest.raises(CheckpointError, match=rf"^mine: model\.weights is '{other}', but it holds .* alone, in '"):
        found(tmp_path / f"mine{suffix}", other)


@pytest.mark.parametrize("place", PREFIXES, ids=lambda place: place.text)
def test_every_prefix_of_the_table(tmp_path: Path, place: Any) -> None:
    save_file({place.text + name: tensor for name, tensor in Net().state_dict().items()}, tmp_path / "mine.safetensors")
    seen, notes = found(tmp_path / "mine.safetensors", "ema" if place.averaged else "model")
    assert same(seen, Net().state_dict())
    assert notes == (f"mine: the weights are in the file itself under {place.text!r}.",)


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_of_the_table(tmp_path: Path, extra: str) -> None:
    state = {**Net().state_dict(), f"fc.{extra}": torch.tensor(3), extra: torch.tensor(3)}
    save_file(state, tmp_path / "mine.safetensors")
    seen, notes = found(tmp_path / "mine.safetensors")
    assert same(seen, Net().state_dict())
    assert notes == (f"mine: left out {EXTRAS[extra]}.",)


def test_names_of_the_network_itself_win_over_the_tables(tmp_path: Path) -> None:
    """A network may have a module called 'model', or a buffer called 'n_averaged'."""
    state = {f"model.{name}": tensor for name, tensor in Net().state_dict().items()} | {"n_averaged": torch.tensor(3)}
    path = save_state(state, tmp_path / "mine.safetensors")
    weights = to_safetensors(path, tmp_path, tuple(state))
    assert (weights.path, weights.notes) == (path, ())


def test_an_averaged_copy_inside_one_state_dict(tmp_path: Path) -> None:
    both = {f"model.{name}": tensor for name, tensor in Net().state_dict().items()}
    both |= {f"ema_model.module.{name}": tensor for name, tensor in shifted(1.0).state_dict().items()}
    torch.save({"state_dict": both}, tmp_path / "mine.ckpt")
    assert same(found(tmp_path / "mine.ckpt")[0], shifted(1.0).state_dict())
    assert same(found(tmp_path / "mine.ckpt", "model")[0], Net().state_dict())


def test_two_that_no_table_tells_apart_are_refused(tmp_path: Path) -> None:
    both = {f"student.{name}": tensor for name, tensor in Net().state_dict().items()}
    both |= {f"teacher.{name}": tensor for name, tensor in shifted(1.0).state_dict().items()}
    torch.save(both, tmp_path / "mine.pth")
    with pytest.raises(
        CheckpointError, match=r"^mine holds the network 2 times \(.*'student\.', .*'teacher\.'\); save"
    ):
        found(tmp_path / "mine.pth")


def test_what_fits_nowhere_is_handed_on_with_the_nearest_names(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in Net().state_dict().items() if not name.startswith("fc")}
    torch.save(
        {"state_dict": {**state, "module.head.weight": torch.zeros(3, 2)}, "x": {"y": torch.zeros(1)}}, tmp_path / "m"
    )
    assert found(tmp_path / "m")[0].keys() == {*(name for name in WANTED if name[:2] != "fc"), "head.weight"}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"epoch": 3, "lr": 0.1}, "mine holds no state dict: its keys are epoch, lr; expected tensors by name"),
        ({"state_dict": {}}, "mine holds no state dict: its keys are state_dict; expected tensors by name"),
        ([torch.zeros(2)], "mine holds a list; expected a state dict, tensors by name"),
        (torch.zeros(2), "mine holds a Tensor; expected a state dict, tensors by name"),
        ({}, "mine holds a dict; expected a state dict, tensors by name"),
    ],
)
def test_what_holds_no_weights_is_said(tmp_path: Path, document: Any, said: str) -> None:
    torch.save(document, tmp_path / "mine.pth")
    with pytest.raises(CheckpointError) as caught:
        found(tmp_path / "mine.pth")
    assert str(caught.value) == f"{said}."


def test_a_document_that_holds_itself_ends() -> None:
    document: dict[str, Any] = {"model": {}}
    document["model"]["state"] = document
    document["again"] = document
    with pytest.raises(CheckpointError, match="holds no state dict"):
        unwrap(document, WANTED, torch.Tensor, name="mine")


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_are_no_float_weights_are_named(tmp_path: Path, tensor: torch.Tensor, said: str) -> None:
    torch.save({**Net().state_dict(), "fc.weight": tensor}, tmp_path / "mine.pth")
    with pytest.raises(CheckpointError, match=rf"^mine: tensor 'fc\.weight' is {said}; expected the float network's"):
        found(tmp_path / "mine.pth")
