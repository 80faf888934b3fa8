"""Where a network's layers are in its traced graph, and which of its tensors an engine has to have as integers.

Nothing is changed here: each function reads nodes in the order in which they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx
from onnx import helper

from storage.manifest import LayerRecord
from workers.engines.trace import ANSWER
from workers.errors import WorkError

Nodes = Sequence[onnx.NodeProto]
_RECTIFIERS = ("Relu", "Clip")
_JOINS = {"Add": 2, "Concat": None, "AveragePool": 1, "MaxPool": 1, "GlobalAveragePool": 1}
"""What the engine does on integers where all of the first so many inputs are integers."""


@dataclass
class Site:
    """Where a layer is in the graph: the node that multiplies by its weight, and how.

    ``direct``: the node takes the weight as it is, so that it can run on integers. ``transposed`` names the result of a
    Transpose that the integers stand for.
    """

    record: LayerRecord
    node: onnx.NodeProto
    order: Literal["out_in", "in_out"]
    direct: bool
    transposed: str | None = None

    @property
    def axis(self) -> int:
        """Return the axis of the output channel in the tensor of the graph."""
        return 0 if self.order == "out_in" else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor of the graph."""
        shape = self.record.shape
        return (shape[1], shape[0], *shape[2:]) if self.transposed is not None else shape


def consumers(nodes: Nodes, name: str) -> list[onnx.NodeProto]:
    """Return the nodes that read a tensor, in order."""
    return [node for node in nodes if name in node.input]


def find_site(nodes: Nodes, layer: LayerRecord) -> Site | None:
    """Return where a layer is; None where the network never uses it. Raises `WorkError` naming the layer."""
    users = consumers(nodes, layer.parameter)
    if not users:
        return None
    node = users[0]
    place = list(node.input).index(layer.parameter)
    alone = len(users) == 1 and list(node.input).count(layer.parameter) == 1
    if alone and node.op_type == "Conv" and place == 1:
        return Site(layer, node, "out_in", direct=True)
    if alone and node.op_type == "ConvTranspose" and place == 1:
        if layer.groups != 1:
            raise WorkError(
                f"Layer {layer.name!r}: ONNX has no scale for each output channel of a transposed convolution of "
                f"{layer.groups} groups; leave it float (quantize.ignore), or export for no engine."
            )
        return Site(layer, node, "in_out", direct=True)
    if alone and node.op_type == "Gemm" and place == 1 and attribute(node, "transB", 0) == 1:
        return Site(layer, node, "out_in", direct=True)
    if alone and node.op_type == "Transpose" and list(attribute(node, "perm", [1, 0])) == [1, 0]:
        products = consumers(nodes, node.output[0])
        if len(products) == 1 and products[0].op_type == "MatMul" and products[0].input[1] == node.output[0]:
            return Site(layer, products[0], "in_out", direct=True, transposed=node.output[0])
    if layer.kind == "conv_transpose2d":
        raise WorkError(
            f"Layer {layer.name!r}: its weight is used by {node.op_type}, not by a transposed convolution alone; "
            "leave it float (quantize.ignore), or export for no engine."
        )
    if layer.biases:
        raise WorkError(
            f"Layer {layer.name!r}: each level has a bias of its own, and its weight is used by {node.op_type}, "
            "where it cannot be added; leave it float (quantize.ignore), or export for no engine."
        )
    return Site(layer, node, "out_in", direct=False)


def tensors_between(nodes: Nodes, sites: Sequence[Site]) -> list[str]:
    """Return the tensors that an engine has to have as integers to run its layers on integers: what convolutions
    give, and what adds, joins and pools such tensors. A tensor that layers alone read is on their grid already.
    """
    inputs = {site.node.input[0] for site in sites if site.direct}
    readers = {id(site.node) for site in sites if site.direct}
    convolutions = {id(site.node) for site in sites if site.direct and site.node.op_type == "Conv"}
    integers, between = set(inputs), list[str]()
    for node in nodes:
        joined = node.op_type in _JOINS and all(name in integers for name in node.input[: _JOINS[node.op_type]])
        if id(node) not in convolutions and not joined:
            continue
        name = _rectified(nodes, node)
        integers.add(name)
        if name != ANSWER and any(id(user) not in readers for user in consumers(nodes, name)):
            between.append(name)
    return between


def _rectified(nodes: Nodes, node: onnx.NodeProto) -> str:
    """Return what a node gives once BatchNorm and rectifier, which the engine fuses, had it."""
    norm = norm_behind(nodes, node)
    name = str(node.output[0] if norm is None else norm.output[0])
    users = consumers(nodes, name)
    return str(users[0].output[0]) if len(users) == 1 and users[0].op_type in _RECTIFIERS else name


def norm_behind(nodes: Nodes, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """Return the BatchNorm that takes what a convolution gives, and alone does."""
    if node.op_type not in ("Conv", "ConvTranspose") or node.output[0] == ANSWER:
        return None
    users = consumers(nodes, node.output[0])
    return users[0] if len(users) == 1 and users[0].op_type == "BatchNormalization" else None


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return the value of a node's attribute, or the default that ONNX states for it."""
    stated = next((one for one in node.attribute if one.name == name), None)
    return default if stated is None else helper.get_attribute_value(stated)
