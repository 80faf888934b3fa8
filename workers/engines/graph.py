"""A traced graph made into one that an int8 engine runs: weights dequantized from integers, BatchNorm in their scales.

The integers are no part of it. Everything else follows from what all levels share: base parameters, scales and ranges.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from storage.engine_layout import EngineTensor, Layout, aligned
from storage.manifest import ActivationRange, FloatRecord, LayerRecord
from workers.engines.sites import Site, attribute, consumers, find_site, norm_behind, tensors_between
from workers.engines.trace import ANSWER, IMAGE
from workers.errors import WorkError

WEIGHTS_FILE = "weights.bin"
Array = npt.NDArray[Any]
_LARGEST_BIAS = 2**31 - 1
_LEAST_SCALE = 1e-20
"""Of a channel without products or bias: it has to be above 0, and so has its product with an input's step."""
_UNSEEN = 0.02
"""A share of a channel's constant value that 8-bit activations hardly show."""


@dataclass(frozen=True)
class LayerGrid:
    """What stands beside a layer's integers: float32 scale ``[O]``, and the biases of levels ``[levels, O]`` if any."""

    scale: Array
    biases: Array | None


class EngineGraph:
    """One graph on its way; `sites` are checked when it is made, before any weight is read."""

    def __init__(self, traced: onnx.ModelProto, layers: Sequence[LayerRecord]) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(traced)
        self.graph = self.model.graph
        # Held in a list, so that each node keeps its identity.
        self.nodes = list(self.graph.node)
        self.sites = [site for layer in layers if (site := find_site(self.nodes, layer)) is not None]
        self.tensors: list[EngineTensor] = []
        self.values: dict[str, Array] = {}
        self.constants: dict[str, Array] = {}
        self.kept_float: list[FloatRecord] = []
        self._offset = 0
        self._between = tensors_between(self.nodes, self.sites)
        self._quantized: dict[tuple[str, float, int], str] = {}
        self._before: dict[int, list[onnx.NodeProto]] = defaultdict(list)
        self._behind: dict[str, list[onnx.NodeProto]] = defaultdict(list)

    def unknown_ranges(self) -> dict[str, str]:
        """Return the tensors whose ranges the manifest does not hold: key in ``inner`` -> name in the graph."""
        inputs = {
            f"{site.record.name}/input": str(site.node.input[0])
            for site in self.sites
            if site.direct and site.record.activation is None and site.node.op_type != "ConvTranspose"
        }
        tensors = {str(site.node.input[0]) for site in self.sites if site.record.activation is not None}
        return inputs | {name: name for name in self._between if name not in tensors}

    def finish(
        self,
        state: Mapping[str, Array],
        grids: Mapping[str, LayerGrid],
        *,
        activations: bool,
        inner: Mapping[str, ActivationRange] | None = None,
    ) -> tuple[bytes, Layout, dict[str, Array]]:
        """Return the graph's bytes, its layout and the layout's values.

        Args:
            state: float parameters and buffers by name.
            grids: of every layer.
            activations: quantize them where the manifest has ranges.
            inner: ranges of further tensors, by their names in the graph (`inner_tensors`).

        Raises:
            WorkError: a parameter that the graph needs is not there; it names it.
        """
        for site in self.sites:
            self._place(site, state, grids[site.record.name], inner or {}, activations=activations)
        for name in self._between if activations else ():
            self._quantize_between(name, (inner or {}).get(name))
        self._insert()
        self._drop_unused()
        self._add_constants(state)
        layout = Layout(tensors=tuple(self.tensors), image=IMAGE, answer=ANSWER, kept_float=tuple(self.kept_float))
        return self.model.SerializeToString(deterministic=True), layout, self.values

    def _place(
        self,
        site: Site,
        state: Mapping[str, Array],
        grid: LayerGrid,
        inner: Mapping[str, ActivationRange],
        *,
        activations: bool,
    ) -> None:
        layer, node = site.record, site.node
        norm = norm_behind(self.nodes, node) if site.direct else None
        factor, shift = (None, None) if norm is None else _folded(norm, state)
        scale = grid.scale.astype(np.float64) * (1.0 if factor is None else factor)
        step = self._quantize_input(site, inner, activations=activations) if site.direct else None
        bias = _bias(state.get(f"{layer.name}.bias"), grid.biases, factor, shift)
        if step is not None and bias is not None and node.op_type != "MatMul":
            scale = _wide_enough(scale, bias, step, products=math.prod(layer.shape) // layer.out_channels())
        weight = f"{layer.parameter}/int8"
        self._add_tensor(weight, layer.name, "weight", np.int8, site.shape, order=site.order)
        dequantized = self._dequantize(node, weight, f"{layer.parameter}/scale", scale.astype(np.float32), site.axis)
        if site.transposed is not None:
            _exchange(node, site.transposed, dequantized)
        elif site.direct:
            _exchange(node, layer.parameter, dequantized)
        else:
            for user in consumers(self.nodes, layer.parameter):
                _exchange(user, layer.parameter, dequantized)
        if not site.direct:
            self._keep(layer.name, f"its weight is used by {node.op_type}", counts=activations)
            return
        if norm is not None:
            node.output[0] = norm.output[0]
            self.nodes = [one for one in self.nodes if one is not norm]
        if bias is not None:
            self._add_bias(site, bias, scale, step)

    def _quantize_input(self, site: Site, inner: Mapping[str, ActivationRange], *, activations: bool) -> float | None:
        """Put the layer's input on its grid; return the grid's step, or None where the layer runs in float."""
        layer, node = site.record, site.node
        if not activations:
            return None
        extent = layer.activation or inner.get(f"{layer.name}/input")
        if node.op_type == "ConvTranspose":
            self._keep(layer.name, "the engine has no transposed convolution of integers", counts=True)
            return None
        if extent is None:
            self._keep(layer.name, "no range of its input is known", counts=True)
            return None
        scale, zero_point = grid_of(extent)
        node.input[0] = self._on_grid(node.input[0], scale, zero_point)
        return scale

    def _keep(self, layer: str, reason: str, *, counts: bool) -> None:
        if counts:
            self.kept_float.append(FloatRecord(name=layer, reason=reason))

    def _on_grid(self, name: str, scale: float, zero_point: int) -> str:
        """Return the name of a tensor quantized and dequantized; one that several read on one grid is made once."""
        key = (name, scale, zero_point)
        if key not in self._quantized:
            base = f"{name}/q{sum(tensor == name for tensor, *_ in self._quantized)}"
            self.constants[f"{base}/scale"] = np.asarray(scale, np.float32)
            self.constants[f"{base}/zero_point"] = np.asarray(zero_point, np.uint8)
            grid = [f"{base}/scale", f"{base}/zero_point"]
            self._behind[name] += [
                helper.make_node("QuantizeLinear", [name, *grid], [base]),
                helper.make_node("DequantizeLinear", [base, *grid], [f"{base}/float"]),
            ]
            self._quantized[key] = f"{base}/float"
        return self._quantized[key]

    def _quantize_between(self, name: str, extent: ActivationRange | None) -> None:
        """Quantize a tensor for all that do not quantize it themselves: on the grid that a layer has it on already, or
        by its own range.
        """
        grids = [(scale, zero_point) for tensor, scale, zero_point in self._quantized if tensor == name]
        if len(grids) != 1 and extent is None:
            return
        quantized = self._on_grid(name, *(grid_of(extent) if extent is not None else grids[0]))
        for user in consumers(self.nodes, name):
            _exchange(user, name, quantized)

    def _dequantize(self, node: onnx.NodeProto, name: str, scale_name: str, scale: Array, axis: int | None) -> str:
        self.constants[scale_name] = scale
        # Zeros, written out. Without them ONNX Runtime has no Gemm of integers, and where a layer stays float it makes
        # a single zero point of its own (session.x64quantprecision), which it then refuses.
        self.constants[f"{name}/zero_point"] = np.zeros(scale.shape, np.int8)
        inputs = [name, scale_name, f"{name}/zero_point"]
        self._before[id(node)].append(helper.make_node("DequantizeLinear", inputs, [f"{name}/float"], axis=axis))
        return f"{name}/float"

    def _add_bias(self, site: Site, bias: Array, scale: Array, step: float | None) -> None:
        """Give the layer's node its bias: float ``[levels, O]`` where the layer runs in float or adds it itself, else
        integers on the grid of the products.
        """
        layer, node = site.record, site.node
        name, own = f"{layer.name}/bias", f"{layer.name}.bias"
        values, integers = bias.astype(np.float32), False
        if step is not None and node.op_type != "MatMul":
            grid = np.float64(np.float32(step)) * scale.astype(np.float32).astype(np.float64)
            with np.errstate(divide="ignore", invalid="ignore"):
                whole = np.rint(bias / grid)
            if np.isfinite(whole).all() and np.abs(whole).max(initial=0) <= _LARGEST_BIAS:
                values, integers = whole.astype(np.int32), True
            else:
                self._keep(layer.name, "its bias is beyond 32-bit integers on the grid of its products", counts=True)
        source = name
        if integers:
            self.constants[f"{name}/scale"] = grid.astype(np.float32)
            self._before[id(node)].append(
                helper.make_node("DequantizeLinear", [name, f"{name}/scale"], [f"{name}/float"], axis=0)
            )
            source = f"{name}/float"
        if len(bias) > 1:
            self._add_tensor(name, layer.name, "bias", values.dtype, values.shape[1:], levels=len(bias))
            self.values |= {f"{name}/level{level}": values[level] for level in range(len(bias))}
        else:
            self.constants[name] = values[0]
        self._wire_bias(node, own, source, layer.name)

    def _wire_bias(self, node: onnx.NodeProto, own: str, source: str, layer: str) -> None:
        users = consumers(self.nodes, own)
        if node.op_type != "MatMul":
            if any(user is not node for user in users):
                raise WorkError(f"Layer {layer!r}: its bias is used by {users[0].op_type}; leave it float.")
            del node.input[2:]
            node.input.append(source)
            return
        if users:
            for user in users:
                _exchange(user, own, source)
            return
        added = helper.make_node("Add", [f"{node.output[0]}/product", source], [node.output[0]])
        node.output[0] = f"{node.output[0]}/product"
        self.nodes.insert(next(at for at, one in enumerate(self.nodes) if one is node) + 1, added)

    def _add_tensor(
        self,
        name: str,
        layer: str,
        role: Literal["weight", "bias"],
        dtype: npt.DTypeLike,
        shape: Iterable[int],
        *,
        order: Literal["out_in", "in_out"] = "out_in",
        levels: int = 1,
    ) -> None:
        sizes = tuple(shape)
        tensor = EngineTensor(
            name=name,
            layer=layer,
            role=role,
            dtype=np.dtype(dtype).name,
            shape=sizes,
            order=order,
            levels=levels,
            offset=self._offset,
        )
        self.tensors.append(tensor)
        self._offset = aligned(tensor.offset + tensor.size_bytes)
        proto = onnx.TensorProto(name=name, dims=sizes, data_type=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
        proto.data_location = onnx.TensorProto.EXTERNAL
        where = {"location": WEIGHTS_FILE, "offset": str(tensor.offset), "length": str(tensor.size_bytes)}
        for key, value in where.items():
            proto.external_data.add(key=key, value=value)
        self.graph.initializer.append(proto)

    def _insert(self) -> None:
        """Put what was made before the node that needs it, or behind the one that gives its input."""
        nodes = list(self._behind[IMAGE])
        for node in self.nodes:
            behind = [one for name in node.output for one in self._behind[name]]
            nodes += [*self._before[id(node)], node, *behind]
        self._replace(nodes)

    def _replace(self, nodes: Sequence[onnx.NodeProto]) -> None:
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        for index, node in enumerate(copies):
            node.name = f"n{index}"
        del self.graph.node[:]
        self.graph.node.extend(copies)

    def _drop_unused(self) -> None:
        """Drop what nothing reads any more: the Transpose of a weight that is stored transposed."""
        while True:
            names = {name for node in self.graph.node for name in node.input} | {ANSWER}
            nodes = [node for node in self.graph.node if names.intersection(node.output)]
            if len(nodes) == len(self.graph.node):
                break
            self._replace(nodes)
        initializers = [one for one in self.graph.initializer if one.name in names]
        initializers = [onnx.TensorProto.FromString(one.SerializeToString()) for one in initializers]
        del self.graph.initializer[:]
        self.graph.initializer.extend(initializers)

    def _add_constants(self, state: Mapping[str, Array]) -> None:
        """Turn the inputs that stand for parameters into constants, and add those that were made."""
        names = {name for node in self.graph.node for name in node.input}
        image = next(entry for entry in self.graph.input if entry.name == IMAGE)
        parameters = [entry.name for entry in self.graph.input if entry.name != IMAGE and entry.name in names]
        image = onnx.ValueInfoProto.FromString(image.SerializeToString())
        if lost := [name for name in parameters if name not in state]:
            raise WorkError(f"The version has no parameter {lost[0]!r}, which its network needs; export it anew.")
        del self.graph.input[:]
        self.graph.input.append(image)
        for name in parameters:
            self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(state[name]), name))
        for name, value in self.constants.items():
            if name in names:
                self.graph.initializer.append(
                    numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
                )


