"""Whatever is raised at a boundary becomes one line with the file, the layer or the architecture.

A boundary is where code that is not ours runs, or where the system answers: decoders of images and archives, readers of
checkpoints and labels, constructors and forwards of networks, exporters, files, stores. `BOUNDARIES` lists those of
workers/, jobs/ and storage/ that a job passes: where somebody else's error comes from (the exception is raised there,
in the real function's place, the moment it is called), what the job was doing, and what the line has to name. Forwards
of networks stand in `STAGES`, by the stage that runs them.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.cli.main import Exit, run
from jobs.driver import run_job
from jobs.errors import JobError
from jobs.events import Event
from jobs.spec.file import parse_spec
from nestquant.engines.images import PhotoError, Preprocessing, photo_input
from storage.errors import StorageError
from storage.registry import Registry
from storage.stores.local import LocalStore
from storage.stores.uri import open_store
from workers.errors import WorkError
from workers.executor import InProcessExecutor
from workers.inputs import networks, own
from workers.inputs.checkpoint import random_state, save_state, to_safetensors
from workers.inputs.images import open_images
from workers.inputs.labels import labels_of_file
from workers.inputs.tensors import TensorReader
from workers.inputs.weights import WeightsTask, make_weights
from workers.quantize import run_unit
from workers.tasks import BaseTask, NetworkRef, TaskContext, TensorSource

Document = Callable[..., dict[str, Any]]
OURS = (WorkError, StorageError, JobError, PhotoError)
GREY = Preprocessing(size=8, resize=None, mean=(0.5,) * 3, std=(0.5,) * 3)


class Odd(Exception):
    """An error whose own text fails."""

    def __str__(self) -> str:
        raise ValueError("no text")


texts = st.text(max_size=60) | st.just("first line\nsecond line")
SYSTEM = st.builds(OSError, st.sampled_from(sorted(errno.errorcode)), texts, st.just("/some/file"))
ANY = st.one_of(
    SYSTEM,
    texts.map(OSError),
    *(texts.map(kind) for kind in (ValueError, RuntimeError, AssertionError, KeyError, TypeError, NotImplementedError)),
    *(st.just(kind()) for kind in (MemoryError, RecursionError, AssertionError, EOFError, StopIteration, Odd)),
    st.just(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")),
)


def raising(error: BaseException) -> Callable[..., Any]:
    """Return a function that raises the error whatever it is called with."""

    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def assert_one_line(caught: BaseException, error: BaseException, names: str) -> None:
    """Hold a message against what is promised: one line, printable, naming what was at fault, with a word of why."""
    message = str(caught)
    assert isinstance(caught, OURS), f"{type(caught).__name__}: {message}"
    assert len(message.splitlines()) == 1, message
    assert message.isprintable(), message
    assert re.search(names, message), message
    if isinstance(error, AssertionError) and not str(error):
        assert re.search(r"AssertionError at '.+' \(\w+\.py:\d+\)", message), message


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind that a job reads, each whole."""
    folder = tmp_path_factory.mktemp("boundaries")
    for label in ("cat", "dog"):
        (folder / "set" / label).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / "set" / label / "one.png")
    with tarfile.open(folder / "set.tar", "w") as archive:
        archive.add(folder / "set", arcname=".")
    (folder / "table").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "table" / "one.png")
    (folder / "table" / "labels.csv").write_text("file,label\none.png,0\n")
    np.savez(folder / "set.npz", x=np.zeros((2, 9, 9, 3), np.uint8), y=np.arange(2))
    np.savez(folder / "inputs.npz", inputs=np.zeros((2, 3, 8, 8), np.float32), y=np.arange(2))
    (folder / "names.txt").write_text("cat\ndog\n")
    torch.save({"w": torch.zeros(3)}, folder / "mine.pth")
    save_state(random_state("timm", "test_resnet", {}, 0), folder / "mine.safetensors")
    (folder / "scratch").mkdir()
    LocalStore(folder / "store").put("blobs/one", b"whole", mode="create")
    return folder


def batches(path: Path) -> None:
    list(open_images(path).batches(GREY, batch_size=2))


def skipped(path: Path) -> None:
    """Read a set; an image that is at fault is left out, and its reason stands in for the message."""
    images = open_images(path)
    list(images.batches(GREY, batch_size=2))
    name, reason = images.skipped[0]
    raise WorkError(f"Image {name}: {reason}")


