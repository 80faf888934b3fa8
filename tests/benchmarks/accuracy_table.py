"""Top-1 of every model of the test data at every nesting: ``python -m tests.benchmarks.accuracy_table [MODEL ...]``.

Each row is a real job (`jobs.driver.run_job`) into a local store, pulled back as a device and measured there. The
results stand in ``docs/results/accuracy.json`` and what stands there under the same job digest is not measured again
(``--missing``: whatever job made it); ``accuracy.md`` and ``recipes.md`` beside it are written from them.
``--observers`` compares the rules for activation ranges instead.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel

from jobs.driver import run_job
from jobs.events import StageClock
from jobs.spec.file import parse_spec
from jobs.spec.job import DEFAULT_SHARD_BYTES, JobSpec
from jobs.stages.preparation import prepare
from storage.device import Device, StoreSource
from storage.manifest import Manifest
from storage.shard import read_shard
from storage.stores.uri import open_store
from tests.benchmarks.accuracy_report import write_markdown
from workers import runtime
from workers.executor import Executor, InProcessExecutor
from workers.inputs.images import open_images
from workers.measure import MeasureTask, measure
from workers.on_ray.executor import RayExecutor, RaySettings
from workers.tasks import NetworkRef, TensorSource

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("NESTQUANT_TEST_DATA", ROOT.parent / "shared" / "data"))
RESULTS = ROOT / "docs" / "results" / "accuracy.json"
BITS = ((8, 7), (8, 6), (8, 5), (8, 4), (8, 3), (6, 4), (8, 6, 4))
RECIPES = ("paper", "data_free", "calibrated")
SAMPLES = 256  # for activation ranges
CALIBRATED_SAMPLES = 1000  # where integers rest on images too
OBSERVER = "percentile"  # by --observers: docs/results/observers.md
OBSERVERS = ("minmax", "percentile", "mse")

IMAGENET = {"size": 224, "resize": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CIFAR = {"size": 32, "resize": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CIFAR_VIT = {"size": 32, "resize": 32, "mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]}
VIT_KWARGS = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "num_classes": 10,
}


@dataclass(frozen=True)
class Known:
    """A model of the test data, as its README describes it."""

    name: str
    preprocess: dict[str, Any]
    calibration: str
    images: str
    library: str = "pytorchcv"
    arch: str = ""
    kwargs: dict[str, Any] | None = None
    limit: int | None = None
    calibrated_samples: int = CALIBRATED_SAMPLES

    @property
    def title(self) -> str:
        """The model's name and, where not all, how many of the images."""
        return self.name if self.limit is None else f"{self.name}, first {self.limit} images"

    def spec(
        self,
        bits: tuple[int, ...],
        store: Path,
        *,
        recipe: str = "paper",
        observer: str = OBSERVER,
        activation_bits: int = 8,
        samples: int | None = None,
    ) -> JobSpec:
        """Return the job of one row."""
        activations = {"bits": activation_bits, "observer": observer}
        samples = samples or (self.calibrated_samples if recipe == "calibrated" else SAMPLES)
        document = {
            "name": self.name,
            "model": {
                "library": self.library,
                "arch": self.arch or self.name,
                "kwargs": self.kwargs or {},
                "checkpoint": str(DATA / "weights" / f"{self.name}.safetensors"),
            },
            "quantize": {"recipe": recipe, "bits": bits, "activations": activations},
            "preprocess": self.preprocess,
            "calibration": {"data": str(DATA / "images" / self.calibration), "samples": samples},
            "store": {"uri": str(store), "shard_bytes": DEFAULT_SHARD_BYTES},
        }
        if recipe == "data_free":
            del document["calibration"]
        return parse_spec(document, where=self.name)

    def task(self, spec: JobSpec, mode: str, manifest: Manifest | None, cache: Path | None) -> MeasureTask:
        """Return the measurement of ``mode``: ``float``, or a level's, with ``_activations`` or without."""
        level = None if manifest is None else level_names(manifest.level_count()).index(mode.partition("_")[0])
        return MeasureTask(
            mode=mode,
            level=level,
            activations=mode.endswith("_activations"),
            network=NetworkRef(
                library=self.library,
                arch=spec.model.arch,
                kwargs=spec.model.kwargs,
                source=TensorSource(None, str(spec.model.checkpoint)),
                preprocessing={"interpolation": "bilinear", **self.preprocess},
            ),
            store_uri=spec.store.uri,
            name=self.name,
            version=1,
            cache=None if cache is None else str(cache),
            data=str(DATA / "images" / self.images),
            start=0,
            stop=self.limit or len(open_images(DATA / "images" / self.images)),
            batch_size=5 if self.preprocess["size"] > 32 else 50,  # what stays in cache
        )


def level_names(count: int) -> list[str]:
    """Return what the levels are called here: ``part``, ``middle`` where there are three, ``full``."""
    return ["part", *(["middle"] if count == 3 else []), "full"]


