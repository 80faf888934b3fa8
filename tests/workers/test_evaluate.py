"""Counting right answers, and telling a network that knows something from one that does not."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from nestquant.engines.images import Preprocessing
from workers.errors import DataError, WorkError
from workers.evaluate import Accuracy, Counts, chance_fault, count_answers, top1
from workers.inputs.images import ImageSet, open_images

PLAIN = Preprocessing(size=8, resize=None, mean=(0.0,), std=(1 / 255,))


class Answering(nn.Module):
    """Gives what a function makes of the grey value of each image."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, inputs: Tensor) -> Any:
        return self.answer(inputs[:, 0, 0, 0].round().long())


def one_hot(classes: int, choose: Callable[[Tensor], Tensor] = lambda value: value) -> Answering:
    return Answering(lambda value: nn.functional.one_hot(choose(value), classes).float())


def grey(path: Path, values: list[int], labels: list[int]) -> ImageSet:
    """Images that are their value all over."""
    x = np.repeat(np.array(values, np.uint8), 64).reshape(-1, 8, 8)
    np.savez(path / "set.npz", x=x, y=np.array(labels))
    return open_images(path / "set.npz")


def test_right_answers_are_counted_beside_those_that_chance_explains(tmp_path: Path) -> None:
    images = grey(tmp_path, [0, 1, 2, 2, 1, 0, 0, 0], [0, 1, 2, 1, 1, 2, 0, 1])
    found = top1(one_hot(3), images, PLAIN, batch_size=3)
    # Answers 0, 1, 2: 4, 2, 2 times; labels 0, 1, 2: 2, 4, 2 times.
    assert (found.correct, found.total, found.expected) == (5, 8, (4 * 2 + 2 * 4 + 2 * 2) / 8)
    assert found.top1 == 62.5
    some = top1(one_hot(3), images, PLAIN, batch_size=3, limit=4)
    assert (some.correct, some.total, some.expected) == (3, 4, (1 * 1 + 1 * 2 + 2 * 1) / 4)


@pytest.mark.parametrize(
    ("correct", "total", "expected", "verdict"),
    [
        (100, 1000, 100.0, True),  # ten classes, labels in another order
        (0, 1000, 100.0, True),  # labels moved by one
        (130, 1000, 100.0, False),  # a poor network, but it knows something
        (717, 1000, 100.0, False),
        (1, 1300, 1.3, True),  # a thousand classes
        (888, 1300, 1.3, False),
        (0, 20, 0.02, True),
        (0, 10, 0.01, False),  # ten images of a thousand classes: bad luck of a network that is right on one in four
        (4, 40, 4.0, True),
        (2, 12, 1.2, False),
        (20, 40, 20.0, False),  # two classes: too few images for a verdict
        (250, 500, 250.0, True),
        (300, 500, 250.0, False),
        (900, 1000, 900.0, True),  # always the label that nine of ten images have
        (955, 1000, 905.0, False),  # ... and one that finds half of the others
        (1, 1, 1.0, False),
        (0, 1, 0.0, False),
        (0, 1000, 0.0, True),  # never an answer that is a label at all
    ],
)
def test_the_verdict_waits_for_enough_images(correct: int, total: int, expected: float, verdict: bool) -> None:
    assert Accuracy(correct, total, expected=expected).is_chance is verdict


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_network_of_use_is_hardly_ever_refused_and_one_by_chance_hardly_ever_passes(classes: int) -> None:
    """Of many drawn sets of 1,000 images, at 30% of the way from chance to all right, and at chance."""
    draw = np.random.default_rng(0)
    chance = 1 / classes
    refused = [
        [Accuracy(int(correct), 1000, expected=1000 * chance).is_chance for correct in draw.binomial(1000, share, 200)]
        for share in (chance + 0.3 * (1 - chance), chance)
    ]
    assert sum(refused[0]) == 0
    assert sum(refused[1]) >= 190


