"""torchao: weight-only integers per channel, as its ``quantize_`` does them, offered every layer that has a weight."""

from __future__ import annotations

import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_

from tests.benchmarks.peer_runs.row import Task, main


def quantize(task: Task, network: nn.Module) -> nn.Module:
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{task.bits}"), granularity=PerAxis(0))
    quantize_(network, config, filter_fn=lambda module, _: isinstance(module, (nn.Conv2d, nn.Linear)))
    return network


if __name__ == "__main__":
    main("torchao", quantize)
