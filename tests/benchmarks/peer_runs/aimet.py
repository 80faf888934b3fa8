"""Qualcomm's AIMET: nearest (``ptq``), sequential ranges (``seqmse``) and learned rounding (``adaround``).

Weights alone, per channel, symmetric, the same bits in every convolution and product. Each recipe folds BatchNorm first
and equalizes layers where ``settings["equalize"]`` says so. ``seqmse`` chooses ranges layer after layer by the error
of the outputs; ``adaround`` learns to round in ``settings["iterations"]`` steps a layer (15,000 are its default).
"""

from __future__ import annotations

import tempfile

import torch
from aimet_torch.adaround import Adaround, AdaroundParameters
from aimet_torch.batch_norm_fold import fold_all_batch_norms
from aimet_torch.common.defs import QuantScheme
from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
from aimet_torch.cross_layer_equalization import equalize_model
from aimet_torch.model_preparer import prepare_model
from aimet_torch.nn import BaseQuantizationMixin
from aimet_torch.quantsim import QuantizationSimModel
from aimet_torch.seq_mse import apply_seq_mse
from aimet_torch.utils import remove_activation_quantizers, remove_param_quantizers
from torch import nn
from torch.utils.data import DataLoader

from tests.benchmarks.peer_runs.row import Task, main

PRODUCTS = (nn.Conv2d, nn.Linear)


def quantize(task: Task, network: nn.Module) -> nn.Module:
    settings = task.settings
    batches = task.batches(settings["batch"])
    loader = DataLoader(batches, batch_size=None)
    one = batches[0][:1]
    shape = tuple(one.shape)
    prepared = prepare_model(network).eval()
    if settings["equalize"]:
        equalize_model(prepared, shape, dummy_input=one)
    else:
        fold_all_batch_norms(prepared, shape, dummy_input=one)
    scheme = QuantScheme[settings["range"]]
    if task.recipe == "adaround":
        return _learned(task, prepared, loader, one, scheme)
    sim = _simulated(prepared, one, scheme, task.bits)
    if task.recipe == "seqmse":
        apply_seq_mse(sim, loader, num_candidates=settings["candidates"])
    sim.compute_encodings(lambda model, _: model(one), None)
    return sim.model


def _simulated(prepared: nn.Module, one: torch.Tensor, scheme: QuantScheme, bits: int) -> QuantizationSimModel:
    """Return the network with weight quantizers in its convolutions and products, and no others."""
    sim = QuantizationSimModel(
        prepared,
        dummy_input=one,
        quant_scheme=scheme,
        default_param_bw=bits,
        config_file=get_path_for_per_channel_config(),
    )
    remove_activation_quantizers(sim.model)
    quantized = [module for module in sim.model.modules() if isinstance(module, BaseQuantizationMixin)]
    remove_param_quantizers([module for module in quantized if not isinstance(module, PRODUCTS)])
    return sim


def _learned(
    task: Task, prepared: nn.Module, loader: DataLoader[torch.Tensor], one: torch.Tensor, scheme: QuantScheme
) -> nn.Module:
    with tempfile.TemporaryDirectory(prefix="nestquant-adaround-") as folder:
        # What it returns is softly rounded, off the grid: as documented, the ranges that it wrote round the rest.
        learned = Adaround.apply_adaround(
            prepared,
            one,
            AdaroundParameters(loader, len(loader), default_num_iterations=task.settings["iterations"]),
            path=folder,
            filename_prefix="adaround",
            default_param_bw=task.bits,
            ignore_quant_ops_list=[module for module in prepared.modules() if isinstance(module, nn.LayerNorm)],
            default_quant_scheme=scheme,
            default_config_file=get_path_for_per_channel_config(),
        )
        sim = _simulated(learned, one, scheme, task.bits)
        sim.set_and_freeze_param_encodings(f"{folder}/adaround.encodings")
        return sim.model


if __name__ == "__main__":
    main("aimet-torch", quantize)
