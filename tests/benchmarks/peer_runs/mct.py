"""Sony's model-compression-toolkit: post-training quantization (``ptq``) and its learned rounding (``gradient``).

Weights alone, per channel, the same bits in every layer: a target platform of our own says so, as its documentation
does it. ``ptq``: ranges by least squared error and bias correction, its defaults, symmetric; ``ptq-uniform`` has zero
points. ``gradient``, which it calls GPTQ: on top of ``ptq`` learned rounding and biases, all layers weighted alike, its
default optimizers, ``settings["epochs"]`` passes over the calibration images.
"""

from __future__ import annotations

from collections.abc import Iterator

import model_compression_toolkit as mct
import torch
from mct_quantizers import QuantizationMethod
from model_compression_toolkit.target_platform_capabilities.constants import BIAS_ATTR, KERNEL_ATTR
from model_compression_toolkit.target_platform_capabilities.schema import mct_current_schema as schema
from torch import nn

from tests.benchmarks.peer_runs.row import Task, main


def platform(bits: int, method: QuantizationMethod) -> schema.TargetPlatformCapabilities:
    """Return a target with ``bits``-bit kernels per channel, float biases and float activations."""
    untouched = schema.AttributeQuantizationConfig(enable_weights_quantization=False)
    kernel = schema.AttributeQuantizationConfig(
        weights_quantization_method=method,
        weights_n_bits=bits,
        weights_per_channel_threshold=True,
        enable_weights_quantization=True,
    )
    plain = schema.OpQuantizationConfig(
        default_weight_attr_config=untouched,
        attr_weights_configs_mapping={},
        activation_quantization_method=QuantizationMethod.UNIFORM,
        activation_n_bits=8,
        supported_input_activation_n_bits=8,
        enable_activation_quantization=False,
        quantization_preserving=False,
        signedness=schema.Signedness.AUTO,
    )
    product = plain.clone_and_edit(attr_weights_configs_mapping={KERNEL_ATTR: kernel, BIAS_ATTR: untouched})
    options = schema.QuantizationConfigOptions(quantization_configurations=(product,), base_config=product)
    names = (
        schema.OperatorSetNames.CONV,
        schema.OperatorSetNames.DEPTHWISE_CONV,
        schema.OperatorSetNames.FULLY_CONNECTED,
    )
    return schema.TargetPlatformCapabilities(
        default_qco=schema.QuantizationConfigOptions(quantization_configurations=(plain,)),
        tpc_minor_version=1,
        tpc_patch_version=0,
        tpc_platform_type="weights_only",
        operator_set=tuple(schema.OperatorsSet(name=name, qc_options=options) for name in names),
        fusing_patterns=(),
        add_metadata=False,
        name=f"w{bits}",
    )


def quantize(task: Task, network: nn.Module) -> nn.Module:
    # pytorchcv calls its classifier "output", which the reader takes for the output of the traced graph.
    network = nn.Sequential(network)
    batches = task.batches(task.settings["batch"])

    def representative() -> Iterator[list[torch.Tensor]]:
        for batch in batches:
            yield [batch]

    method = QuantizationMethod[task.settings["grid"].upper()]
    core = mct.core.CoreConfig(quantization_config=mct.core.QuantizationConfig())
    target = platform(task.bits, method)
    if task.recipe.startswith("ptq"):
        quantized, _ = mct.ptq.pytorch_post_training_quantization(
            network, representative, core_config=core, target_platform_capabilities=target
        )
        return quantized
    learned = mct.gptq.get_pytorch_gptq_config(
        n_epochs=task.settings["epochs"],
        use_hessian_based_weights=False,  # its default takes 100 backward passes over every image first
        use_hessian_sample_attention=False,
        gradual_activation_quantization=False,
    )
    quantized, _ = mct.gptq.pytorch_gradient_post_training_quantization(
        network, representative, core_config=core, gptq_config=learned, target_platform_capabilities=target
    )
    return quantized


if __name__ == "__main__":
    main("model-compression-toolkit", quantize)
