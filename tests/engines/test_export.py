"""Versions exported to ONNX: what is published, that it computes what torch computes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from pydantic import ValidationError

from jobs.driver import run_job
from jobs.published import export_published
from jobs.spec.job import JobSpec
from jobs.spec.quantize import QuantizeSpec
from nestquant.engines.ort import options, session_with
from nestquant.engines.weights import engine_tensors
from storage.device import Device, StoreSource
from storage.engine_layout import build_layout, read_layout
from storage.errors import InvalidShard
from storage.manifest import LayerRecord, Manifest, Piece, canonical_json
from storage.registry import Registry
from storage.retention import fsck, gc
from tests.engines.published import images, layout_of, publish, spec_of, torch_answers
from workers.engines.export import RangeImages
from workers.engines.graph import EngineGraph
from workers.errors import WorkError
from workers.executor import InProcessExecutor


def ort_answers(
    registry: Registry, manifest: Manifest, inputs: np.ndarray, *, level: int, in_float: bool = False
) -> np.ndarray:
    """Return what ONNX Runtime answers; ``in_float``: the graph as it is written, with its grids, by float kernels."""
    layout, values = layout_of(registry, manifest)
    engine = manifest.engine("onnx")
    assert engine is not None
    tensors = {
        tensor.name: array for tensor, array in engine_tensors(manifest, layout, values, registry.get_blob, level)
    }
    chosen = options(threads=1, float_weights=in_float or not engine.activations, exact=True)
    return session_with(registry.get_blob(engine.graph), tensors, chosen).run(None, {"image": inputs})[0]


@pytest.mark.parametrize(
    "quantize",
    [
        {"recipe": "paper"},
        {"recipe": "calibrated"},
        {"bits": [8, 6, 4], "ignore": ["conv1.0"], "overrides": {"fc": {"bits": [8]}}},
    ],
    ids=["paper", "biases by level", "three levels, one layer plain, one float"],
)
def test_weights_alone_compute_what_torch_computes(tmp_path: Path, quantize: dict[str, object]) -> None:
    registry, manifest = publish(spec_of(tmp_path, **quantize))
    inputs = images(6)
    answers = []
    for level in range(manifest.level_count()):
        seen = ort_answers(registry, manifest, inputs, level=level)
        wanted = torch_answers(registry, manifest, inputs, level=level, activations=False)
        np.testing.assert_allclose(seen, wanted, atol=2e-5 * np.abs(wanted).max())
        answers.append(seen)
    # Levels differ by far more than the tolerance: none passed for another.
    assert np.abs(answers[0] - answers[-1]).max() > 1e-3 * np.abs(answers[0]).max()


def test_activations_run_on_integers_and_stay_near_torch(tmp_path: Path) -> None:
    registry, manifest = publish(spec_of(tmp_path, activations={"bits": 8}))
    engine, inputs = manifest.engine("onnx"), images(8)
    assert engine is not None
    assert engine.activations
    for level in range(2):
        seen = ort_answers(registry, manifest, inputs, level=level)
        wanted = torch_answers(registry, manifest, inputs, level=level, activations=True)
        # Kernels of integers compute what the graph says: not one step of a grid is missed.
        written = ort_answers(registry, manifest, inputs, level=level, in_float=True)
        np.testing.assert_allclose(seen, written, atol=2e-6 * np.ptp(wanted))
        # Sums and the image are quantized too, which torch leaves float; the network is noise, and amplifies that:
        # 0.103 and 0.108 were measured. Real networks have bounds of their own in test_networks.py.
        assert np.abs(seen - wanted).max() < 0.13 * np.ptp(wanted)
    graph = onnx.load_from_string(registry.get_blob(engine.graph))
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    made_by = {name: node.op_type for node in graph.graph.node for name in node.output}
    assert len(convolutions) == sum(layer.kind == "conv2d" for layer in manifest.layers)
    assert {made_by[name] for node in convolutions for name in node.input} == {"DequantizeLinear"}


def test_a_version_with_a_graph_is_kept_checked_and_pulled_whole(tmp_path: Path) -> None:
    document = spec_of(tmp_path)
    registry, manifest = publish(document)
    engine = manifest.engine("onnx")
    assert engine is not None
    assert manifest.schema_version == 2
    blobs = {engine.graph.digest, engine.layout.digest}
    assert blobs < {blob.digest for blob in manifest.descriptors()}
    gc(registry.store, grace_s=0, dry_run=False)
    gc(registry.store, grace_s=0, dry_run=False)
    assert not fsck(registry.store).problems
    device = Device(tmp_path / "device", StoreSource(registry.store), unsigned=True)
    device.pull(manifest.name)
    assert all(device.blob_path(blob).stat().st_size == blob.size_bytes for blob in (engine.graph, engine.layout))
    # The graph holds none of the weights: they would show in its size.
    assert engine.graph.size_bytes < 0.4 * manifest.sizes.weights
    again = run_job(JobSpec.model_validate(document), InProcessExecutor())
    assert (again.version, again.created) == (manifest.version, False)


def test_a_published_version_is_exported_with_its_own_shards(tmp_path: Path) -> None:
    document = spec_of(tmp_path, activations={"bits": 8})
    exported = document.pop("export")
    registry, before = publish(document)
    assert before.schema_version == 1
    assert b"engines" not in canonical_json(before)
    calibration = document["calibration"]
    ranges = RangeImages(
        data=calibration["data"], samples=calibration["samples"], batch_size=8, observer="percentile", percentile=99.99
    )
    again = export_published(registry, registry.resolve("tiny", "latest"), "onnx", images=ranges, tags=("latest",))
    after = registry.resolve("tiny").manifest
    assert (again.published.version, again.engine) == (after.version, after.engine("onnx"))
    assert after.version == 2
    assert (after.groups, after.base, after.layers) == (before.groups, before.base, before.layers)
    # A job that exports comes to the same graph.
    _, at_once = publish({**document, "export": exported, "store": {"uri": str(tmp_path / "other")}})
    assert at_once.engines == after.engines


def test_what_needs_images_stays_float_without_them(tmp_path: Path) -> None:
    document = spec_of(tmp_path, activations={"bits": 8})
    del document["export"]
    registry, _ = publish(document)
    export_published(registry, registry.resolve("tiny", "latest"), "onnx", images=None, tags=("latest",))
    manifest = registry.resolve("tiny").manifest
    layout, _ = layout_of(registry, manifest)
    assert [(kept.name, kept.reason) for kept in layout.kept_float] == [
        (manifest.layers[0].name, "no range of its input is known")
    ]
    inputs = images(4)
    wanted = torch_answers(registry, manifest, inputs, level=1, activations=True)
    seen = ort_answers(registry, manifest, inputs, level=1)
    assert np.abs(seen - wanted).max() < 0.13 * np.ptp(wanted)


def test_asymmetric_weights_are_refused_before_work_and_by_layer(tmp_path: Path) -> None:
    document = spec_of(tmp_path, scheme="asymmetric")
    with pytest.raises(ValidationError, match=r"quantize\.scheme is 'asymmetric'; set 'scheme: symmetric'"):
        JobSpec.model_validate(document)
    one = spec_of(tmp_path, overrides={"fc": {"scheme": "asymmetric"}})
    with pytest.raises(ValidationError, match=r"overrides\['fc'\]\.scheme is 'asymmetric'"):
        JobSpec.model_validate(one)
    narrow = spec_of(tmp_path, activations={"bits": 6})
    with pytest.raises(ValidationError, match=r"activations of 8 bits, quantize\.activations\.bits is 6"):
        JobSpec.model_validate(narrow)
    del document["export"]
    registry, manifest = publish(document)
    first = manifest.layers[0].name
    with pytest.raises(WorkError, match=f"Layer '{first}' is asymmetric: engines take symmetric weights alone"):
        export_published(registry, registry.resolve("tiny", "latest"), "onnx", images=None)
    assert registry.versions("tiny") == [1]


def test_symmetric_weights_are_the_default_where_engines_are_asked_for(tmp_path: Path) -> None:
    document = spec_of(tmp_path)
    digests = {"source_digest": "sha256:" + "0" * 64, "calibration_digest": None}
    explicit = JobSpec.model_validate(document)
    del document["quantize"]["scheme"]
    unsaid = JobSpec.model_validate(document)
    assert unsaid.quantize.scheme == "symmetric"
    assert unsaid.identity(**digests) == explicit.identity(**digests)
    whole = QuantizeSpec(recipe="paper")
    assert JobSpec.model_validate({**document, "quantize": whole}).quantize.scheme == "symmetric"
    del document["quantize"]
    assert JobSpec.model_validate(document).quantize.scheme == "symmetric"
    del document["export"]
    assert JobSpec.model_validate(document).quantize.scheme == "asymmetric"
    assert JobSpec.model_validate({**document, "export": None, "quantize": whole}).quantize == whole


def test_a_transposed_convolution_of_groups_is_refused_by_name() -> None:
    node = onnx.helper.make_node("ConvTranspose", ["image", "up.weight"], ["answer"], group=2)
    given = [onnx.helper.make_tensor_value_info(name, 1, None) for name in ("image", "up.weight")]
    answer = [onnx.helper.make_tensor_value_info("answer", 1, None)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", given, answer))
    layer = LayerRecord(
        name="up",
        kind="conv_transpose2d",
        parameter="up.weight",
        shape=(4, 3, 2, 2),
        groups=2,
        bits=(8, 4),
        scheme="symmetric",
        pieces=(Piece(group=0, start=0, stop=6),),
    )
    with pytest.raises(WorkError, match=r"Layer 'up': ONNX has no scale for each output channel .* of 2 groups"):
        EngineGraph(model, [layer])


def test_a_negative_batchnorm_makes_the_scale_negative_and_clips_nothing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    document = spec_of(tmp_path)
    path = Path(document["model"]["checkpoint"])
    state = load_file(path)
    norms = [name for name in state if name.endswith("running_var")]
    for name in norms:
        gamma = state[name.replace("running_var", "weight")]
        gamma[::2] = -gamma[::2].abs() - 0.5
    save_file(state, path)
    registry, manifest = publish(document)
    for level in range(2):
        seen = ort_answers(registry, manifest, images(4), level=level)
        wanted = torch_answers(registry, manifest, images(4), level=level, activations=False)
        np.testing.assert_allclose(seen, wanted, atol=2e-5 * np.abs(wanted).max())


def test_a_layout_is_held_against_the_manifest(tmp_path: Path) -> None:
    registry, manifest = publish(spec_of(tmp_path, recipe="calibrated"))
    layout, values = layout_of(registry, manifest)
    assert read_layout(build_layout(layout, values), manifest)[0] == layout
    weight = next(tensor for tensor in layout.tensors if tensor.role == "weight")
    bias = next(tensor for tensor in layout.tensors if tensor.role == "bias")
    assert bias.levels == 2

    def refused(message: str, *changed: object, kept: dict[str, np.ndarray] = values) -> None:
        wrong = layout.model_copy(update={"tensors": changed})
        with pytest.raises(InvalidShard, match=message):
            read_layout(build_layout(wrong, kept), manifest)

    refused("is of layer 'nobody', which is not there", weight.model_copy(update={"layer": "nobody"}))
    refused("its layer", weight.model_copy(update={"shape": (*weight.shape[:-1], 7)}))
    refused("no multiple of 64", weight.model_copy(update={"offset": 3}))
    refused("stands twice", weight, weight)
    refused("not there, expected", bias, kept={})
    refused("begins within", weight, bias.model_copy(update={"offset": 0}))


def test_sessions_are_silent_and_do_not_spin() -> None:
    plain, counted = options(), options(threads=3, float_weights=True, exact=True)
    for chosen in (plain, counted):
        assert chosen.log_severity_level == 4
        assert chosen.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert (plain.intra_op_num_threads, counted.intra_op_num_threads) == (0, 3)
    for key in ("session.disable_quant_qdq", "session.x64quantprecision"):
        assert counted.get_session_config_entry(key) == "1"
        with pytest.raises(RuntimeError, match=key):
            plain.get_session_config_entry(key)
