"""Top-1 accuracy of a network on labelled images, and whether it is more than chance."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestquant.engines.images import Preprocessing
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


@torch.inference_mode()
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
    images.require_labels()
    begin = time.perf_counter()
    correct = total = 0
    answered, labelled = Counter[int](), Counter[int]()
    for inputs, labels in images.batches(preprocessing, batch_size=batch_size, stop=limit):
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
    if total == 0:
        raise DataError(none_readable(images.uri, images.skipped))
    expected = sum(count * labelled[answer] for answer, count in answered.items()) / total
    return Accuracy(correct, total, time.perf_counter() - begin, expected)


def beyond_classes(images: ImageSet, label: int, classes: int) -> str:
    """Return what is wrong where a label is none of the network's classes."""
    reading = f" ({images.labelling.reading})" if images.labelling.reading else ""
    return (
        f"{images.uri}: label {label}{reading} is beyond the network's {classes} classes, 0 to {classes - 1}; check "
        "the labels, or model.kwargs.num_classes."
    )


def chance_fault(accuracy: Accuracy, images: ImageSet) -> str:
    """Return what to say of a float network that answers by chance (`Accuracy.is_chance`)."""
    return (
        f"{images.uri}: the float network is right on {accuracy.correct} of {accuracy.total} images, and chance alone "
        f"gives {accuracy.expected:.1f}. Either the labels are not in the order of its classes "
        f"({images.labelling.reading or 'no reading known'}), or it was trained with another preprocessing "
        "(preprocess.size, mean, std), or its classifier is not trained. If this is meant, say evaluate.accept_chance: "
        "true."
    )


def _logits(network: nn.Module, inputs: Tensor, name: str) -> Tensor:
    logits = run_network(network, inputs, name)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
        actual = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise WorkError(f"{name} answers {len(inputs)} images with {actual}; top-1 needs ({len(inputs)}, classes).")
    return logits
