"""Linear maps with a layer's weight that are made without calling the layer.

BEiT, EVA and Swin V2 keep query, key and value in one ``nn.Linear`` and call ``linear(x, self.qkv.weight, bias)`` with
a bias of their own making. ``nn.MultiheadAttention`` hands its two weights to one function, which is taken apart here:
projections first, then attention proper, then the projection of its output. A ``TorchFunctionMode`` around the
network's forward sees these calls (and keeps torch from its fused path, which shows nothing).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_ATTENTION = inspect.signature(functional.multi_head_attention_forward)

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
        if func is functional.multi_head_attention_forward:
            values = _ATTENTION.bind(*args, **kwargs).arguments
            weights = (values["in_proj_weight"], values["out_proj_weight"])
            if values["query"].dim() == 3 and any(id(weight) in self._names for weight in weights):
                return self._attention(values)
        return func(*args, **kwargs)

    def _attention(self, values: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Run attention ``[length, images, width]`` with projections of its own replaced by none."""
        query, key, value = (values[name].transpose(0, 1) for name in ("query", "key", "value"))
        width, weight, bias = query.shape[-1], values["in_proj_weight"], values["in_proj_bias"]
        if weight is not None:
            if values["query"] is values["key"] and values["key"] is values["value"]:
                projected = self._product(query, weight, bias).chunk(3, dim=-1)
            else:  # one call with all that goes in; of each stretch of it one third is used
                stretches = [tokens.shape[1] for tokens in (query, key, value)]
                product = self._product(torch.cat([query, key, value], dim=1), weight, bias)
                parts = torch.split(product, stretches, dim=1)
                projected = tuple(part.chunk(3, dim=-1)[at] for at, part in enumerate(parts))
            unit = torch.eye(width, dtype=weight.dtype, device=weight.device)
            values |= dict(zip(("query", "key", "value"), (part.transpose(0, 1) for part in projected), strict=True))
            values |= {"in_proj_weight": unit.repeat(3, 1), "in_proj_bias": None}
        output = values["out_proj_weight"], values["out_proj_bias"]
        values |= {"out_proj_weight": torch.eye(width, dtype=query.dtype, device=query.device), "out_proj_bias": None}
        attended, shares = functional.multi_head_attention_forward(**values)
        return self._product(attended.transpose(0, 1), *output).transpose(0, 1), shares

    def _product(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        name = self._names.get(id(weight))
        return functional.linear(inputs, weight, bias) if name is None else self._linear(name, inputs, weight, bias)
