"""A nested network's weights at one level as floats, under the names of the float network's own state dict."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestquant.modules import NestedLayer
from workers.errors import ArtifactError
from workers.inputs import networks
from workers.runtime import NestedModel

_TOLERANCE = 1e-3
"""Of the largest answer: adding a bias before a mean is taken away rounds otherwise than taking both away at once."""


def float_network(model: NestedModel, input_shape: tuple[int, int, int]) -> nn.Module:
    """Return the float network with the weights and biases that ``model`` runs with at its level now.

    A level may add a bias to a layer that has none of its own; it goes into the mean of the normalization that reads
    the layer's output. Activations are not quantized.

    Args:
        model: the nested network.
        input_shape: channels, height and width of an input, to follow one through the network.

    Raises:
        ArtifactError: a parameter has no weight, a bias has nowhere to go, or both networks answer differently.
    """
    record, where = model.manifest.model, f"{model.manifest.name} version {model.manifest.version}"
    network = networks.build(record.library, record.arch, record.kwargs)
    example = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    readers, answer = _followed(model.network, example)
    own = network.state_dict()
    state = {name: tensor.clone() for name, tensor in model.network.state_dict().items() if name in own}
    for layer, nested in model.layers():
        state[layer.parameter] = getattr(nested, nested.parameter).detach()
        bias = nested.bias if nested.parameter == "weight" else None
        if not isinstance(bias, Tensor):
            continue
        key, mean = f"{layer.name}.bias", f"{readers.get(layer.name)}.running_mean"
        if key in own:
            state[key] = bias.detach()
        elif mean in state:
            state[mean] = state[mean] - bias.detach()
        else:
            raise ArtifactError(f"{where}: layer {layer.name!r} has a bias at this level, {record.arch} none for it.")
    _, unexpected = network.load_state_dict(state, strict=False)
    if unexpected:
        raise ArtifactError(f"{where}: {len(unexpected)} parameters too many, {unexpected[0]!r} first.")
    _, float_answer = _followed(network, example)
    if not torch.allclose(float_answer, answer, rtol=0, atol=_TOLERANCE * float(answer.abs().max())):
        raise ArtifactError(f"{where}: {record.arch} as floats answers differently; it cannot be told without nesting.")
    return network


def _followed(network: nn.Module, example: Tensor) -> tuple[dict[str, str], Tensor]:
    """Return, by nested layer, the normalization that reads its output, and the network's answer to an input."""
    outputs: dict[int, tuple[str, Tensor]] = {}
    readers: dict[str, str] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def heard(_: nn.Module, args: tuple[object, ...], output: object) -> None:
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and args and id(args[0]) in outputs:
                readers[outputs[id(args[0])][0]] = name
            if isinstance(module, NestedLayer) and isinstance(output, Tensor):
                outputs[id(output)] = name, output  # held, so that no other tensor takes its identity

        return module.register_forward_hook(heard)

    handles = [watch(name, module) for name, module in network.named_modules()]
    try:
        with torch.inference_mode():
            answer = network(example)
    finally:
        for handle in handles:
            handle.remove()
    return readers, answer
