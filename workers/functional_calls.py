"""Linear layers whose weight another module multiplies by, without calling them.

BEiT, EVA and Swin V2 keep query, key and value in one ``nn.Linear`` and call ``linear(x, self.qkv.weight, bias)`` with
a bias of their own making. A ``TorchFunctionMode`` around the network's forward sees these calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Linear = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]


class FunctionalCalls(TorchFunctionMode):
    """Hands every ``linear`` with one of the weights on: ``linear(name, inputs, weight, bias)`` gives its result.

    ``names``: by identity of the weight, which must live as long as this.
    """

    def __init__(self, names: Mapping[int, str], linear: Linear) -> None:
        super().__init__()
        self._names, self._linear = names, linear

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            options = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            name = self._names.get(id(options["weight"]))
            if name is not None:
                return self._linear(name, options["input"], options["weight"], options.get("bias"))
        return func(*args, **kwargs)
