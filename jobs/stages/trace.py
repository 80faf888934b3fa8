"""What a network's forward tells without data, on the meta device: the order of its layers, its memory, its classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from jobs.errors import PlanError
from jobs.spec.model import ModelSpec
from nestquant.engines.images import Preprocessing
from nestquant.surgery import execution_order, find_layers
from workers.errors import one_line
from workers.footprint import Footprint
from workers.forward import classes_of, input_fault
from workers.inputs import networks
from workers.inputs.entry import LIBRARY

_UNTRACED_INPUTS = 128
"""Inputs that a network holds at once, at most, where it cannot be traced: VGG, the worst of the classics, holds 75."""


@dataclass(frozen=True)
class Trace:
    """What a forward pass without data tells.

    ``order``: layers as they run. ``activation_bytes``: what one forward pass holds at once for each image, input and
    weights left out. ``classes``: how many the network tells apart; None where that is not known, or where it tells
    none, as ``no_classes`` says. ``ran``: False where only data can tell whether it runs. ``fault``: why it cannot run
    on one image, whatever the data.
    """

    order: tuple[str, ...]
    activation_bytes: int
    notes: tuple[str, ...] = ()
    classes: int | None = None
    no_classes: str = ""
    ran: bool = True
    fault: str = ""


def trace_forward(spec: ModelSpec, network: nn.Module, preprocessing: Preprocessing) -> Trace:
    """Trace a network's forward without computing anything; some networks do not run on the meta device, and are listed
    as registered.

    Raises:
        PlanError: it runs on the inputs that its library states, but not on those that the spec asks for.
    """
    shape = preprocessing.input_shape
    example = torch.zeros(1, *shape, device="meta")
    fault = input_fault(network)
    footprint, answers = Footprint(), list[Any]()
    handle = network.register_forward_hook(lambda _, __, answer: answers.append(answer))
    try:
        with footprint:
            traced = execution_order(network, example)
    except Exception as error:  # whatever the network's forward raises
        own = spec.library == LIBRARY
        stated = shape if own else networks.default_preprocessing(spec.library, network, spec.kwargs).input_shape
        if stated != shape and _runs(network, stated):
            sides = " x ".join(map(str, shape))
            raise PlanError(
                f"preprocess: {spec.library} {spec.arch} does not run on inputs of {sides} ({one_line(error)}), but on "
                f"{' x '.join(map(str, stated))}; leave preprocess.size, mean and std out, or set model.kwargs."
            ) from error
        order = tuple(site.name for site in find_layers(network).layers)
        guessed = max(footprint.peak_bytes, _UNTRACED_INPUTS * example.nbytes)
        text = (
            f"{spec.arch} does not run without data ({fault or type(error).__name__}): its layers stand as registered."
        )
        return Trace(order, guessed, (text,), ran=False, fault=fault)
    finally:
        handle.remove()
    notes = (
        ()
        if not traced.never_ran
        else (f"{len(traced.never_ran)} layers never ran and stand last: {', '.join(traced.never_ran[:3])}.",)
    )
    return Trace(traced.names, footprint.peak_bytes, notes, *classes_of(network, answers[-1]))


def _runs(network: nn.Module, shape: tuple[int, int, int]) -> bool:
    try:
        with torch.no_grad():
            network(torch.zeros(1, *shape, device="meta"))
    except Exception:  # as above
        return False
    return True
