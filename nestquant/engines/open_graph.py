"""A graph whose weights are constants, as a graph that is given them anew on every run.

ONNX's messages by their numbers in onnx.proto (IR version 8), as far as they are touched here: protobuf keeps whatever
fields it has no name for as they are. The package ``onnx`` would be a third again of what a device installs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from storage.engine_layout import Layout

_ELEMENT_TYPES = {"float32": 1, "int8": 3, "int32": 6}
"""TensorProto.DataType."""
_PACKAGE = "nestquant.engines"
_Field = descriptor_pb2.FieldDescriptorProto
_MESSAGES: dict[str, list[tuple[str, int, int, bool, str | None]]] = {
    "Dimension": [("dim_value", 1, _Field.TYPE_INT64, False, None)],
    "Shape": [("dim", 1, _Field.TYPE_MESSAGE, True, "Dimension")],
    "TensorType": [
        ("elem_type", 1, _Field.TYPE_INT32, False, None),
        ("shape", 2, _Field.TYPE_MESSAGE, False, "Shape"),
    ],
    "Type": [("tensor_type", 1, _Field.TYPE_MESSAGE, False, "TensorType")],
    "ValueInfo": [("name", 1, _Field.TYPE_STRING, False, None), ("type", 2, _Field.TYPE_MESSAGE, False, "Type")],
    "Tensor": [("name", 8, _Field.TYPE_STRING, False, None)],
    "Graph": [
        ("initializer", 5, _Field.TYPE_MESSAGE, True, "Tensor"),
        ("input", 11, _Field.TYPE_MESSAGE, True, "ValueInfo"),
    ],
    "Model": [("graph", 7, _Field.TYPE_MESSAGE, False, "Graph")],
}


def with_weights_as_inputs(graph: bytes, layout: Layout) -> bytes:
    """Return the graph with every tensor of the layout an input of the same name, in the place of a constant.

    Raises:
        google.protobuf.message.DecodeError: the bytes are no graph.
    """
    model = _model_type().FromString(graph)
    names = {tensor.name for tensor in layout.tensors}
    constants = [constant for constant in model.graph.initializer if constant.name not in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    for tensor in layout.tensors:
        described = model.graph.input.add(name=tensor.name)
        described.type.tensor_type.elem_type = _ELEMENT_TYPES[tensor.dtype]
        for side in tensor.shape:
            described.type.tensor_type.shape.dim.add(dim_value=side)
    raw: bytes = model.SerializeToString(deterministic=True)
    return raw


@cache
def _model_type() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="nestquant/engines/graph.proto", package=_PACKAGE, syntax="proto3")
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, number, kind, repeated, of in fields:
            field = described.field.add(name=name, number=number, type=kind)
            field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            if of is not None:
                field.type_name = f".{_PACKAGE}.{of}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))
