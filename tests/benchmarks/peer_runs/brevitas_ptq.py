"""AMD's Brevitas: error feedback (``gptq``) by the functions of its own ImageNet example.

Weights alone, per channel, the same bits in every layer: BatchNorm folded, layers equalized (``settings["equalize"]``
passes, 20 in the example's best configurations), ranges by squared error, rounding with error feedback in the order of
the inputs' energy, bias correction. ``gptq`` is symmetric, ``gptq-asym`` has zero points, ``gptq-plain`` has them and
no equalization.
"""

from __future__ import annotations

import torch
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas_examples.imagenet_classification.ptq.ptq_common import (
    apply_bias_correction,
    apply_gptq,
    calibrate,
    quantize_model,
)
from torch import nn

from tests.benchmarks.peer_runs.row import Task, main


def quantize(task: Task, network: nn.Module) -> nn.Module:
    settings = task.settings
    images = [(batch, torch.zeros(len(batch))) for batch in task.batches(settings["batch"])]
    prepared = preprocess_for_quantize(
        network, equalize_iters=settings["equalize"], equalize_merge_bias=settings["equalize"] > 0, merge_bn=True
    )
    quantized = quantize_model(
        prepared,
        backend="layerwise",
        weight_bit_width=task.bits,
        layerwise_first_last_bit_width=task.bits,
        act_bit_width=None,
        bias_bit_width=None,
        weight_quant_granularity="per_channel",
        weight_quant_type=settings["grid"],
        weight_param_method=settings["range"],
        act_quant_percentile=None,
        act_quant_type="asym",
        scale_factor_type="float_scale",
        quant_format="int",
    ).eval()
    with torch.no_grad():
        quantized(images[0][0])
    calibrate(images, quantized)
    apply_gptq(images, quantized, act_order=True)
    apply_bias_correction(images, quantized)
    return quantized


if __name__ == "__main__":
    main("brevitas", quantize)
