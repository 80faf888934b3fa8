"""OpenVINO's NNCF: ``compress_weights``, data-free, symmetric, per channel; at 4 bits all layers are asked for."""

from __future__ import annotations

import nncf
from torch import nn

from tests.benchmarks.peer_runs.row import Task, main


def quantize(task: Task, network: nn.Module) -> nn.Module:
    dataset = nncf.Dataset(task.batches(1)[:1])
    if task.bits == 8:
        return nncf.compress_weights(network, mode=nncf.CompressWeightsMode.INT8_SYM, dataset=dataset)
    return nncf.compress_weights(
        network, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=-1, all_layers=True, dataset=dataset
    )


if __name__ == "__main__":
    main("nncf", quantize)
