"""A network as an ONNX graph that holds no weights: every parameter and float buffer is an input under its own name.

So nothing that follows from a weight can be folded away while the graph is made, and a trace depends on architecture,
arguments and input size alone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nestquant.engines.images import Preprocessing
from storage.manifest import ModelRecord
from workers.errors import ModelError, one_line
from workers.inputs import networks

if TYPE_CHECKING:
    import onnx

OPSET = 18
IR_VERSION = 8
IMAGE = "image"
ANSWER = "answer"


class _Bare(nn.Module):
    """A network whose state comes from outside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, state: dict[str, Tensor]) -> Any:
        """Run the network on ``image`` with the tensors of ``state`` in the place of its own."""
        return torch.func.functional_call(self.network, state, (image,))


def trace(model: ModelRecord, preprocessing: Preprocessing) -> onnx.ModelProto:
    """Return the network's graph for batches of any size: inputs `IMAGE` and the state dict's names, output `ANSWER`.

    Raises:
        ModelError: the exporter is not installed, or cannot take the network.
    """
    network = networks.build(model.library, model.arch, model.kwargs)
    title = f"{model.library} {model.arch}"
    state = _own_state(network)
    example = torch.zeros(2, *preprocessing.input_shape)
    shapes = {IMAGE: {0: torch.export.Dim("batch")}, "state": dict.fromkeys(state)}
    try:
        import onnxscript  # noqa: F401  # the exporter imports it late, and says it in its own words
    except ImportError as error:
        raise ModelError(
            f"{title}: the export to ONNX needs onnx and onnxscript; pip install 'nestquant-service[export]'."
        ) from error
    try:
        with _quiet():
            program = torch.export.export(_Bare(network), (example, state), dynamic_shapes=shapes, strict=False)
            onnx_program = torch.onnx.export(
                program, input_names=[IMAGE, *state], dynamo=True, optimize=True, opset_version=OPSET, verbose=False
            )
        assert onnx_program is not None, "the exporter returns a program where it is given no file"
        traced = onnx_program.model_proto
    except Exception as error:  # whatever the network's forward, or the exporter, raises
        cause = error.__cause__ or error
        raise ModelError(f"{title} cannot be exported to ONNX: {one_line(cause)}.") from error
    if len(traced.graph.output) != 1:
        raise ModelError(f"{title} cannot be exported: it has {len(traced.graph.output)} answers; expected one tensor.")
    return _plain(traced)


def _own_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the float tensors of the state dict, one that stands under several names once."""
    storages: set[tuple[int, torch.Size]] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.is_floating_point() and place not in storages:
            storages.add(place)
            state[name] = tensor.detach()
    return state


def _plain(traced: onnx.ModelProto) -> onnx.ModelProto:
    """Take out what says where and by whom the graph was made, so that its bytes follow from the network alone."""
    graph = traced.graph
    old = graph.output[0].name
    for node in graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        node.output[:] = [ANSWER if name == old else name for name in node.output]
        node.input[:] = [ANSWER if name == old else name for name in node.input]
    graph.output[0].name = ANSWER
    for described in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
        described.ClearField("metadata_props")
        described.ClearField("doc_string")
    graph.ClearField("value_info")
    graph.ClearField("metadata_props")
    graph.ClearField("doc_string")
    graph.name = "nestquant"
    traced.ClearField("metadata_props")
    traced.ClearField("doc_string")
    traced.producer_name, traced.producer_version = "nestquant", ""
    traced.ir_version = IR_VERSION
    return traced


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and warnings from the terminal: what matters of them is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
