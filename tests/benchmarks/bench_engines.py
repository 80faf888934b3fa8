"""Latency, memory and switches on ONNX Runtime: ``python -m tests.benchmarks.bench_engines [NETWORK ...]``.

A network is one of the test data, or a timm architecture with random weights (``resnet50``): kernels take as long for
any weights. Times are the least of several rounds; in a round each candidate runs once, so that other load on the
machine meets all of them. Memory is that of a process of its own for each candidate. Markdown tables are printed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = {1: 40, 32: 5}
SWITCHES = 9
NETWORKS = ("fdmobilenet_wd2", "mobilenetv2_100", "resnet50")
CANDIDATES = ("float", "int8 full", "int8 part", "int8 part, hot")
INSTRUCTIONS = ("avx2", "avx512bw", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def publish(network: str, folder: Path) -> None:
    """Run the network's job and put into ``folder`` what the measurements read: a device, and models as files.

    ``float.onnx`` and ``int8-<level>.onnx`` are whole models, as a device without our package would have them.
    """
    import onnx
    from onnx.external_data_helper import load_external_data_for_model

    from jobs.spec.file import parse_spec
    from nestquant.engines.images import Preprocessing
    from nestquant.engines.weights import engine_tensors
    from storage.engine_layout import read_layout
    from storage.registry import Registry
    from storage.stores.uri import open_store
    from tests.benchmarks.engines_accuracy import NETWORKS as KNOWN
    from tests.benchmarks.engines_accuracy import exported_spec, float_graph, pulled
    from workers.engines.graph import WEIGHTS_FILE
    from workers.inputs.checkpoint import random_state, save_state

    if network in KNOWN:
        spec = exported_spec(KNOWN[network], folder / "store", recipe="paper")
    else:
        checkpoint = save_state(random_state("timm", network, {}, seed=7), folder / "weights.safetensors")
        noise = np.random.default_rng(3).integers(0, 256, (16, 224, 224, 3), dtype=np.uint8)
        np.savez(folder / "noise.npz", x=noise)
        document = {
            "name": network,
            "model": {"library": "timm", "arch": network, "checkpoint": str(checkpoint)},
            "quantize": {"recipe": "paper", "bits": [8, 4], "scheme": "symmetric", "activations": {"bits": 8}},
            "preprocess": {"size": 224},
            "calibration": {"data": str(folder / "noise.npz"), "samples": 16, "batch_size": 8},
            "export": {"engines": ["onnx"]},
            "store": {"uri": str(folder / "store")},
        }
        spec = parse_spec(document, where=network)
    device = pulled(spec, folder / "device")
    manifest = device.manifest(network)
    record = manifest.engine("onnx")
    assert record is not None
    registry = Registry(open_store(spec.store.uri))
    preprocessing = Preprocessing.from_record(manifest.preprocessing or {})
    (folder / "float.onnx").write_bytes(float_graph(manifest.model, preprocessing, Path(str(spec.model.checkpoint))))
    layout, values = read_layout(registry.get_blob(record.layout), manifest)
    for level in range(manifest.level_count()):
        weights = bytearray(layout.size_bytes)
        for tensor, array in engine_tensors(manifest, layout, values, registry.get_blob, level):
            weights[tensor.offset : tensor.offset + tensor.size_bytes] = array.tobytes()
        (folder / WEIGHTS_FILE).write_bytes(weights)
        model = onnx.load_from_string(registry.get_blob(record.graph))
        load_external_data_for_model(model, str(folder))
        onnx.save(model, str(folder / f"int8-{level}.onnx"))


def candidate(name: str, network: str, folder: Path, threads: int) -> Callable[[np.ndarray], Any]:
    """Return what answers a batch."""
    import onnxruntime as ort

    from nestquant.engines.onnx import Session
    from nestquant.engines.ort import options
    from storage.device import Device

    if name == "float":
        session = ort.InferenceSession(folder / "float.onnx", options(threads=threads))
        return lambda batch: session.run(None, {"image": batch})
    if name.endswith("from a file"):
        whole = ort.InferenceSession(folder / f"int8-{_level(name)}.onnx", options(threads=threads))
        return lambda batch: whole.run(None, {"image": batch})
    ours = Session(
        Device(folder / "device"),
        network,
        level=_level(name),
        residency="hot" if "hot" in name else "fast",
        threads=threads,
    )
    return ours.run


def latency(network: str, folder: Path) -> None:
    """Print milliseconds a forward."""
    size = json.loads((folder / "shape.json").read_text())
    for batch_size, rounds in ROUNDS.items():
        for threads in (1, 2):
            runs = {name: candidate(name, network, folder, threads) for name in CANDIDATES}
            batch = np.random.default_rng(1).normal(0, 1, (batch_size, *size)).astype(np.float32)
            least = dict.fromkeys(runs, float("inf"))
            for run in runs.values():
                run(batch)
            for _ in range(rounds):
                for name, run in runs.items():
                    begin = time.perf_counter()
                    run(batch)
                    least[name] = min(least[name], time.perf_counter() - begin)
            row = " | ".join(f"{1000 * least[name]:.2f}" for name in CANDIDATES)
            print(f"| {network} | {batch_size} | {threads} | {row} |", flush=True)


def resident(network: str, folder: Path) -> None:
    """Print what a process holds once it has answered: all of it, and beyond what an engine without a model holds."""
    words = ("nothing", "float", "int8 full from a file", "int8 full", "int8 part", "int8 full, hot", "int8 part, hot")
    words = (*words, "torch packed, part", "torch packed, full")
    sizes = {}
    for word in words:
        command = [sys.executable, "-m", "tests.benchmarks.bench_engines", network, "--resident", word]
        sizes[word] = int(subprocess.run([*command, "--folder", folder], check=True, capture_output=True).stdout)
    for word in words[1:]:
        print(f"| {network} | {word} | {sizes[word] / 1e6:.0f} | {(sizes[word] - sizes['nothing']) / 1e6:.0f} |")


def resident_bytes_of(word: str, network: str, folder: Path) -> int:
    """Return what this process holds after three answers of batch 1."""
    from storage.device import Device

    size = json.loads((folder / "shape.json").read_text())
    batch = np.zeros((1, *size), np.float32)
    if word.startswith("torch"):
        import torch

        from workers import runtime

        device = Device(folder / "device")
        model = runtime.load(device.manifest(network), device.blob_path, level=_level(word))
        with torch.inference_mode():
            for _ in range(3):
                model.network(torch.from_numpy(batch))
    elif word != "nothing":
        run = candidate(word, network, folder, 1)
        for _ in range(3):
            run(batch)
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def switches(network: str, folder: Path) -> None:
    """Print milliseconds of a switch, of what it is made of, and of the ways without us."""
    import onnxruntime as ort

    from nestquant.engines.onnx import Session
    from nestquant.engines.ort import options
    from storage.device import Device

    device = Device(folder / "device")
    manifest = device.manifest(network)
    shards = [[group.levels[level] for group in manifest.groups] for level in range(2)]
    read_bytes = [sum(blob.size_bytes for blob in level) for level in shards]

    def read(levels: int) -> None:
        for level in shards[:levels]:
            for blob in level:
                device.blob_path(blob).read_bytes()

    def forget() -> None:
        """Ask the system to drop its cache of the shards (posix_fadvise(2)); what is not yet written would stay."""
        for level in shards:
            for blob in level:
                descriptor = os.open(device.blob_path(blob), os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    rows: dict[str, tuple[float, int]] = {
        "read the bytes of both shards": (_least(lambda: read(2)), sum(read_bytes)),
        "the same, from the disk and not from its cache": (_least(lambda: read(2), before=forget), sum(read_bytes)),
        "read the bytes of the int8 model": (
            _least((folder / "int8-1.onnx").read_bytes),
            (folder / "int8-1.onnx").stat().st_size,
        ),
        "a second int8 model, loaded from disk": (
            _least(lambda: ort.InferenceSession(folder / "int8-1.onnx", options(threads=1))),
            (folder / "int8-1.onnx").stat().st_size,
        ),
        "the float model, loaded from disk": (
            _least(lambda: ort.InferenceSession(folder / "float.onnx", options(threads=1))),
            (folder / "float.onnx").stat().st_size,
        ),
    }
    for residency in ("fast", "hot"):
        session = Session(device, network, level=0, residency=residency, threads=1)  # type: ignore[arg-type]
        least = [float("inf")] * 2
        for turn in range(2 * SWITCHES):
            level = 1 - turn % 2
            begin = time.perf_counter()
            session.set_level(level)
            least[level] = min(least[level], time.perf_counter() - begin)
        rows[f"{residency}, part to full"] = least[1], sum(read_bytes)
        rows[f"{residency}, full to part"] = least[0], read_bytes[0]
    for word, (seconds, size) in rows.items():
        print(f"| {network} | {word} | {1000 * seconds:.1f} | {size / 1e6:.2f} |", flush=True)


def _least(run: Callable[[], Any], *, before: Callable[[], None] = lambda: None) -> float:
    least = float("inf")
    for _ in range(SWITCHES):
        before()
        begin = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - begin)
    return least


def _level(word: str) -> int:
    return 1 if "full" in word else 0


def machine() -> str:
    """Return the processor, its dot-product instructions and the load."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    has = ", ".join(name for name in INSTRUCTIONS if name in flags)
    return f"{fields.get('model name', '?')}, {os.cpu_count()} cores; {has}; load {os.getloadavg()[0]:.1f}"


def main() -> None:
    """Print the tables of the networks asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"default: {', '.join(NETWORKS)}")
    parser.add_argument("--only", choices=("latency", "memory", "switch"))
    parser.add_argument("--folder", type=Path, help="where models were made before")
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resident:
        print(resident_bytes_of(arguments.resident, arguments.networks[0], arguments.folder))
        return
    print(machine(), flush=True)
    for network in arguments.networks or NETWORKS:
        folder = Path(arguments.folder or tempfile.mkdtemp(prefix="nestquant-engines-"))
        try:
            if not (folder / "shape.json").exists():
                folder.mkdir(parents=True, exist_ok=True)
                publish(network, folder)
                (folder / "shape.json").write_text("[3, 224, 224]" if "cifar" not in network else "[3, 32, 32]")
            if arguments.only in (None, "latency"):
                print(f"| network | batch | threads | {' | '.join(CANDIDATES)} |")
                latency(network, folder)
            if arguments.only in (None, "memory"):
                print("| network | in the process | MB resident | beyond the engine |")
                resident(network, folder)
            if arguments.only in (None, "switch"):
                print("| network | | ms | MB read |")
                switches(network, folder)
        finally:
            if arguments.folder is None:
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
