"""``make demo``: the whole way on this machine, from a trained model to a device that runs part-bit, upgrades and
goes back.

Without weights it trains a small CNN on the handwritten digits that scikit-learn ships; with them it runs the same
job on those.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from torch import nn

from jobs.cli import console
from jobs.cli.main import run
from jobs.cli.options import console as new_console
from jobs.cli.terminal import title
from jobs.driver import run_job
from jobs.errors import SpecError
from jobs.executors import open_executor
from jobs.result import JobResult
from jobs.spec.document import parse_yaml
from jobs.spec.file import parse_spec
from jobs.spec.job import JobSpec
from workers.inputs import networks
from workers.inputs.checkpoint import save_state
from workers.inputs.tensors import TensorReader
from workers.tasks import TensorSource

FOLDER = Path(".demo")
ARCH, KWARGS = "test_resnet", {"num_classes": 10, "in_chans": 1}
SIDE = 32
EPOCHS = 12
SEED = 0


def main() -> None:
    """Run the demo as the make target asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--weights", "--library", "--model", "--data", "--calibration"):
        parser.add_argument(name, default="")
    parser.add_argument("--bits", default="[8,4]")
    run(lambda: _demo(parser.parse_args()), as_json=False)


def _demo(arguments: argparse.Namespace) -> None:
    out = new_console()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    bits = parse_yaml(arguments.bits, "--bits")
    document = _given(arguments, bits) if arguments.weights else _trained(out, bits)
    path = FOLDER / "spec.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    spec = parse_spec(document, where=str(path))
    out.print()
    out.print(title(f"nestquant quantize {path}", f"   (local Ray, the folder {spec.store.uri} as the store)"))
    with console.listener(quiet=False) as listen, open_executor(spec.cluster, local=False) as executor:
        result = run_job(spec, executor, listen)
    console.print_result(result)
    _device_session(out, spec, result)


def _given(arguments: argparse.Namespace, bits: list[int]) -> dict[str, Any]:
    metadata = (
        TensorReader(TensorSource(None, arguments.weights)).metadata
        if arguments.weights.endswith(".safetensors")
        else {}
    )
    arch = arguments.model or metadata.get("arch", "")
    if not arch or not arguments.data:
        raise SpecError(
            "make demo WEIGHTS=...: MODEL=... (the architecture's name) and DATA=... (labelled images) are needed too."
        )
    document = _document(
        Path(arguments.weights).stem, bits, data=arguments.data, calibration=arguments.calibration or arguments.data
    )
    document["model"] = {"library": arguments.library, "arch": arch, "checkpoint": arguments.weights}
    return document


def _document(name: str, bits: list[int], *, data: str, calibration: str) -> dict[str, Any]:
    return {
        "name": name.lower(),
        "model": {},
        "quantize": {"bits": bits, "activations": {"bits": 8}},
        "calibration": {"data": calibration, "samples": 256},
        "evaluate": {"data": data},
        "store": {"uri": str(FOLDER / "store")},
    }


def _trained(out: Console, bits: list[int]) -> dict[str, Any]:
    """Train the small CNN, write weights and images, and return a spec for them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.target))
    pixels = np.repeat(np.repeat((digits.images * 255 / 16).astype(np.uint8), SIDE // 8, axis=1), SIDE // 8, axis=2)[
        order
    ]
    labels = digits.target[order].astype(np.int64)
    train, test = slice(0, 1000), slice(1000, None)
    np.savez(FOLDER / "train.npz", x=pixels[train], y=labels[train])
    np.savez(FOLDER / "test.npz", x=pixels[test], y=labels[test])
    out.print(f"training timm {ARCH} on {len(pixels[train])} of scikit-learn's 8x8 digits, {EPOCHS} epochs ...")
    network = _train(pixels[train], labels[train])
    save_state(network.state_dict(), FOLDER / "weights.safetensors")
    document = _document("digits", bits, data=str(FOLDER / "test.npz"), calibration=str(FOLDER / "train.npz"))
    document["model"] = {
        "library": "timm",
        "arch": ARCH,
        "kwargs": KWARGS,
        "checkpoint": str(FOLDER / "weights.safetensors"),
    }
    document["preprocess"] = {"size": SIDE, "mean": [0.5], "std": [0.5]}
    return document


def _train(pixels: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> nn.Module:
    torch.manual_seed(SEED)
    network = networks.build("timm", ARCH, KWARGS)
    inputs = torch.from_numpy(pixels).float().div_(255).sub_(0.5).div_(0.5)[:, None]
    targets = torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    steps = EPOCHS * (len(targets) // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    network.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(targets))
        for rows in torch.split(order, 50):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(inputs[rows]), targets[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return network.eval()


def _device_session(out: Console, spec: JobSpec, result: JobResult) -> None:
    """Do what a device does, with the commands a person would type."""
    from jobs.cli.main import app

    store, cache = spec.store.uri, str(FOLDER / "device")
    common = ["--cache", cache]
    for words in (
        ["pull", result.name, "--store", store, "--allow-unsigned", *common],
        ["upgrade", result.name, "--store", store, *common],
        ["verify", result.name, *common],
        ["downgrade", result.name, *common],
    ):
        out.print()
        out.print(title(f"nestquant {' '.join(words)}"))
        app(words, standalone_mode=False)
    out.print(
        f"\nThe version is in {store}, the spec in {FOLDER / 'spec.yaml'}. "
        f"Try: nestquant inspect {result.name} --store {store}"
    )


if __name__ == "__main__":
    main()
