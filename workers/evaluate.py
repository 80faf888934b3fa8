"""Top-1 accuracy of a network on labelled images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from workers.errors import DataError
from workers.inputs.images import ImageSet
from workers.inputs.networks import Preprocessing


@dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``total`` images in ``seconds``; the rest are figures in percent."""

    correct: int
    total: int
    seconds: float = 0.0

    @property
    def top1(self) -> float:
        """Return top-1 accuracy in percent."""
        return 100.0 * self.correct / self.total

    @property
    def standard_error(self) -> float:
        """Return the standard error of ``top1`` in percentage points (binomial)."""
        share = self.correct / self.total
        return 100.0 * math.sqrt(share * (1 - share) / self.total)


@torch.inference_mode()
def top1(
    network: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 50,
    limit: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Accuracy:
    """Count right answers over the first ``limit`` images (default: all); ``on_batch`` hears how many were done.

    Raises:
        DataError: the images carry no labels, a label is not among the network's classes, or no image could be read.
    """
    images.require_labels()
    begin = time.perf_counter()
    correct = total = 0
    for inputs, labels in images.batches(preprocessing, batch_size=batch_size, stop=limit):
        logits = network(inputs)
        if int(labels.max()) >= logits.shape[1]:
            raise DataError(
                f"{images.path}: label {int(labels.max())} is beyond the network's {logits.shape[1]} classes."
            )
        correct += int((logits.argmax(dim=1) == labels).sum())
        total += len(labels)
        if on_batch is not None:
            on_batch(total)
    if total == 0:
        raise DataError(f"{images.path}: none of {len(images)} images could be read; the first: {images.skipped[0]}.")
    return Accuracy(correct, total, time.perf_counter() - begin)
