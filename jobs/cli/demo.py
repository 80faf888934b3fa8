"""``make demo``: the whole way on this machine, from a trained model to a device that runs part-bit, upgrades and
goes back.

EfficientNet-Lite0 with its ImageNet weights, on photographs (``jobs.cli.photographs``). Without that package, or with
``--toy``, it trains a small CNN on the handwritten digits that scikit-learn ships; with ``--weights`` it runs the same
job on those.
"""

from __future__ import annotations

import argparse
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import nn

from jobs.cli import console, photographs
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
from storage.device import Device
from storage.wording import size
from workers import runtime
from workers.inputs import networks
from workers.inputs.checkpoint import save_state
from workers.inputs.tensors import TensorReader
from workers.tasks import TensorSource

FOLDER = Path(".demo")
ARCH, KWARGS = "test_resnet", {"num_classes": 10, "in_chans": 1}
SIDE = 32
EPOCHS = 12
SEED = 0
SAMPLES = 32  # calibration images; 64 took half a minute longer


def main() -> None:
    """Run the demo as the make target asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--weights", "--library", "--model", "--data", "--calibration", "--photographs", "--toy"):
        parser.add_argument(name, default="")
    parser.add_argument("--bits", default="[8,4]")
    run(lambda: _demo(parser.parse_args()), as_json=False)


def _demo(arguments: argparse.Namespace) -> None:
    out = new_console()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    bits = parse_yaml(arguments.bits, "--bits")
    compared: Compared | None = None
    if arguments.weights:
        document = _document_of(arguments, bits)
    elif arguments.toy or _without_photographs(out):
        document = _trained(out, bits)
    else:
        with out.status("asking the float network about every view"):
            document, compared = _pretrained(out, bits, arguments.photographs)
    path = FOLDER / "spec.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    spec = parse_spec(document, where=str(path))
    out.print()
    out.print(title(f"nestquant quantize {path}", f"   (local Ray, the folder {spec.store.uri} as the store)"))
    with ExitStack() as stack:
        with out.status("starting Ray on this machine"):
            executor = stack.enter_context(open_executor(spec.cluster, local=False))
        listen = stack.enter_context(console.listener(quiet=False))
        result = run_job(spec, executor, listen)
    console.print_result(result)
    _device_session(out, spec, result, compared)


@dataclass(frozen=True)
class Compared:
    """Photographs by name, as uint8 [N, 224, 224, 3], with the float network's answers and probabilities."""

    names: list[str]
    pixels: photographs.Pixels
    classes: np.ndarray[Any, Any]
    probabilities: np.ndarray[Any, Any]


def _without_photographs(out: Console) -> bool:
    missing = photographs.missing()
    if missing:
        out.print(f"Not installed: {', '.join(missing)}; so a toy network instead of a real one.")
    return bool(missing)


def _pretrained(out: Console, bits: list[int], folder: str) -> tuple[dict[str, Any], Compared]:
    """Write weights, calibration images and images with the float network's answers; return a spec for them."""
    for package, count in photographs.downloaded():
        out.print(f"from the Python registry: {package}, {size(count)} unpacked")
    network = photographs.network()
    save_state(network.state_dict(), FOLDER / "weights.safetensors")
    paths = photographs.photographs(folder)
    images = [Image.open(path) for path in paths]
    held_out = np.stack([view for image in images for view in photographs.views(image)])
    labels, _ = photographs.answers(network, held_out)
    calibration = photographs.calibration_views()
    np.savez(FOLDER / "calibration.npz", x=calibration, y=photographs.answers(network, calibration)[0])
    np.savez(FOLDER / "photographs.npz", x=held_out, y=labels)
    whole = np.stack([photographs.whole(image) for image in images])
    weights = sum(value.numel() for value in network.parameters())
    out.print(
        f"timm {photographs.ARCH}, {weights:,} parameters, ImageNet weights; {len(held_out)} views of {len(paths)} "
        f"photographs ({', '.join(path.stem for path in paths)}) that calibration does not see.\n"
        "Their labels are the float network's own first answers: top-1 below is how often a quantized one agrees."
    )
    document = _document(
        "efficientnet-lite0",
        bits,
        data=str(FOLDER / "photographs.npz"),
        calibration=str(FOLDER / "calibration.npz"),
    )
    document["model"] = {
        "library": "timm",
        "arch": photographs.ARCH,
        "checkpoint": str(FOLDER / "weights.safetensors"),
    }
    document["calibration"]["samples"] = SAMPLES
    document["preprocess"] = photographs.PREPROCESS
    return document, Compared([path.stem for path in paths], whole, *photographs.answers(network, whole))


def _document_of(arguments: argparse.Namespace, bits: list[int]) -> dict[str, Any]:
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
    for _ in track(range(EPOCHS), description="training", console=new_console(stderr=True)):
        order = torch.randperm(len(targets))
        for rows in torch.split(order, 50):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(inputs[rows]), targets[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return network.eval()


def _device_session(out: Console, spec: JobSpec, result: JobResult, compared: Compared | None) -> None:
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
        if words[0] == "verify" and compared is not None:
            with out.status("running both modes on the photographs"):
                _picture(out, result.name, Path(cache), compared)
    moved = result.pull.level_bytes
    out.print(
        f"\nMoved to run part-bit: {size(moved[0])}; to switch to full-bit: {size(sum(moved[1:]))}; to switch "
        f"back: nothing. The float network is {size(result.sizes.float_bytes)}."
    )
    out.print(
        f"\nThe version is in {store}, the spec in {FOLDER / 'spec.yaml'}. "
        f"Try: nestquant inspect {result.name} --store {store}"
    )


def _picture(out: Console, name: str, cache: Path, compared: Compared) -> None:
    """Run what the device holds in both modes on whole photographs; write them with the answers as one picture."""
    device = Device(cache)
    model = runtime.load(device.manifest(name), device.blob_path)
    names = networks.imagenet_names()
    rows = [[f"float      {names[c]} {p:.0%}"] for c, p in zip(compared.classes, compared.probabilities, strict=True)]

    def run_mode(mode: str) -> None:
        for lines, c, p in zip(rows, *photographs.answers(model.network, compared.pixels), strict=True):
            lines.append(f"{mode:<10} {names[c]} {p:.0%}")

    run_mode("part-bit")
    begun = time.perf_counter()
    model.upgrade()
    seconds = time.perf_counter() - begun
    run_mode("full-bit")
    out.print(f"\nThe loaded model paged its low shards in within {1000 * seconds:.0f} ms.")
    for photograph, lines in zip(compared.names, rows, strict=True):
        out.print(title(photograph))
        for line in lines:
            out.print(f"    {line}", highlight=False)
    picture = FOLDER / "photographs.png"
    photographs.draw(picture, compared.pixels, rows)
    out.print(f"The same as a picture: {picture}")


if __name__ == "__main__":
    main()
