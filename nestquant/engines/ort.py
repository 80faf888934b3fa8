"""Sessions of ONNX Runtime over a graph whose weights come from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnxruntime as ort


def options(*, threads: int | None = None, float_weights: bool = False, exact: bool = False) -> ort.SessionOptions:
    """Return the options of a session that is silent and, with ``threads``, uses so many.

    ``float_weights``: a graph that quantizes no activations dequantizes its weights once, when the session is made.
    ``exact``: no product of two integers saturates on x86 without VNNI, where ONNX Runtime adds pairs of them in 16
    bits; slower there, and without effect elsewhere, or where weights are inputs of the graph.
    """
    chosen = ort.SessionOptions()
    chosen.log_severity_level = 4
    if threads is not None:
        chosen.intra_op_num_threads = threads
    # No thread of a session spins while it has nothing to do: a device has better uses for its cores.
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if exact:
        chosen.add_session_config_entry("session.x64quantprecision", "1")
    if float_weights:
        chosen.add_session_config_entry("session.disable_quant_qdq", "1")
    return chosen


def session_with(
    graph: bytes, tensors: Mapping[str, npt.NDArray[Any]], chosen: ort.SessionOptions
) -> ort.InferenceSession:
    """Return a session whose weights are those given; it copies them."""
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in tensors.values()]
    chosen.add_external_initializers(list(tensors), values)
    return ort.InferenceSession(graph, chosen, providers=["CPUExecutionProvider"])
