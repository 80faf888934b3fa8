"""ONNX Runtime's 4-bit kernel for Linear layers at part-bit: ``python -m tests.benchmarks.bench_4bit [ARCH]``.

int8 kernels hold a byte a weight at every level. ``MatMulNBits`` (an operator of ONNX Runtime's own) holds half of one:
the published graph of a timm transformer (random weights) gets it in the place of each MatMul, with the 4-bit integers
of the high shards and their scales. Printed: milliseconds a forward, what a process holds, and how far answers are from
those of the int8 graph at part-bit, whose activations are on the version's own grids; these have float activations, or
such as the operator rounds to 8 bits by itself (``accuracy_level`` 4).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from nestquant.engines.ort import options
from tests.benchmarks.bench_engines import machine, publish

ROUNDS = 20
BLOCK = 128
KINDS = ("float", "int8-0", "4bit-float", "4bit-int8")


def with_4_bits(model: onnx.ModelProto, *, accuracy_level: int) -> tuple[bytes, int]:
    """Return a whole int8 model at part-bit with 4-bit products in the place of its MatMuls, and how many those are."""
    constants = {one.name: one for one in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    count, nodes = 0, []
    for node in model.graph.node:
        maker = makers.get(node.input[1]) if node.op_type == "MatMul" else None
        if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in constants:
            nodes.append(node)
            continue
        weight = numpy_helper.to_array(constants[maker.input[0]])  # [K, N], multiples of 16
        scale = numpy_helper.to_array(constants[maker.input[1]]) * 16
        packed, scales = _packed(weight.T // 16, scale)
        quantized = makers.get(node.input[0])
        source = node.input[0] if quantized is None else makers[quantized.input[0]].input[0]
        names = [f"{maker.input[0]}/4bit", f"{maker.input[0]}/4bit/scales"]
        model.graph.initializer.extend(
            numpy_helper.from_array(value, name) for value, name in zip((packed, scales), names, strict=True)
        )
        rows, columns = weight.shape
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [source, *names],
                list(node.output),
                domain="com.microsoft",
                K=rows,
                N=columns,
                bits=4,
                block_size=BLOCK,
                accuracy_level=accuracy_level,
            )
        )
        count += 1
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    while True:  # what nothing reads any more: grids of those activations, the int8 weights
        read = {name for node in model.graph.node for name in node.input} | {out.name for out in model.graph.output}
        kept = [node for node in model.graph.node if read.intersection(node.output)]
        if len(kept) == len(model.graph.node):
            break
        del model.graph.node[:]
        model.graph.node.extend(kept)
    needed = [one for one in model.graph.initializer if one.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(needed)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model.SerializeToString(), count


def _packed(weight: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the operator's layout of integers ``[N, K]`` from -8 to 7, two in a byte, low first; scales by block."""
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    values = np.full((rows, blocks * BLOCK), 8, np.uint8)
    values[:, :columns] = (weight + 8).astype(np.uint8)
    pairs = values.reshape(rows, blocks, BLOCK // 2, 2)
    packed = pairs[..., 0] | (pairs[..., 1] << 4)
    return packed, np.repeat(scale.astype(np.float32), blocks)


def resident_bytes(path: Path) -> int:
    """Return what this process holds after three answers by the model."""
    session = ort.InferenceSession(path, options(threads=1))
    for _ in range(3):
        session.run(None, {"image": np.zeros((1, 3, 224, 224), np.float32)})
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", nargs="?", default="deit_small_patch16_224")
    parser.add_argument("--folder", type=Path, help="where models were made before")
    parser.add_argument("--resident", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resident:
        print(resident_bytes(arguments.resident))
        return
    print(machine())
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="nestquant-4bit-"))
    if not (folder / "int8-0.onnx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        publish(arguments.arch, folder)
    for kind, level in (("4bit-float", 0), ("4bit-int8", 4)):
        raw, count = with_4_bits(onnx.load(str(folder / "int8-0.onnx")), accuracy_level=level)
        (folder / f"{kind}.onnx").write_bytes(raw)
    print(f"{arguments.arch}: {count} MatMuls of 4 bits, blocks of {BLOCK}")
    batch = np.random.default_rng(1).normal(0, 1, (1, 3, 224, 224)).astype(np.float32)
    sessions = {kind: ort.InferenceSession(folder / f"{kind}.onnx", options(threads=1)) for kind in KINDS}
    expected = sessions["int8-0"].run(None, {"image": batch})[0]
    least = dict.fromkeys(KINDS, float("inf"))
    for _ in range(ROUNDS):
        for kind, session in sessions.items():
            begin = time.perf_counter()
            session.run(None, {"image": batch})
            least[kind] = min(least[kind], time.perf_counter() - begin)
    print("| model | file, MB | ms a forward | MB resident | answers apart, of their spread |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind in KINDS:
        command = [sys.executable, "-m", "tests.benchmarks.bench_4bit", "--resident", str(folder / f"{kind}.onnx")]
        held = int(subprocess.run(command, check=True, capture_output=True).stdout)
        apart = np.abs(sessions[kind].run(None, {"image": batch})[0] - expected).max() / np.ptp(expected)
        size = (folder / f"{kind}.onnx").stat().st_size
        print(f"| {kind} | {size / 1e6:.1f} | {1000 * least[kind]:.1f} | {held / 1e6:.0f} | {apart:.3f} |", flush=True)


if __name__ == "__main__":
    main()