def unit(folder: Path) -> None:
    source = TensorSource(None, str(folder / "mine.safetensors"))
    network = NetworkRef(library="timm", arch="test_resnet", kwargs={}, source=source, preprocessing=GREY.to_record())
    context = TaskContext(store_uri=str(folder / "units"), job="sha256:" + "0" * 64, network=network)
    run_unit(context, BaseTask(index=0, parameters=("conv1.0.weight",)), Registry(open_store(folder / "units")))


def weights(folder: Path) -> None:
    make_weights(
        WeightsTask(
            library="timm", arch="test_resnet", kwargs={}, random_seed=0, folder=str(folder / "scratch"), store_uri=None
        )
    )


@dataclass(frozen=True)
class Boundary:
    """``raises``: ``module:attribute`` in whose place the exception is raised. ``work``: what was being done.
    ``names``: a pattern that the line has to hold. ``errors``: what can come from there.
    """

    raises: str
    work: Callable[[Path], object]
    names: str
    errors: st.SearchStrategy[Any] = ANY


BOUNDARIES = {
    "an image of a folder is opened": Boundary(
        "workers.inputs.images:open_file", lambda at: skipped(at / "set"), "cat/one.png"
    ),
    "an image of a folder is decoded": Boundary("PIL.Image:open", lambda at: skipped(at / "set"), "cat/one.png"),
    "an image of a tar is extracted": Boundary(
        "tarfile:TarFile.extractfile", lambda at: skipped(at / "set.tar"), "cat/one.png"
    ),
    "a tar is opened": Boundary("tarfile:open", lambda at: batches(at / "set.tar"), "set.tar"),
    "a tar is listed": Boundary("tarfile:TarFile.getmembers", lambda at: batches(at / "set.tar"), "set.tar"),
    "an npz is opened": Boundary("zipfile:ZipFile", lambda at: batches(at / "set.npz"), "set.npz"),
    "an array's header is read": Boundary(
        "numpy.lib.format:read_magic", lambda at: open_images(at / "set.npz"), "set.npz"
    ),
    "an array is read": Boundary("numpy:load", lambda at: open_images(at / "set.npz"), "set.npz"),
    "a calibration set of inputs is read": Boundary("numpy:load", lambda at: batches(at / "inputs.npz"), "inputs.npz"),
    "a folder is listed": Boundary("os:walk", lambda at: batches(at / "set"), "set"),
    "a table of labels is parsed": Boundary("csv:DictReader", lambda at: batches(at / "table"), "table"),
    "a file of class names is opened": Boundary(
        "workers.inputs.labels:open_regular",
        lambda at: labels_of_file(str(at / "names.txt"), at / "scratch", where="labels.file names.txt"),
        "names.txt",
    ),
    "a photograph is decoded on a device": Boundary(
        "PIL.Image:open", lambda at: photo_input(at / "set/cat/one.png", GREY), "one.png"
    ),
    "a pickled checkpoint is loaded": Boundary(
        "torch:load", lambda at: to_safetensors(at / "mine.pth", at / "scratch", ["w"]), "mine.pth"
    ),
    "a checkpoint's kind is looked at": Boundary(
        "workers.inputs.checkpoint:file_kind",
        lambda at: to_safetensors(at / "mine.pth", at / "scratch", []),
        "mine.pth",
    ),
    "a safetensors header is parsed": Boundary(
        "json:loads", lambda at: TensorReader(TensorSource(None, str(at / "mine.safetensors"))), "mine.safetensors"
    ),
    "a copy of a checkpoint is written": Boundary(
        "workers.inputs.checkpoint:save_file",
        lambda at: to_safetensors(at / "mine.pth", at / "scratch", ["w"]),
        "scratch",
    ),
    "weights of a seed are written": Boundary("workers.inputs.checkpoint:save_file", weights, "scratch"),
    "timm builds a network": Boundary("timm:create_model", lambda _: networks.build("timm", "resnet18"), "resnet18"),
    "pytorchcv builds a network": Boundary(
        "pytorchcv.model_provider:get_model", lambda _: networks.build("pytorchcv", "resnet18"), "resnet18"
    ),
    "a shard is packed": Boundary("workers.quantize:build_base", unit, "conv1.0.weight"),
    "an object of a folder is read": Boundary(
        "storage.stores.local:open_regular",
        lambda at: LocalStore(at / "store").get("blobs/one"),
        "blobs/one|/store",
        SYSTEM,
    ),
    "an object of a folder is written": Boundary(
        "os:fsync",
        lambda at: LocalStore(at / "store").put("blobs/two", b"x", mode="create"),
        "blobs/two|/store",
        SYSTEM,
    ),
}


