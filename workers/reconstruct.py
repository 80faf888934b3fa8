"""The recipe ``calibrated`` on workers: members of a gang that walk through a network layer by layer together.

Each member holds some chunks of the calibration images, halted in mid-forward before the layer that is to be solved
(``workers.lanes``). A chunk's moments depend on its images and the layers before alone, and chunks are added in their
order, so any number of members gives the same integers on one kind of machine (``docs/accuracy.md`` says what another
kind may change). A member that is lost is made anew: it walks through the solved layers again without moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nestquant.engines.images import Preprocessing
from nestquant.moments import Moments
from storage.manifest import Record
from storage.registry import Registry
from storage.stores.uri import open_store
from workers.forward import network_boundary
from workers.inputs.checkpoint import open_network
from workers.inputs.images import fetch_images
from workers.inputs.tensors import open_tensors
from workers.lanes import Lanes, Probed, Walk
from workers.layer_moments import layer_moments, solve_layer
from workers.ledger import Ledger
from workers.quantize import read_piece
from workers.scratch import scratch
from workers.solutions import MEDIA_TYPE_SOLUTION, SolvedRecord, read_solution, save_solution
from workers.tasks import PieceTask, TaskContext
from workers.threads import threads

Arrays = Mapping[str, npt.NDArray[np.float64]]


class MemberTask(Record):
    """What one member of the gang holds.

    ``layers``: all that are solved, each as a piece of all its output channels; ``PieceTask.solution`` is a layer's
    place among them. ``chunks``: start and stop of each of its chunks among the ``samples`` images taken of the set.
    """

    context: TaskContext
    layers: tuple[PieceTask, ...]
    level_count: int
    data: str
    samples: int
    chunks: tuple[tuple[int, int], ...]


class Begun(Record):
    """What a member found: the layers that run in lanes, in the order of their calls, and why some of these or others
    cannot be solved by their inputs: (layer, reason); its images.
    """

    laned: tuple[int, ...]
    without: tuple[tuple[int, str], ...]
    samples: int
    skipped: tuple[tuple[str, str], ...]


class Member:
    """One member of the gang; ``begin`` first, then layer after layer."""

    def __init__(self, task: MemberTask) -> None:
        self.task = task
        self.registry = Registry(open_store(task.context.store_uri))
        self._source = task.context.network.source
        self._lanes: Lanes | None = None
        self._walks: list[Walk | None] = []
        self._applied: set[int] = set()
        self._laned: set[int] = set()
        self._probed = Probed(())

    def begin(self) -> Begun:
        """Load the network and the images.

        Raises:
            WorkError: the checkpoint or the image set cannot be read; the network does not run, or its activations are
                not finite.
        """
        task = self.task
        network = open_network(task.context.network)
        preprocessing = Preprocessing.from_record(task.context.network.preprocessing)
        lanes = self._lanes = Lanes(network, [piece.layer for piece in task.layers], task.level_count)
        with scratch("reconstruct") as folder, threads(1):
            size = (1, *preprocessing.input_shape)
            noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
            probed = lanes.probe(noise, task.context.network.title)
            images = fetch_images(task.data, folder).sample(task.samples)
            samples = 0
            for start, stop in task.chunks:
                batches = images.batches(preprocessing, batch_size=stop - start, start=start, stop=stop)
                batch = next((inputs for inputs, _ in batches), None)
                samples += 0 if batch is None else len(batch)
                self._walks.append(None if batch is None else lanes.start(batch))
        index = {piece.layer: at for at, piece in enumerate(task.layers)}
        laned = tuple(index[name] for name in probed.laned)
        self._laned, self._probed = set(laned), probed
        without = {index[name]: reason for name, reason in probed.unsplit.items()}
        for name in probed.unsplit:
            lanes.leave(name)
        for at in laned:
            reason = probed.unreadable.get(task.layers[at].layer)
            if reason is not None:
                without[at] = reason
        return Begun(
            laned=laned, without=tuple(sorted(without.items())), samples=samples, skipped=tuple(images.skipped)
        )

    def moments(self, layer: int, chunk: int, solved: tuple[int, ...]) -> Arrays | None:
        """Return the moments of a layer's inputs over one of the member's chunks, for each level of the network.

        Args:
            layer: the layer's place in ``MemberTask.layers``.
            chunk: the chunk's place in ``MemberTask.chunks``.
            solved: the layers solved so far.

        None where the layer is not called, or no image of the chunk could be read.

        Raises:
            WorkError: an input is NaN or infinite; the message names the layer.
            ModelError: the network does not run on the images.
        """
        walk = self._walks[chunk]
        if walk is None:
            return None
        assert self._lanes is not None
        self._apply(solved)
        piece = self.task.layers[layer]
        network = self._lanes.network
        first, last = self.task.chunks[chunk]
        what = f"{self.task.context.network.title} cannot run on calibration images {first} to {last - 1}"
        with threads(1), torch.inference_mode(), network_boundary(network, what):
            levels = layer_moments(walk, piece.layer, range(self.task.level_count))
        arrays: dict[str, npt.NDArray[np.float64]] = {}
        for level, moments in enumerate(levels):
            arrays |= {f"{level}/{name}": tensor.numpy() for name, tensor in _fields(moments)}
        return arrays or None

    def solve(
        self,
        layer: int,
        samples: int,
        skipped: tuple[tuple[str, str], ...],
        without: str | None,
        parts: Iterable[Arrays | None],
    ) -> SolvedRecord:
        """Add the chunks' moments up in order, choose the layer's integers and biases, and store them.

        Without moments the layer is rounded without data; ``without`` is the reason where it is known before.

        Raises:
            WorkError: naming the layer, where its weights cannot be quantized or its moments are not finite.
        """
        piece, job = self.task.layers[layer], self.task.context.job
        weight = read_piece(open_tensors(self._source), piece)
        levels = _merged(parts, self.task.level_count, piece.config.level_count)
        quantized = solve_layer(piece, weight, levels, self._probed)
        record = SolvedRecord(
            layer=piece.layer,
            descriptor=self.registry.put_blob(save_solution(quantized), MEDIA_TYPE_SOLUTION),
            biases=quantized.biases is not None,
            samples=samples,
            skipped=skipped,
            without=None if levels else without or "it was not called on any calibration image",
        )
        ledger = Ledger(self.registry, job)
        ledger.keep(ledger.solved_key(layer), record)
        return record

    def close(self) -> None:
        """End the forwards where they stand."""
        for walk in self._walks:
            if walk is not None:
                walk.close()

    def _apply(self, solved: tuple[int, ...]) -> None:
        assert self._lanes is not None
        for at in solved:
            if at in self._laned and at not in self._applied:
                piece = self.task.layers[at]
                weight = read_solution(self.registry, self.task.context.job, piece)
                self._lanes.apply(piece.layer, weight)
                self._applied.add(at)


def chosen_levels(level_count: int, own_levels: int) -> list[int]:
    """Return at which of the network's levels each of a layer's own is solved.

    A layer with fewer levels than the network has its last one in all the network's further levels, and the last of
    those, full-bit, is what it is made for.
    """
    return [*range(own_levels - 1), level_count - 1]


def _merged(parts: Iterable[Arrays | None], level_count: int, own_levels: int) -> list[Moments]:
    """Return the moments for each of the layer's levels, chunks added in order."""
    chosen = chosen_levels(level_count, own_levels)
    totals: list[Moments] = []
    for part in parts:
        if part is None:
            continue
        for at, level in enumerate(chosen):
            fields = {name: torch.from_numpy(part[f"{level}/{name}"].copy()) for name in ("x", "y", "xy", "yy")}
            moments = Moments(count=int(part[f"{level}/count"][0]), **fields)
            if at < len(totals):
                totals[at] = Moments.merge([totals[at], moments])
            else:
                totals.append(moments)
    return totals


def _fields(moments: Moments) -> list[tuple[str, Tensor]]:
    return [
        ("count", torch.tensor([moments.count], dtype=torch.float64)),
        ("x", moments.x),
        ("y", moments.y),
        ("xy", moments.xy),
        ("yy", moments.yy),
    ]
