"""A forward of one image, tried before work: what tells whether a network runs that does not run without data."""

from __future__ import annotations

import torch

from nestquant.engines.images import Preprocessing
from storage.manifest import Record
from workers.errors import ModelError
from workers.forward import classes_of, extents, network_boundary
from workers.inputs.checkpoint import open_network
from workers.tasks import NetworkRef


class TrialTask(Record):
    """Run a network once."""

    network: NetworkRef


class Trial(Record):
    """What came of it: ``classes`` and ``no_classes`` as in `workers.forward.classes_of`; ``fault``, in one line, where
    the network did not run.
    """

    classes: int | None = None
    no_classes: str = ""
    fault: str = ""


@torch.inference_mode()
def try_forward(task: TrialTask) -> Trial:
    """Run the float network on one image of mean colour, of the shape that its preprocessing gives.

    Raises:
        WorkError, storage.StorageError: the network cannot be built, or its weights cannot be read.
    """
    network = open_network(task.network)
    image = torch.zeros(1, *Preprocessing.from_record(task.network.preprocessing).input_shape)
    try:
        with network_boundary(network, f"inputs of {extents(image)}"):
            answer = network(image)
    except ModelError as error:
        return Trial(fault=str(error).rstrip("."))
    classes, no_classes = classes_of(network, answer)
    return Trial(classes=classes, no_classes=no_classes)
