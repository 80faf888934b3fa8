"""Networks are somebody else's code: whatever one raises, wherever it runs, is one line with its name and layer; an
answer that is not finite is traced to where it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import timm.models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typing_extensions import override

from nestquant.engines.images import Preprocessing
from workers.calibrate import CalibrateTask, observe
from workers.errors import ModelError, WorkError, one_line
from workers.evaluate import top1
from workers.forward import run_network
from workers.inputs.checkpoint import random_state, save_state
from workers.inputs.images import open_images
from workers.inputs.networks import build
from workers.inputs.tensors import TensorSource
from workers.reconstruct import Member, MemberTask
from workers.sensitivity import SensitivityTask, measure_layer
from workers.synthesize import SynthesizeTask, synthesize
from workers.tasks import NetworkRef, PieceTask, TaskContext

PREPROCESSING = {"size": 8, "resize": None, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
DEFECT: dict[str, Callable[[Tensor], Tensor]] = {}


class Part(nn.Module):
    """Runs what the test puts into ``DEFECT`` under its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return DEFECT.get(self.name, lambda value: value)(inputs)


class Defective(nn.Module):
    """A small classifier with a part that can be made to fail, in the middle and at the end."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), Part("block"))
        self.mixed = nn.Conv2d(4, 4, 1)
        self.fc, self.end = nn.Linear(4, num_classes), Part("end")
        if "build" in DEFECT:
            DEFECT["build"](torch.empty(0))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        features = self.mixed(self.norm(self.block(self.stem(inputs).relu())))
        answer: Tensor = self.end(self.fc(features.mean(dim=(2, 3))))
        return answer


@timm.models.register_model
def nestquant_defective(pretrained: bool = False, num_classes: int = 10, **_: Any) -> nn.Module:
    return Defective(num_classes)


@pytest.fixture(autouse=True)
def whole() -> Iterator[None]:
    yield
    DEFECT.clear()


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> TaskContext:
    """Weights, ten images and a store for the small classifier."""
    folder = tmp_path_factory.mktemp("defective")
    state = random_state("timm", "nestquant_defective", {}, seed=1)
    # A norm that was never shown anything promises nothing, and is passed over.
    state["norm.running_mean"] += 0.1
    path = save_state(state, folder / "weights.safetensors")
    draw = np.random.default_rng(0)
    np.savez(folder / "images.npz", x=draw.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8), y=np.arange(10))
    network = NetworkRef(
        library="timm",
        arch="nestquant_defective",
        kwargs={},
        source=TensorSource(None, str(path)),
        preprocessing=PREPROCESSING,
    )
    return TaskContext(store_uri=(folder / "store").as_uri(), job="sha256:" + "d" * 64, network=network)


def images_of(where: TaskContext) -> Path:
    return Path(where.network.source.key).parent / "images.npz"


def piece(layer: str, shape: tuple[int, ...], solution: int) -> PieceTask:
    return PieceTask(
        layer=layer,
        kind="linear" if layer == "fc" else "conv2d",
        parameter=f"{layer}.weight",
        shape=shape,
        groups=1,
        start=0,
        stop=shape[0],
        bits=(8, 4),
        scheme="asymmetric",
        rounding="nearest",
        solution=solution,
    )


PIECES = tuple(
    piece(name, shape, index)
    for index, (name, shape) in enumerate(
        {"stem": (4, 3, 3, 3), "block.0": (4, 4, 1, 1), "mixed": (4, 4, 1, 1), "fc": (10, 4)}.items()
    )
)


def calibrates(where: TaskContext, data: str | None = None) -> None:
    layers = tuple(piece.layer for piece in PIECES)
    observe(CalibrateTask(network=where.network, layers=layers, data=data, samples=10, start=0, stop=10, batch_size=4))


def reconstructs(where: TaskContext) -> None:
    chunks = ((0, 4), (4, 10))
    data = str(images_of(where))
    member = Member(MemberTask(context=where, layers=PIECES, level_count=2, data=data, samples=10, chunks=chunks))
    try:
        member.begin()
        for index in range(len(PIECES)):
            solved = tuple(range(index))
            parts = [member.moments(index, chunk, solved) for chunk in range(2)]
            member.solve(index, 10, (), None, parts)
    finally:
        member.close()


def measures(where: TaskContext) -> None:
    measure_layer(
        SensitivityTask(
            context=where,
            layer=PIECES[2],
            index=2,
            candidates=((8, 4),),
            calibrated=False,
            data=None,
            samples=4,
            stop=0,
            batch_size=4,
        )
    )


def evaluates(where: TaskContext) -> None:
    network = build("timm", where.network.arch)
    top1(network, open_images(images_of(where)), Preprocessing.from_record(PREPROCESSING), name=where.network.title)


RUNS: dict[str, Callable[[TaskContext], None]] = {
    "calibrate": calibrates,
    "calibrate on images": lambda where: calibrates(where, str(images_of(where))),
    "synthesize": lambda where: synthesize(SynthesizeTask(context=where, samples=2, chunk=0)) and None,
    "reconstruct": reconstructs,
    "sensitivity": measures,
    "evaluate": evaluates,
}


class Odd(Exception):
    """Its own text fails."""

    @override
    def __str__(self) -> NoReturn:
        raise ValueError("no text")


ERRORS = st.one_of(
    st.builds(
        lambda kind, text: kind(text),
        st.sampled_from([RuntimeError, TypeError, ValueError, KeyError, IndexError, OSError, NotImplementedError]),
        st.text(max_size=400),
    ),
    st.just(AssertionError()),
    st.just(RecursionError()),
    st.just(MemoryError()),
    st.just(StopIteration()),
    st.just(EOFError()),
    st.just(Odd()),
)


def raising(error: BaseException) -> Callable[[Tensor], Tensor]:
    def raises(_: Tensor) -> Tensor:
        raise error

    return raises


@pytest.mark.parametrize("run", RUNS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(error=ERRORS)
def test_whatever_a_network_raises_is_one_line_with_its_name_and_layer(
    run: str, where: TaskContext, error: Exception
) -> None:
    DEFECT["block"] = raising(error)
    with pytest.raises(ModelError) as caught:
        RUNS[run](where)
    message = str(caught.value)
    assert message.startswith("timm nestquant_defective cannot run on ")
    assert "in layer 'block.1', " in message
    assert type(error).__name__ in message
    assert message.isprintable()
    assert caught.value.__cause__ is error


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(error=ERRORS)
def test_whatever_a_network_raises_while_it_is_built_is_one_line(error: Exception) -> None:
    DEFECT["build"] = raising(error)
    for meta in (True, False):
        with pytest.raises(ModelError) as caught:
            build("timm", "nestquant_defective", meta=meta)
        message = str(caught.value)
        # What a constructor that computes with values says on the meta device is told as that.
        computes = meta and (isinstance(error, NotImplementedError) or "meta" in one_line(error).lower())
        begin = "cannot be planned" if computes else "could not build 'nestquant_defective' with arguments {}: "
        assert message.startswith(f"timm nestquant_defective {begin}" if computes else f"timm {begin}{one_line(error)}")
        assert type(error).__name__ in message
        assert message.isprintable()
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("error", [WorkError("ours"), KeyboardInterrupt("stop")])
def test_what_is_ours_passes_as_it_is(run: str, where: TaskContext, error: BaseException) -> None:
    DEFECT["block"] = raising(error)
    with pytest.raises(type(error)) as caught:
        RUNS[run](where)
    assert caught.value is error


def test_an_assertion_without_a_text_is_told_by_its_line() -> None:
    def asserts(_: Tensor) -> Tensor:
        raise AssertionError

    DEFECT["block"] = asserts
    with pytest.raises(ModelError) as caught:
        run_network(build("timm", "nestquant_defective"), torch.zeros(2, 3, 8, 8), "timm net")
    assert str(caught.value).startswith("timm net cannot run on inputs of 2 x 3 x 8 x 8: in layer 'block.1', ")
    assert " at 'raise AssertionError' (test_forward.py:" in str(caught.value)


def spoiled(bad: float, image: int = 0) -> Callable[[Tensor], Tensor]:
    def spoils(value: Tensor) -> Tensor:
        value = value.clone()
        value[image] = bad
        return value

    return spoils


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("run", RUNS)
def test_an_activation_that_is_not_finite_ends_the_work_with_its_layer(
    run: str, bad: float, where: TaskContext
) -> None:
    DEFECT["block"] = spoiled(bad)
    expected = {
        "synthesize": "timm nestquant_defective: layer 'norm': its input holds NaN or infinity; check the checkpoint",
        "sensitivity": "answers 1 of 4 images with NaN or infinity, first in what layer 'block.1' gives; check the",
        "evaluate": "answers 1 of 10 images with NaN or infinity, first in what layer 'block.1' gives; check the",
    }.get(run, "Layer 'mixed': its input holds NaN or infinity; check the checkpoint and the preprocessing.")
    with pytest.raises(WorkError) as caught:
        RUNS[run](where)
    assert expected in str(caught.value)


@pytest.mark.parametrize("run", [name for name in RUNS if name != "synthesize"])
def test_an_answer_that_is_not_finite_ends_the_work_where_it_is_first_seen(run: str, where: TaskContext) -> None:
    DEFECT["end"] = spoiled(torch.nan)
    with pytest.raises(WorkError, match=r"answers \d+ of \d+ images with NaN or infinity, first in what layer 'end'"):
        RUNS[run](where)


def test_inputs_that_are_not_finite_are_said_to_be(where: TaskContext) -> None:
    inputs = torch.full((2, 3, 8, 8), torch.nan)
    with pytest.raises(WorkError, match="answers 2 of 2 images with NaN or infinity, and they are not finite"):
        run_network(build("timm", "nestquant_defective"), inputs, "timm net")


@pytest.mark.parametrize("run", RUNS)
def test_a_network_without_defect_runs_everywhere(run: str, where: TaskContext) -> None:
    RUNS[run](where)
