"""Words that two packages use without knowing each other mean the same."""

from __future__ import annotations

from typing import get_args

import torch

import nestquant.config
import nestquant.surgery
import storage.manifest
from jobs.spec.job import check_bits


def test_the_method_and_the_store_name_the_same_schemes_and_layers() -> None:
    assert get_args(nestquant.config.Scheme) == get_args(storage.manifest.Scheme)
    assert get_args(nestquant.surgery.LayerKind) == get_args(storage.manifest.LayerKind)


def test_every_kind_of_layer_is_one_that_surgery_finds() -> None:
    modules = {
        "conv1d": torch.nn.Conv1d(2, 2, 1),
        "conv2d": torch.nn.Conv2d(2, 2, 1),
        "conv_transpose2d": torch.nn.ConvTranspose2d(2, 2, 1),
        "linear": torch.nn.Linear(2, 2),
    }
    assert tuple(modules) == get_args(nestquant.surgery.LayerKind)
    for kind, module in modules.items():
        (site,) = nestquant.surgery.find_layers(torch.nn.Sequential(module)).layers
        assert site.kind == kind


def test_the_spec_and_the_method_refuse_the_same_bits() -> None:
    for bits in ((), (9,), (8, 8), (4, 8), (8, 0), (8, 4, 4), (True,)):
        for check in (check_bits, nestquant.config.check_bits):
            try:
                check(bits)
            except ValueError:
                continue
            raise AssertionError(f"{check.__module__} took {bits}")
    assert check_bits((8, 6, 4)) == (8, 6, 4)