_IMAGENET_SETS = ("imagenet_sample_1000.tar", "imagenet_val_1300.tar")
_CIFAR_SETS = ("cifar10_train_4000.npz", "cifar10_test_1000.npz")
MODELS = (
    Known("resnet20_cifar10", CIFAR, *_CIFAR_SETS),
    Known("resnet56_cifar10", CIFAR, *_CIFAR_SETS),
    Known("vit_cifar10_p4_d128_l4", CIFAR_VIT, *_CIFAR_SETS, "timm", "vit_tiny_patch16_224", VIT_KWARGS),
    Known("fdmobilenet_wd2", IMAGENET, *_IMAGENET_SETS),
    Known("menet108_8x1_g3", IMAGENET, *_IMAGENET_SETS),
    Known("squeezenet_v1_1", IMAGENET, *_IMAGENET_SETS, limit=300),  # what the published figures are of
    # Its activations are large, and those of all images are held at once (ADR 11).
    Known("squeezenet_v1_1", IMAGENET, *_IMAGENET_SETS, calibrated_samples=500),
)


class Count(BaseModel):
    """Right answers."""

    correct: int
    total: int
    seconds: float


class Row(BaseModel):
    """One job: what it stored and what it reaches.

    ``full_digest`` is that of the full-bit weights and activation ranges; ``integer_bytes`` are the payloads of the
    shards alone.
    """

    model: str
    recipe: str = "paper"
    bits: tuple[int, ...]
    job: str
    manifest: str
    full_digest: str
    weights: int
    float_bytes: int
    base_bytes: int
    level_bytes: tuple[int, ...]
    integer_bytes: tuple[int, ...]
    received_bytes: tuple[int, ...]
    stage_seconds: dict[str, float] = {}
    measured: dict[str, Count]

    @property
    def label(self) -> str:
        return "|".join(map(str, self.bits))

    @property
    def complete(self) -> bool:
        """Tell whether every mode is measured."""
        return len(self.measured) == 2 * len(self.bits)

    def is_of(self, model: str, recipe: str, bits: tuple[int, ...]) -> bool:
        """Tell whether the row answers for this model, recipe and nesting."""
        return (self.model, self.recipe, self.bits) == (model, recipe, bits)


class Results(BaseModel):
    """Everything measured: float top-1 by model, and the rows."""

    observer: str = OBSERVER
    samples: int = SAMPLES
    float_top1: dict[str, Count] = {}
    rows: list[Row] = []


def main() -> None:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="default: all")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="default: all")
    parser.add_argument("--bits", action="append", type=_bits, help="such as 8,4; default: all")
    parser.add_argument("--missing", action="store_true", help="keep every row that stands, whatever job made it")
    parser.add_argument("--observers", action="store_true", help="compare the rules for activation ranges")
    parser.add_argument("--cpus", type=int, default=1, help="workers; one runs in this process, without Ray")
    arguments = parser.parse_args()
    chosen = [known for known in MODELS if not arguments.models or known.name in arguments.models]
    with _executor(arguments.cpus) as executor:
        for known in chosen:
            if arguments.observers:
                _compare_observers(known, executor)
                continue
            for recipe in arguments.recipe or RECIPES:
                if recipe == "paper" or known.limit is None:
                    _measure_model(known, recipe, arguments.bits or BITS, executor, missing=arguments.missing)
    if not arguments.observers:
        write_markdown(RESULTS)


def _bits(text: str) -> tuple[int, ...]:
    return tuple(int(width) for width in text.split(","))


@contextmanager
def _executor(cpus: int) -> Iterator[Executor]:
    if cpus == 1:
        yield InProcessExecutor()
    else:
        with RayExecutor(RaySettings(num_cpus=cpus)) as executor:
            yield executor


def _measure_model(
    known: Known, recipe: str, nestings: Sequence[tuple[int, ...]], executor: Executor, *, missing: bool
) -> None:
    results = _load()
    with tempfile.TemporaryDirectory(prefix="nestquant-table-") as folder:
        tasks: list[tuple[Row | None, str, MeasureTask]] = []
        # Recomposition is exact, so that all the nestings of 8 bits have one full-bit model: it is measured once.
        full_digests: set[str] = set()
        if known.title not in results.float_top1:
            spec = known.spec((8, 4), Path(folder) / "float")
            tasks.append((None, "float", known.task(spec, "float", None, None)))
        for bits in nestings:
            store = Path(folder) / "store" / "-".join(map(str, bits))
            spec = known.spec(bits, store, recipe=recipe)
            standing = [row for row in results.rows if row.complete and row.is_of(known.title, recipe, bits)]
            if standing and missing:
                continue
            job = prepare(spec, executor, store, StageClock(lambda _: None)).digest
            if any(row.job == job for row in standing):
                continue
            row, manifest, cache = _run(known, spec, executor, Path(folder) / "device" / store.name)
            modes = level_names(manifest.level_count())
            if row.full_digest in full_digests:
                modes.remove("full")
            full_digests.add(row.full_digest)
            for mode in modes:
                both = (mode, f"{mode}_activations")
                tasks += [(row, name, known.task(spec, name, manifest, cache)) for name in both]
            if recipe != "paper":  # no two of them share a full-bit model: measure now, keep what is measured
                _measure(known, tasks, executor)
                tasks = []
        _measure(known, tasks, executor)


