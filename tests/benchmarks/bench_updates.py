"""Updates by delta after real fine-tunes: bytes that a device moves, and top-1, beside what else a user might do.

    python -m tests.benchmarks.bench_updates DATA [NETWORK ...] [--recipe paper] [--recipe calibrated]

DATA: the folder of evaluation data. Each network is trained on for an epoch on its calibration images (whole at two
rates; the classifier alone for three), quantized as it was before, and published; a device at the first version pulls
the second one whole and by deltas. *patch-from*: zstd with the old stored blob as its dictionary, level 19; *patch of
canonical forms*: the same on decoded integers. Prints the rows of a table in Markdown.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zstandard
from PIL import Image
from safetensors.torch import load_file

import nestquant
from jobs.updates import paired, publish_deltas
from storage.delta import canonical_bytes
from storage.device import Device, StoreSource
from storage.manifest import Manifest
from storage.registry import Registry
from storage.stores.local import LocalStore

CIFAR, IMAGENET = ("resnet20_cifar10", "resnet56_cifar10", "vit_cifar10_p4_d128_l4"), ("fdmobilenet_wd2",)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIT_MEAN, VIT_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CHANGES = {"whole, 0.0001": (1, 1e-4, False), "whole, 0.001": (1, 1e-3, False), "classifier, 0.01": (3, 1e-2, True)}
Images = tuple[torch.Tensor, torch.Tensor]


def network(name: str, data: Path) -> torch.nn.Module:
    """Return a network with its weights."""
    if name.startswith("vit"):
        import timm

        model = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=4,
            embed_dim=128,
            depth=4,
            num_heads=4,
            mlp_ratio=2.0,
            num_classes=10,
        )
    else:
        from pytorchcv.model_provider import get_model

        model = get_model(name, pretrained=False)
    model.load_state_dict(load_file(data / f"weights/{name}.safetensors"))
    return model.eval()


def images(name: str, data: Path, *, evaluation: bool) -> Images:
    """Return images as the network takes them, and their labels."""
    mean, std = (VIT_MEAN, VIT_STD) if name.startswith("vit") else (MEAN, STD)
    if name in CIFAR:
        arrays = np.load(data / ("images/cifar10_test_1000.npz" if evaluation else "images/cifar10_train_4000.npz"))
        pixels, labels = arrays["x"], arrays["y"]
    else:
        where = data / ("images/imagenet_val_1300.tar" if evaluation else "images/imagenet_sample_1000.tar")
        with tarfile.open(where) as tar:
            files = {Path(member.name).name: member for member in tar.getmembers()}
            rows = list(csv.reader(io.TextIOWrapper(tar.extractfile(files["labels.csv"]), "utf-8")))[1:]
            read = [np.asarray(Image.open(tar.extractfile(files[Path(row[0]).name])).convert("RGB")) for row in rows]
        top = [(one.shape[0] - 224) // 2 for one in read]
        pixels = np.stack([one[at : at + 224, at : at + 224] for one, at in zip(read, top, strict=True)])
        labels = np.array([int(row[2]) for row in rows])
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    values = (values - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    return values.contiguous(), torch.from_numpy(labels)


def train(model: torch.nn.Module, data: Images, epochs: int, rate: float, *, classifier: bool) -> torch.nn.Module:
    """Return a copy that was trained on: SGD with momentum 0.9, 64 images a step, half of them mirrored.

    BatchNorm keeps its statistics, as is usual where a model is trained on a little.
    """
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)][-1]
    optimizer = torch.optim.SGD((last if classifier else model).parameters(), lr=rate, momentum=0.9)
    inputs, labels = data
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            mirrored = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, inputs[batch].flip(3), inputs[batch])
            torch.nn.functional.cross_entropy(model(mirrored).flatten(1), labels[batch]).backward()
            optimizer.step()
    return model


@torch.no_grad()
def right(model: torch.nn.Module, data: Images) -> int:
    """Return how many images are answered right."""
    pairs = zip(data[0].split(100), data[1].split(100), strict=True)
    return sum(int((model(batch).flatten(1).argmax(1) == labels).sum()) for batch, labels in pairs)


def pull(store: LocalStore, first: int, second: int) -> tuple[int, int]:
    """Return the bytes that a device moves from one version to another: part-bit, and all levels at once."""
    figures = []
    for level in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            device = Device(Path(folder), StoreSource(store), unsigned=True)
            device.pull("net", str(first), level=level)
            figures.append(device.pull("net", str(second)).received_bytes)
            assert device.verify("net").whole
    return figures[0], figures[1]


def patches(registry: Registry, old: Manifest, new: Manifest) -> tuple[int, int]:
    """Return part-bit bytes of zstd's patches, of the stored blobs and of their canonical forms."""
    highs = {blob.digest for blob in (*new.base, *(group.levels[0] for group in new.groups))}
    stored = canonical = 0
    for before, after in paired(old, new):
        if after.digest not in highs or before.digest == after.digest:
            continue
        one, two = registry.get_blob(before), registry.get_blob(after)
        stored += _patch(one, two)
        canonical += _patch(canonical_bytes(one, before.media_type), canonical_bytes(two, after.media_type))
    return stored, canonical


