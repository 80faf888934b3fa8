"""Calibration inputs as they come from a user's hands: looked at once, and cut as a job cuts its images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jobs.errors import SpecError
from jobs.spec.job import CalibrationSpec
from jobs.stages.memory import chunks_of
from nestquant.engines.images import Preprocessing
from nestquant.surgery import ExecutionOrder, execution_order, find_layers, shallow_copy
from workers.errors import DataError
from workers.forward import extents, run_network
from workers.inputs.networks import IMAGENET_MEAN, IMAGENET_STD, for_channels

Batches = Tensor | Iterable[Any]


def gathered(calibration: Batches | None, samples: int) -> Tensor | None:
    """Return the first ``samples`` calibration inputs as one tensor on the CPU, all checked."""
    if calibration is None:
        return None
    batches: list[Tensor] = []
    missing = samples
    for index, batch in enumerate([calibration] if isinstance(calibration, Tensor) else calibration):
        first = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(first, Tensor) or first.ndim < 2:
            kind = f"a tensor {tuple(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
            raise DataError(
                f"calibration: batch {index} is {kind}; expected a tensor [N, ...], or a tuple with it first."
            )
        if batches and first.shape[1:] != batches[0].shape[1:]:
            raise DataError(
                f"calibration: batch {index} has inputs of {extents(first[0])}, those before {extents(batches[0][0])}."
            )
        batches.append(first[:missing].detach().cpu())
        missing -= len(batches[-1])
        if missing <= 0:
            break
    if not sum(map(len, batches)):
        raise DataError("calibration: it holds no input; an iterator that was read before is empty.")
    inputs = torch.cat(batches)
    if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
        raise DataError("calibration: an input holds NaN or infinity.")
    return inputs


def traced_order(network: nn.Module, example: Tensor | None, title: str) -> ExecutionOrder:
    """Return the layers in execution order, or as registered where nothing says what the inputs look like.

    Raises:
        ModelError: the network does not run on such inputs.
    """
    if example is None:
        return ExecutionOrder(tuple(site.name for site in find_layers(network).layers), ())
    traced = shallow_copy(network, own=True)
    with torch.no_grad():
        run_network(traced, example, title)
    return execution_order(traced, example)


def preprocessing_of(
    input_shape: tuple[int, ...], mean: Sequence[float] | None, std: Sequence[float] | None
) -> Preprocessing:
    """Return how images of a shape are normalised. Raises ``SpecError`` where mean or std do not fit it."""
    channels, height, width = input_shape
    values = [
        tuple(values) if values is not None else for_channels(default, channels)
        for values, default in ((mean, IMAGENET_MEAN), (std, IMAGENET_STD))
    ]
    if not len(values[0]) == len(values[1]) == channels:
        raise SpecError(
            f"mean and std have {len(values[0])} and {len(values[1])} values; expected {channels}, one a channel."
        )
    return Preprocessing(size=(height, width), resize=None, mean=values[0], std=values[1])


def chunked(inputs: Tensor, batch_size: int) -> list[Tensor]:
    """Return the inputs in the chunks that a job's gang would share."""
    images = CalibrationSpec(data="", samples=len(inputs), batch_size=batch_size)
    return [inputs[start:stop] for start, stop in chunks_of(images)]


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return ``sha256:<hex>`` over names, dtypes, shapes and values, in order."""
    hasher = hashlib.sha256()
    for key, tensor in tensors:
        hasher.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{hasher.hexdigest()}"