@contextlib.contextmanager
def broken(seam: str, error: BaseException) -> Iterator[None]:
    """Raise the error in the place of what ``module:attribute`` names."""
    module, _, path = seam.partition(":")
    target: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        target = getattr(target, part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, raising(error))
        yield


@pytest.mark.parametrize("name", BOUNDARIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_raised_at_a_boundary_is_one_line(name: str, place: Path, data: st.DataObject) -> None:
    boundary = BOUNDARIES[name]
    error = data.draw(boundary.errors)
    with broken(boundary.raises, error), pytest.raises(BaseException) as caught:  # noqa: PT011 - its kind is the claim
        boundary.work(place)
    assert_one_line(caught.value, error, boundary.names)


RAISING_NET = """
import torch
from torch import nn

armed = []

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        if armed:
            raise armed[0]
        return self.conv(x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Layer()
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x):
        return self.classifier(self.norm(self.body(x)).relu().mean((2, 3)))

def build():
    return Net()
"""

CALIBRATED = {"recipe": "calibrated", "bits": [8, 4], "activations": {"observer": "minmax"}}
STAGES: dict[str, dict[str, Any]] = {
    "sensitivity": {"quantize": {"recipe": "paper", "bits": [8, 4], "mixed": {"mean_bits": 4.5, "samples": 8}}},
    "synthesize": {"quantize": {"recipe": "data_free", "bits": [8, 4]}, "calibration": None},
    "calibrate": {"quantize": CALIBRATED},
    "reconstruct": {"quantize": {"recipe": "calibrated", "bits": [8, 4]}},
    "evaluate": {"quantize": {"recipe": "paper", "bits": [8, 4]}},
    "trace": {
        "quantize": {"recipe": "paper", "bits": [8, 4], "scheme": "symmetric"},
        "export": {"engines": ["onnx"]},
    },
}
"""The stages of a job that run its network, and the smallest spec that has each."""


@pytest.fixture(scope="module")
def raising_net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A network of a team's own whose one layer raises what is in ``armed``."""
    folder = tmp_path_factory.mktemp("raising")
    (folder / "raising_net.py").write_text(RAISING_NET)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("raising_net")
    sys.path.remove(str(folder))
    own._factories.pop("raising_net:build", None)


@pytest.mark.parametrize("stage", STAGES)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(error=ANY)
def test_whatever_a_forward_raises_is_one_line_with_the_layer_in_every_stage(
    stage: str, raising_net: ModuleType, tiny_document: Document, tmp_path: Path, error: Exception
) -> None:
    document = tiny_document(
        model={"factory": "raising_net:build", "random_seed": 0},
        preprocess={"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3},
        **STAGES[stage],
    )
    document["store"] = {"uri": "memory://"} if False else document["store"]
    ended: list[str] = []

    def listen(event: Event) -> None:
        if (event.kind, event.stage) == ("started", stage):
            raising_net.armed.append(error)
        if event.kind == "finished":
            ended.append(event.stage)

    try:
        with pytest.raises(BaseException) as caught:  # noqa: PT011 - its kind is the claim
            run_job(parse_spec(document, where="test"), InProcessExecutor(), listen)
    finally:
        raising_net.armed.clear()
    assert stage not in ended
    assert_one_line(caught.value, error, "raising_net:build")
    if stage != "trace":
        assert "layer 'body'" in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(error=ANY, as_json=st.booleans())
def test_what_no_boundary_expected_is_one_line_with_its_place(
    capsys: pytest.CaptureFixture[str], error: Exception, as_json: bool
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(raising(error), as_json=as_json)
    line = capsys.readouterr().err
    assert stopped.value.code == (
        Exit.DISK if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else Exit.FAILED
    )
    assert len(line.splitlines()) == 1
    if as_json:
        assert json.loads(line).keys() == {"error", "exit_code"}
    if not isinstance(error, OSError):
        assert re.search(r"A fault of nestquant's own: .+, in call \(test_boundaries\.py:\d+\)", line)


def test_the_traceback_is_there_for_who_asks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTQUANT_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        run(raising(AssertionError()), as_json=False)
    assert capsys.readouterr().err.startswith("Traceback (most recent call last):")
