"""A bound on a network while it is built: what is described may be larger than anything that was meant."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from workers.errors import ModelError

MOST_TENSORS = 100_000
"""Parameters and buffers registered while a network is built; the largest of both libraries register a few thousand."""


@contextmanager
def bounded(arch: str, most_values: float = math.inf) -> Iterator[None]:
    """Raise ``ModelError`` as soon as a network that this thread builds registers more than so many values or tensors.

    Nothing is allocated for it on the meta device; what is counted are shapes (torch's registration hooks).
    """
    thread, values, tensors = threading.get_ident(), 0, 0

    def count(_: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal values, tensors
        if tensor is None or threading.get_ident() != thread:
            return
        values, tensors = values + tensor.numel(), tensors + 1
        if values > most_values or tensors > MOST_TENSORS:
            what = f"{values:,} values" if values > most_values else f"{tensors:,} tensors"
            most = f"{most_values:,.0f}" if values > most_values else f"{MOST_TENSORS:,}"
            raise ModelError(
                f"{arch} with these arguments has more than {what} (at {name!r}), at most {most} expected; "
                "check model.kwargs."
            )

    handles = [
        torch_modules.register_module_parameter_registration_hook(count),
        torch_modules.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
