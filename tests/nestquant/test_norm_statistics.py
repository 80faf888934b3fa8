"""BatchNorm statistics taken anew: exact sums, every layer's promise kept, the network left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nestquant.norm_statistics import NormSums, norm_layers, put_statistics, take_statistics
from nestquant.synthetic import synthetic_images
from workers.inputs.checkpoint import load_network
from workers.inputs.networks import IMAGENET_MEAN, IMAGENET_STD
from workers.tasks import TensorSource


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    """Two layers with statistics, of other inputs than any test's, and one that was never shown any."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    )
    for at in (1, 4):
        layer = layers[at]
        assert isinstance(layer, nn.BatchNorm2d)
        nn.init.normal_(layer.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(layer.running_var, 0.5, 2.0)  # type: ignore[arg-type]
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layers.eval()


def test_sums_of_parts_are_those_of_the_whole() -> None:
    inputs = random(6, 4, 5, 5) * 3 + 1
    whole, merged = NormSums.of(inputs), NormSums.merge([NormSums.of(part) for part in inputs.split(2)])
    assert whole.count == merged.count == 150
    for seen in (whole, merged):
        mean, variance = seen.statistics()
        flat = inputs.double().transpose(0, 1).flatten(1)
        assert torch.allclose(mean, flat.mean(dim=1), atol=1e-12)
        assert torch.allclose(variance, flat.var(dim=1, correction=0), atol=1e-12)


def test_with_statistics_of_its_inputs_every_layer_keeps_its_promise() -> None:
    layers, inputs = network(), random(16, 3, 12, 12) * 2 - 1
    before = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    found = take_statistics(layers, inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layers.state_dict().items())
    assert list(found) == ["1", "4"]
    put_statistics(layers, found)
    seen: dict[str, Tensor] = {}
    for name in ("1", "4"):
        layers.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        layers(inputs)
    for name, outputs in seen.items():
        layer = layers.get_submodule(name)
        assert isinstance(layer, nn.BatchNorm2d)
        assert torch.allclose(outputs.mean(dim=(0, 2, 3)), layer.bias, atol=1e-5)
        assert torch.allclose(outputs.std(dim=(0, 2, 3), correction=0), layer.weight.abs(), atol=1e-3)
    assert torch.equal(layers[5].running_mean, torch.zeros(6))  # type: ignore[arg-type]


def test_inputs_that_are_not_finite_name_the_layer_and_leave_the_network_alone() -> None:
    layers, inputs = network(), random(2, 3, 8, 8)
    before = layers[1].running_mean.clone()  # type: ignore[operator,union-attr]
    with torch.no_grad():
        layers[3].weight[0, 0, 0, 0] = float("inf")  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match="layer '4': its input holds NaN or infinity"):
        take_statistics(layers, inputs)
    assert torch.equal(layers[1].running_mean, before)  # type: ignore[arg-type]
    assert not layers[1]._forward_pre_hooks


def test_synthetic_images_come_closer_to_a_real_networks_statistics_than_noise(test_data: Path) -> None:
    source = TensorSource(None, str(test_data / "weights" / "fdmobilenet_wd2.safetensors"))
    real = load_network("pytorchcv", "fdmobilenet_wd2", {}, source)
    images = synthetic_images(8, 224, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    synthetic = ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    assert divergence(real, synthetic) < 0.4 * divergence(real, random(8, 3, 224, 224))
    put_statistics(real, take_statistics(real, synthetic))
    assert divergence(real, synthetic) < 1e-4


@torch.no_grad()
def divergence(layers: nn.Module, inputs: Tensor) -> float:
    """Mean over channels of the divergence (nats) of Gaussians: the statistics held and those of the layers' inputs."""
    found: list[Tensor] = []

    def compare(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        variance, mean = torch.var_mean(args[0], dim=(0, 2, 3), correction=0)
        held, seen = layer.running_var + layer.eps, variance + layer.eps
        found.append(((seen + (mean - layer.running_mean) ** 2) / held - 1 - (seen / held).log()).mean() / 2)

    handles = [layer.register_forward_pre_hook(compare) for layer in norm_layers(layers).values()]
    layers(inputs)
    for handle in handles:
        handle.remove()
    return float(torch.stack(found).mean())