def _patch(old: bytes | bytearray, new: bytes | bytearray) -> int:
    log = max((len(old) + len(new)).bit_length(), 20)
    parameters = zstandard.ZstdCompressionParameters.from_level(19, window_log=log, enable_ldm=True)
    dictionary = zstandard.ZstdCompressionDict(bytes(old), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return len(zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(bytes(new)))


def main() -> None:
    """Print one row for each network, recipe and change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("networks", nargs="*", default=[*CIFAR, *IMAGENET])
    parser.add_argument("--recipe", action="append", default=None)
    options = parser.parse_args()
    print(
        "| network | recipe | change | right: float, full, part | part-bit kB: whole | update | share | all kB: whole "
        "| update | patch-from | patch of canonical forms | deltas s |"
    )
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in options.networks:
        model, evaluation = network(name, options.data), images(name, options.data, evaluation=True)
        calibration = images(name, options.data, evaluation=False)
        tuned = {"none": model} | {
            change: train(model, calibration, epochs, rate, classifier=classifier)
            for change, (epochs, rate, classifier) in CHANGES.items()
        }
        floats = {change: right(one, evaluation) for change, one in tuned.items()}
        for recipe in options.recipe or ["paper"]:
            with tempfile.TemporaryDirectory() as folder:
                store = LocalStore(Path(folder) / "store")
                registry = Registry(store)
                for change, one in tuned.items():
                    samples = None if recipe == "paper" else calibration[0][:256]
                    nested = nestquant.quantize(one, recipe=recipe, calibration=samples)
                    answers = [right(nested.set_level(level) or nested, evaluation) for level in (1, 0)]
                    version = nested.publish("net", str(store.root), tags=()).version
                    counts = f"{floats[change]}, {answers[0]}, {answers[1]}"
                    if change == "none":
                        print(f"| {name} | {recipe} | none | {counts} | | | | | | | | |", flush=True)
                        continue
                    start = time.perf_counter()
                    first, second = registry.resolve("net", 1), registry.resolve("net", version)
                    update = publish_deltas(registry, second, [first])
                    took_s = time.perf_counter() - start
                    whole = pull(store, 1, version)
                    moved = pull(store, 1, update.published.version) if update.published else whole
                    figures = [*patches(registry, first.manifest, second.manifest)]
                    cells = [whole[0], moved[0], whole[1], moved[1], *figures]
                    texts = [f"{cell / 1000:.1f}" for cell in cells]
                    texts.insert(2, f"{100 * moved[0] / whole[0]:.1f}%")
                    print(
                        f"| {name} | {recipe} | {change} | {counts} | {' | '.join(texts)} | {took_s:.1f} |", flush=True
                    )


if __name__ == "__main__":
    main()