def _measure(known: Known, tasks: Sequence[tuple[Row | None, str, MeasureTask]], executor: Executor) -> None:
    """Measure, and write each row when all of its modes are there; another process may be writing rows too."""
    rows = [row for row, _, _ in tasks if row is not None]
    for index, measured in executor.map(measure, [task for _, _, task in tasks]):
        row, mode, _ = tasks[index]
        assert not measured.skipped, measured.skipped
        accuracy = measured.counts.accuracy()
        assert row is not None or not accuracy.is_chance, f"{known.title}: the float network answers by chance"
        count = Count(correct=accuracy.correct, total=accuracy.total, seconds=round(measured.seconds, 1))
        print(f"{known.title} {'' if row is None else row.recipe} {'' if row is None else row.label} {mode} {count}")
        with FileLock(RESULTS.with_suffix(".lock")):
            results = _load()
            if row is None:
                results.float_top1[known.title] = count
            else:
                same = [other for other in rows if other.full_digest == row.full_digest] if "full" in mode else [row]
                for target in same:
                    target.measured[mode] = count
            for done in (row for row in rows if row.complete):
                results.rows = [old for old in results.rows if not old.is_of(done.model, done.recipe, done.bits)]
                results.rows.append(done)
            _save(results)


def _run(known: Known, spec: JobSpec, executor: Executor, cache: Path) -> tuple[Row, Manifest, Path]:
    """Run the job, pull it as a device and look at what came."""
    result = run_job(spec, executor)
    print(
        f"{known.title} {spec.quantize.bits}: { ({name: round(s, 2) for name, s in result.seconds.items()}) }",
        flush=True,
    )
    device = Device(cache, StoreSource(open_store(spec.store.uri)), unsigned=True)
    device.pull(known.name)
    device.upgrade(known.name)
    manifest = device.manifest(known.name)
    row = Row(
        model=known.title,
        recipe=spec.quantize.recipe,
        bits=spec.quantize.bits,
        job=result.job,
        manifest=result.digest,
        full_digest=_full_digest(manifest, device),
        weights=result.sizes.weights,
        float_bytes=result.sizes.float_bytes,
        base_bytes=result.sizes.base_bytes,
        level_bytes=result.sizes.level_bytes,
        integer_bytes=tuple(_integer_bytes(manifest, device)),
        received_bytes=result.pull.level_bytes,
        stage_seconds={name: round(seconds, 1) for name, seconds in result.seconds.items()},
        measured={},
    )
    return row, manifest, cache


def _full_digest(manifest: Manifest, device: Device) -> str:
    """Return the digest of all that full-bit answers depend on and that the nesting could change."""
    model = runtime.load(manifest, device.blob_path, level=manifest.level_count() - 1)
    hasher = hashlib.sha256()
    for record, module in model.layers():
        weight = getattr(module, module.parameter)
        hasher.update(record.name.encode() + weight.detach().numpy().tobytes())
        hasher.update(repr(record.activation).encode())
    for blob in manifest.base:
        hasher.update(blob.digest.encode())
    return f"sha256:{hasher.hexdigest()}"


def _integer_bytes(manifest: Manifest, device: Device) -> Iterator[int]:
    for level in range(manifest.level_count()):
        shards = (read_shard(device.blob_path(group.levels[level])) for group in manifest.groups)
        yield sum(stored.payload.size for shard in shards for stored in shard.integers.values())


def _compare_observers(known: Known, executor: Executor) -> None:
    """Print top-1 at 8 weight bits with quantized activations, by observer and activation bits, on the same images."""
    with tempfile.TemporaryDirectory(prefix="nestquant-observers-") as folder:
        tasks = []
        for activation_bits in (8, 6):
            for observer in OBSERVERS:
                store = Path(folder) / f"{observer}{activation_bits}"
                spec = known.spec((8,), store, observer=observer, activation_bits=activation_bits)
                _, manifest, cache = _run(known, spec, executor, Path(folder) / f"device-{store.name}")
                tasks.append((f"{observer} {activation_bits}", known.task(spec, "full_activations", manifest, cache)))
        for index, measured in executor.map(measure, [task for _, task in tasks]):
            error = measured.accuracy.standard_error
            print(f"{known.name} {tasks[index][0]}: {measured.accuracy.top1:.2f} ({error:.2f})", flush=True)


def _load() -> Results:
    return Results.model_validate_json(RESULTS.read_text()) if RESULTS.exists() else Results()


def _save(results: Results) -> None:
    order = {known.title: place for place, known in enumerate(MODELS)}
    results.rows.sort(key=lambda row: (order[row.model], RECIPES.index(row.recipe), BITS.index(row.bits)))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(results.model_dump_json(indent=1) + "\n")
    partial.replace(RESULTS)


if __name__ == "__main__":
    main()
