"""What one forward pass needs in memory, found on the meta device: every tensor is followed from the operation that
makes it to the moment it is freed, and nothing is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Footprint(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's metaclass
    """Counts the bytes that operations run within it hold at once; ``peak_bytes`` is the most so far.

    Tensors that were there before (parameters, the input) do not count. An operation counts with what it makes and
    once more with what it reads and makes, since CPU kernels lay both out anew (convolutions in oneDNN's blocked
    layout, matrix products as contiguous copies).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live: dict[int, int] = {}
        self._inputs: dict[int, torch.UntypedStorage] = {}  # kept, so that no new one takes over an identity
        self._held_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count."""
        sources = list(_storages((args, kwargs)))
        for storage in sources:
            if id(storage) not in self._live:
                self._inputs[id(storage)] = storage
        result = func(*args, **(kwargs or {}))
        results = [one for one in _storages(result) if id(one) not in self._live and id(one) not in self._inputs]
        for storage in results:
            self._follow(storage)
        # A view makes nothing, and an operation in place needs no second copy.
        scratch = sum(one.nbytes() for one in [*results, *sources] if id(one) in self._live) if results else 0
        self.peak_bytes = max(self.peak_bytes, self._held_bytes + scratch)
        return result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._live.clear()
        self._inputs.clear()

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._live[key] = size
        self._held_bytes += size
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self._held_bytes -= self._live.pop(key, 0)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    identities: set[int] = set()
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.layout is torch.strided:
            storage = value.untyped_storage()
            if id(storage) not in identities:
                identities.add(id(storage))
                yield storage
