"""NestQuant: quantize a network once, and run it part-bit or full-bit.

``nestquant.quantize(model)`` nests the weights of any ``nn.Module`` in memory; ``load`` and ``pull`` return what was
saved or published. Importing this imports nothing else: names are looked up when they are first used (PEP 562), and
``nestquant.quantize`` alone needs the extra ``service``.

The modules of this package are the method: pure functions on tensors, and the modules that run part-bit or full-bit;
`config` and `packing` need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.api.loading import load, pull
    from jobs.api.model import NestedModel
    from jobs.api.quantization import quantize

__all__ = ["NestedModel", "load", "pull", "quantize"]

_HOMES = {
    "NestedModel": "jobs.api.model",
    "load": "jobs.api.loading",
    "pull": "jobs.api.loading",
    "quantize": "jobs.api.quantization",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nestquant' has no attribute {name!r}")
    from nestquant._shadows import check_packages

    check_packages()
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
