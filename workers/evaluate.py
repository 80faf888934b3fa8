"""Top-1 accuracy of a network on labelled images, and whether it is more than chance."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from nestquant.engines.images import Preprocessing
from storage.manifest import Record
from workers.errors import DataError, WorkError
from workers.forward import run_network
from workers.inputs.images import ImageSet, none_readable

DOUBT = 0.01
"""A verdict that a network answers by chance is wrong in at most so many of the cases that it concerns."""

USEFUL = 0.25
"""What counts as more than chance, as a part of the way from chance to all answers right."""


@dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``total`` images in ``seconds``; the rest are figures in percent.

    ``expected``: how many would be right if the answers had nothing to do with the labels: the sum over the classes of
    how often each is the answer, times how often it is the label, over ``total``. Answers spread evenly over the
    classes give ``total / classes``; a network that always gives one answer gives that label's images.
    """

    correct: int
    total: int
    seconds: float = 0.0
    expected: float = 0.0

    @property
    def top1(self) -> float:
        """Return top-1 accuracy in percent."""
        return 100.0 * self.correct / self.total

    @property
    def standard_error(self) -> float:
        """Return the standard error of ``top1`` in percentage points (binomial)."""
        share = self.correct / self.total
        return 100.0 * math.sqrt(share * (1 - share) / self.total)

    @property
    def is_chance(self) -> bool:
        """Tell whether the answers have nothing to do with the labels, beyond doubt.

        Both must hold by an exact binomial test: the right answers are no more than chance explains, and they are fewer
        than those of a network that is of any use (`USEFUL`). A set too small to tell the two apart gives no verdict.
        """
        from scipy.stats import binomtest

        chance = self.expected / self.total
        useful = chance + USEFUL * (1 - chance)
        above = binomtest(self.correct, self.total, chance, alternative="greater").pvalue
        below = binomtest(self.correct, self.total, useful, alternative="less").pvalue
        return bool(above > DOUBT and below < DOUBT)


class Counts(Record):
    """Right answers over some images, and how often each class was the answer, and the label.

    Counts of parts of a set add up to those of the whole: integers all, so in any order and exactly.
    """

    correct: int = 0
    total: int = 0
    answered: dict[int, int] = Field(default_factory=dict)
    labelled: dict[int, int] = Field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        """Return the counts over both parts; they share no image."""
        return Counts(
            correct=self.correct + other.correct,
            total=self.total + other.total,
            answered=Counter(self.answered) + Counter(other.answered),
            labelled=Counter(self.labelled) + Counter(other.labelled),
        )

    def accuracy(self, seconds: float = 0.0) -> Accuracy:
        """Return top-1 and what chance explains of it; there is one image at least."""
        expected = sum(count * self.labelled.get(answer, 0) for answer, count in self.answered.items()) / self.total
        return Accuracy(self.correct, self.total, seconds, expected)


def top1(
    network: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 50,
    limit: int | None = None,
    name: str = "The network",
    on_batch: Callable[[int], None] | None = None,
) -> Accuracy:
    """Count right answers over the first ``limit`` images (default: all).

    Args:
        network: from (B, C, H, W) to logits (B, classes).
        images: with labels.
        preprocessing: how they become its inputs.
        batch_size: images in one forward pass.
        limit: use the first so many.
        name: what messages call the network.
        on_batch: hears how many images were done.

    Raises:
        DataError: the images carry no labels, a label is not among the network's classes, or no image could be read.
        WorkError: the network cannot run on them, gives something else than logits, or logits that are not finite.
    """
    begin = time.perf_counter()
    counts = count_answers(
        network, images, preprocessing, batch_size=batch_size, stop=limit, name=name, on_batch=on_batch
    )
    if counts.total == 0:
        raise DataError(none_readable(images.uri, images.skipped))
    return counts.accuracy(time.perf_counter() - begin)


@torch.inference_mode()
def count_answers(
    network: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    name: str = "The network",
    on_batch: Callable[[int], None] | None = None,
) -> Counts:
    """Count answers over the images ``start:stop``; an image that cannot be used is in ``images.skipped`` instead.

    Where ``start`` is a multiple of ``batch_size`` the batches are those of a run over the whole set.

    Args:
        network: from (B, C, H, W) to logits (B, classes).
        images: with labels.
        preprocessing: how they become its inputs.
        batch_size: images in one forward pass.
        start: the first image.
        stop: the first image that does not count (default: the set's end).
        name: what messages call the network.
        on_batch: hears how many images were done.

    Raises:
        DataError: the images carry no labels, or a label is not among the network's classes.
        WorkError: the network cannot run on them, gives something else than logits, or logits that are not finite.
    """
    images.require_labels()
    correct = total = 0
    answered, labelled = Counter[int](), Counter[int]()
    for inputs, labels in images.batches(preprocessing, batch_size=batch_size, start=start, stop=stop):
        logits = _logits(network, inputs, name)
        if int(labels.max()) >= logits.shape[1]:
            raise DataError(beyond_classes(images, int(labels.max()), logits.shape[1]))
        answers = logits.argmax(dim=1)
        correct += int((answers == labels).sum())
        total += len(labels)
        answered.update(answers.tolist())
        labelled.update(labels.tolist())
        if on_batch is not None:
            on_batch(total)
    return Counts(correct=correct, total=total, answered=answered, labelled=labelled)


def beyond_classes(images: ImageSet, label: int, classes: int) -> str:
    """Return what is wrong where a label is none of the network's classes."""
    reading = f" ({images.labelling.reading})" if images.labelling.reading else ""
    return (
        f"{images.uri}: label {label}{reading} is beyond the network's {classes} classes, 0 to {classes - 1}; check "
        "the labels, or model.kwargs.num_classes."
    )


def chance_fault(accuracy: Accuracy, *, where: str, reading: str) -> str:
    """Return what to say of a float network that answers by chance (`Accuracy.is_chance`).

    Args:
        accuracy: what it reaches.
        where: what the user calls the image set.
        reading: how its labels were read (`Labelling.reading`).
    """
    return (
        f"{where}: the float network is right on {accuracy.correct} of {accuracy.total} images, and chance alone "
        f"gives {accuracy.expected:.1f}. Either the labels are not in the order of its classes "
        f"({reading or 'no reading known'}), or it was trained with another preprocessing "
        "(preprocess.size, mean, std), or its classifier is not trained. If this is meant, say evaluate.accept_chance: "
        "true."
    )


def _logits(network: nn.Module, inputs: Tensor, name: str) -> Tensor:
    logits = run_network(network, inputs, name)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
        actual = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise WorkError(f"{name} answers {len(inputs)} images with {actual}; top-1 needs ({len(inputs)}, classes).")
    return logits