def grid_of(bounds: ActivationRange) -> tuple[float, int]:
    """Return scale and uint8 zero point of a range; a signed grid is the same one, its integers 128 higher."""
    extent = bounds.high - bounds.low
    scale = max(extent / 255, float(np.finfo(np.float32).tiny)) if extent else 1.0
    return scale, min(max(-round(bounds.low / scale), 0), 255)


def _folded(norm: onnx.NodeProto, state: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return factor and shift of a BatchNorm: float64 ``[O]``, ``y = factor * x + shift``."""
    gamma, beta, mean, variance = (state[name].astype(np.float64) for name in norm.input[1:5])
    factor = gamma / np.sqrt(variance + float(attribute(norm, "epsilon", 1e-5)))
    return factor, beta - mean * factor


def _bias(own: Array | None, biases: Array | None, factor: Array | None, shift: Array | None) -> Array | None:
    """Return what is added at each level, float64 ``[levels, O]``; one level where all have the same, None for none."""
    if own is None and biases is None and shift is None:
        return None
    total: Array = np.zeros((1, 1)) if own is None else own.astype(np.float64)[None]
    if biases is not None:
        total = total + biases.astype(np.float64)
    return total if factor is None or shift is None else total * factor + shift


def _wide_enough(scale: Array, bias: Array, step: float, *, products: int) -> Array:
    """Return the scale, larger where a channel's bias would be beyond 32-bit integers on the grid of its products.

    Such a channel, whose BatchNorm all but switches it off, gives its bias alone; its products, counted too large, may
    come to so much of the bias, at most. Where that could be seen the scale stays, and the layer runs in float.
    """
    least = np.maximum(np.abs(bias).max(axis=0) / (step * (_LARGEST_BIAS - 1)), _LEAST_SCALE)
    if products * 127 * 255 / _LARGEST_BIAS > _UNSEEN:
        return scale
    return np.where(np.abs(scale) < least, np.copysign(least * (1 + 1e-6), scale), scale)


def _exchange(node: onnx.NodeProto, old: str, new: str) -> None:
    node.input[:] = [new if name == old else name for name in node.input]


def with_outputs(model: bytes, names: Sequence[str]) -> bytes:
    """Return a graph that answers with these tensors too."""
    proto = onnx.ModelProto.FromString(model)
    outputs = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    raw: bytes = proto.SerializeToString(deterministic=True)
    return raw