def test_what_to_look_at_is_said(tmp_path: Path) -> None:
    images = grey(tmp_path, [0] * 40, [0, 1] * 20)
    assert chance_fault(Accuracy(4, 40, expected=4.0), where=images.uri, reading=images.labelling.reading) == (
        f"{tmp_path}/set.npz: the float network is right on 4 of 40 images, and chance alone gives 4.0. Either the "
        "labels are not in the order of its classes (2 classes by the array 'y', 0 to 1), or it was trained with "
        "another preprocessing (preprocess.size, mean, std), or its classifier is not trained. If this is meant, say "
        "evaluate.accept_chance: true."
    )


def test_a_label_that_is_no_class_is_said_with_how_labels_were_read(tmp_path: Path) -> None:
    images = grey(tmp_path, [0, 1, 2], [0, 1, 3])
    with pytest.raises(
        DataError, match=r"label 3 \(3 classes by the array 'y', 0 to 3\) is beyond the network's 3 classes"
    ):
        top1(one_hot(3), images, PLAIN)


def failing(_: Tensor) -> Tensor:
    raise AssertionError


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (
            failing,
            r"timm net \(float\) cannot run on inputs of 2 x 1 x 8 x 8: AssertionError at 'raise AssertionError'",
        ),
        (
            lambda value: value.reshape(-1, 1, 1, 1),
            r"answers 2 images with a tensor \(2, 1, 1, 1\); top-1 needs \(2, classes\)",
        ),
        (lambda value: [value, value], "answers 2 images with a list"),
        (lambda value: torch.zeros(1, 3), r"answers 2 images with a tensor \(1, 3\)"),
        (lambda value: torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), "answers 1 of 2 images with NaN or infinity"),
        (lambda value: torch.full((2, 2), torch.inf), "answers 2 of 2 images with NaN or infinity"),
    ],
)
def test_what_is_no_answer_ends_in_one_line_that_names_the_network(
    answer: Callable[[Tensor], Any], seen: str, tmp_path: Path
) -> None:
    images = grey(tmp_path, [0, 1], [0, 1])
    with pytest.raises(WorkError, match=seen):
        top1(Answering(answer), images, PLAIN, name="timm net (float)")


@pytest.fixture(scope="module")
def some_broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-nine grey images of five classes; every seventh is none."""
    folder = tmp_path_factory.mktemp("some_broken")
    rows = ["file,label"]
    for index in range(29):
        path = folder / f"{index:02d}.png"
        Image.fromarray(np.full((8, 8, 3), index * 3 % 5, np.uint8)).save(path)
        if index % 7 == 3:
            path.write_bytes(b"no image")
        rows.append(f"{path.name},{index * index % 5}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


@given(batch_size=st.integers(1, 31), edges=st.sets(st.integers(1, 30)), order=st.randoms(use_true_random=False))
def test_the_counts_of_any_ranges_in_any_order_add_up_to_those_of_the_whole_set(
    some_broken: Path, batch_size: int, edges: set[int], order: Any
) -> None:
    """Ranges of whole batches, odd ones, and ranges of which no image can be used."""
    images = open_images(some_broken)
    whole = count_answers(one_hot(5), images, PLAIN, batch_size=batch_size)
    skipped = list(images.skipped)
    assert (whole.total, len(skipped)) == (25, 4)
    images.skipped.clear()
    cuts = [0, *sorted(edge * batch_size for edge in edges if edge * batch_size < 29), 29]
    ranges = list(itertools.pairwise(cuts))
    order.shuffle(ranges)
    parts = [
        count_answers(one_hot(5), images, PLAIN, batch_size=batch_size, start=start, stop=stop)
        for start, stop in ranges
    ]
    kept = [Counts.model_validate_json(part.model_dump_json()) for part in parts]  # as the ledger keeps them
    assert sum(kept, Counts()) == whole
    assert sorted(images.skipped) == skipped
    answers, labels = Counter[int](), Counter[int]()
    for index in range(29):
        if index % 7 != 3:
            answers[index * 3 % 5] += 1
            labels[index * index % 5] += 1
    assert (whole.answered, whole.labelled) == (answers, labels)
