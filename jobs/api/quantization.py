"""Quantize a network that is in memory: the plan and the arithmetic of a job, without a spec, a store or Ray."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jobs.api.blobs import StoreBlobs
from jobs.api.inputs import Batches, chunked, digest_tensors, gathered, preprocessing_of, traced_order
from jobs.api.model import NestedModel
from jobs.errors import SpecError
from jobs.result import sizes_of
from jobs.spec.file import parse_as
from jobs.spec.job import DEFAULT_SHARD_BYTES, METHOD_VERSIONS
from jobs.spec.quantize import ActivationSpec, QuantizeSpec, RecipeChoice
from jobs.stages.calibration import quantized_inputs, read_range
from jobs.stages.plan import Plan, plan_layers, protection_notes
from jobs.stages.publishing import TOOLS
from jobs.stages.reconstruction import without_data
from jobs.versions import tool_versions
from nestquant.modules import from_float
from nestquant.nested_weight import Residency
from nestquant.quantized_weight import QuantizedWeight
from nestquant.surgery import ExecutionOrder, find_layers
from nestquant.surgery import replace as put_layer
from storage.manifest import (
    MEDIA_TYPE_BASE,
    ActivationRange,
    CalibrationRecord,
    Manifest,
    ModelRecord,
    ShardGroup,
)
from storage.registry import Registry
from storage.shard import build_base
from storage.stores.memory import MemoryStore
from workers import runtime
from workers.calibrate import NOISE_BATCH, NOISE_SEED, Observed
from workers.equalize import EqualizedSite, equalized, equalized_recipe, sample_step
from workers.errors import DataError, ModelError, one_line, shown
from workers.forward import extents
from workers.in_memory import Solved, observe_inputs, round_alone, solve, synthesized
from workers.inputs.entry import LIBRARY
from workers.inputs.values import check_values
from workers.quantize import as_numpy, encode_group
from workers.synthesize import CHUNK, SAMPLES
from workers.tasks import GroupRecord


def quantize(
    model: nn.Module,
    *,
    bits: tuple[int, ...] = (8, 4),
    recipe: RecipeChoice = "auto",
    calibration: Batches | None = None,
    samples: int = 256,
    batch_size: int = 32,
    activations: int | Mapping[str, Any] | ActivationSpec | None = None,
    scheme: Literal["asymmetric", "symmetric"] = "asymmetric",
    ignore: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    protect: Literal["auto", "none"] = "auto",
    equalize: Literal["auto", "none"] = "auto",
    input_shape: tuple[int, ...] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    residency: Residency = "packed",
    name: str = "model",
) -> NestedModel:
    """Return a network with nested weights: the low-bit model lies inside the high-bit one.

    The float model is not changed. The integers are those that a job makes of the same network, data and recipe on one
    kind of machine.

    Args:
        model: any ``nn.Module``; its Conv1d, Conv2d, ConvTranspose2d, Linear and attention layers are quantized.
        bits: widths from full-bit down: ``(8, 4)`` nests 4 bits in 8, ``(8, 6, 4)`` has two upgrades.
        recipe: ``calibrated`` chooses integers by what the layers see on ``calibration``; ``paper`` by the weights
            alone; ``data_free`` makes images of its own. ``auto``: ``calibrated`` with ``calibration``; without,
            ``data_free`` where ``input_shape`` is that of an image, else ``paper``.
        calibration: inputs as the model takes them: a tensor ``[N, ...]``, or an iterable of batches such as a
            ``DataLoader``; of a batch that is a tuple or list the first item counts. No labels.
        samples: inputs taken of ``calibration``, at most; the first ones.
        batch_size: inputs run at once; the result may depend on it in the last bit.
        activations: bits of layer inputs, quantized per tensor (8), or settings of ``quantize.activations`` of a spec;
            None leaves them float.
        scheme: ``asymmetric`` or ``symmetric`` (what engines take).
        ignore: patterns of layer names that stay float (``"head*"``).
        overrides: other settings by pattern of layer names: ``{"fc": {"bits": (8,)}}``.
        protect: ``auto`` gives small layers up to 6 high bits, for 2% of the part-bit bytes at most (10%
            below 4 bits), except with ``paper``; ``none`` gives plain widths.
        equalize: ``auto`` brings the channels of activations closer to one size, with ``calibrated`` and
            ``activations``; ``none`` leaves them.
        input_shape: of one input, without the batch: ``(3, 224, 224)``. Needed by ``data_free``, and by activations
            without calibration.
        mean: what images are normalised by, one a channel, for ``data_free``; ImageNet's by default.
        std: as ``mean``.
        residency: ``packed`` keeps packed integers (least memory), ``expanded`` float weights beside them (fast).
        name: what the model is called in its manifest.

    Returns:
        The nested model on the CPU in eval mode, all levels in memory, running full-bit.

    Raises:
        SpecError: a setting is wrong: bits, a pattern, a recipe without what it needs.
        PlanError: there is no layer to quantize.
        CheckpointError: a weight holds NaN or infinity; the message names it.
        DataError: the calibration inputs cannot be used.
        ModelError: the model does not run on its inputs.
        WorkError: naming the layer that cannot be quantized.
    """
    spec = _spec(
        bits=bits,
        recipe=recipe,
        calibration=calibration,
        activations=activations,
        scheme=scheme,
        ignore=ignore,
        overrides=overrides,
        protect=protect,
        equalize=equalize,
        input_shape=input_shape,
    )
    title, network = type(model).__name__, _float_copy(model)
    state = {key: tensor for key, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    for key, tensor in state.items():
        check_values(title, key, tensor)
    inputs = gathered(calibration, samples)
    if inputs is not None and input_shape is not None and tuple(inputs.shape[1:]) != tuple(input_shape):
        raise DataError(
            f"calibration: inputs of {extents(inputs[0])}, input_shape says {' x '.join(map(str, input_shape))}."
        )
    example = inputs[:1] if inputs is not None else None if input_shape is None else torch.zeros(1, *input_shape)
    scan, order = find_layers(network), traced_order(network, example, title)
    plan = plan_layers(
        spec,
        scan,
        order.names,
        {key: (tuple(tensor.shape), tensor.nbytes) for key, tensor in state.items()},
        title=title,
        shard_bytes=DEFAULT_SHARD_BYTES,
        task_weights=1 << 62,
    )
    source_digest, sites = digest_tensors(state.items()), tuple[EqualizedSite, ...]()
    if spec.equalizes:
        assert inputs is not None, "checked by _spec"
        chosen = inputs[:: sample_step(len(inputs))]
        network, sites = equalized(network, torch.split(chosen, batch_size), title)
        state = {key: tensor for key, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    watched = network
    if spec.recipe == "data_free":
        assert input_shape is not None, "checked by _spec"
        watched, inputs = synthesized(network, preprocessing_of(input_shape, mean, std), title)
        samples, batch_size = SAMPLES, CHUNK
    ranges: Mapping[str, ActivationRange] = {}
    if spec.activations is not None:
        ranges = _ranges(watched, plan, spec.activations, inputs, batch_size=batch_size, input_shape=input_shape)
    if spec.recipe == "paper":
        solved = {one.piece.layer: one for one in round_alone(network, plan.whole_layers)}
    else:
        assert inputs is not None, "checked by _spec"
        solved = {
            one.piece.layer: one for one in solve(watched, plan.solved_layers, chunked(inputs, batch_size), title)
        }
    registry = Registry(MemoryStore())
    used = 0 if inputs is None or (spec.recipe == "paper" and not ranges) else len(inputs)
    calibrated = (
        None
        if not used
        else CalibrationRecord(
            source_digest=digest_tensors([("inputs", inputs)]) if inputs is not None else None,
            samples=used,
            skipped=0,
            observer="moments" if spec.activations is None else spec.activations.observer,
        )
    )
    manifest = _stored(
        registry,
        plan,
        spec,
        name=name,
        model=model,
        state=state,
        source_digest=source_digest,
        sites=sites,
        solved=solved,
        ranges=ranges,
        calibration=calibrated,
    )
    _nest(network, manifest, solved, residency)
    nested = runtime.NestedModel(network, manifest, StoreBlobs(registry), level=manifest.level_count() - 1)
    return NestedModel(nested, notes=[*protection_notes(plan), *_notes(order, solved, spec)])


def _spec(
    *,
    bits: tuple[int, ...],
    recipe: RecipeChoice,
    calibration: Batches | None,
    activations: int | Mapping[str, Any] | ActivationSpec | None,
    scheme: str,
    ignore: Sequence[str],
    overrides: Mapping[str, Mapping[str, Any]] | None,
    protect: str,
    equalize: str,
    input_shape: tuple[int, ...] | None,
) -> QuantizeSpec:
    """Return the recipe's section of a spec, checked like one."""
    makes_images = input_shape is not None and len(input_shape) == 3 and input_shape[0] in (1, 3)
    chosen = recipe
    if recipe == "auto":
        chosen = "calibrated" if calibration is not None else "data_free" if makes_images else "paper"
    if isinstance(activations, int):
        activations = {"bits": activations, "observer": "percentile" if calibration is not None else "sigma"}
    document = {
        "recipe": chosen,
        "bits": bits,
        "scheme": scheme,
        "ignore": (ignore,) if isinstance(ignore, str) else tuple(ignore),
        "overrides": dict(overrides or {}),
        "protect": protect,
        "equalize": equalize,
        "activations": activations,
    }
    spec = parse_as(QuantizeSpec, document, where="nestquant.quantize")
    if chosen == "calibrated" and calibration is None:
        raise SpecError("recipe 'calibrated' needs calibration=, a tensor or batches; 'paper' works without.")
    if chosen == "data_free" and calibration is not None:
        raise SpecError("recipe 'data_free' makes images of its own; leave calibration out, or say 'calibrated'.")
    if chosen == "data_free" and (input_shape is None or len(input_shape) != 3):
        raise SpecError("recipe 'data_free' needs input_shape=, such as (3, 224, 224).")
    if spec.activations is not None and calibration is None and chosen != "data_free":
        if spec.activations.observer != "sigma":
            raise SpecError(
                f"activations: observer {spec.activations.observer!r} needs calibration=; 'sigma' works without."
            )
        if input_shape is None:
            raise SpecError("activations without calibration need input_shape=, such as (3, 224, 224).")
    return spec


def _float_copy(model: nn.Module) -> nn.Module:
    """Return the model on the CPU in eval mode, in memory of its own but for the weights that are read alone."""
    if not isinstance(model, nn.Module):
        raise SpecError(f"nestquant.quantize takes a torch.nn.Module; got a {type(model).__name__}.")
    if meta := [key for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor) and tensor.is_meta]:
        raise SpecError(f"{type(model).__name__} has tensors without memory ({shown(meta)}); load its weights first.")
    try:
        sites = find_layers(model).layers
        if any(site.name == "" for site in sites):
            model = nn.Sequential(model)  # the root has no place to be put
            sites = find_layers(model).layers
        weights = [dict(model.named_parameters())[site.state_key] for site in sites]
        return copy.deepcopy(model, {id(weight): weight for weight in weights}).cpu().eval()
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"{type(model).__name__} cannot be copied: {one_line(error)}.") from error


def _ranges(
    network: nn.Module,
    plan: Plan,
    activations: ActivationSpec,
    inputs: Tensor | None,
    *,
    batch_size: int,
    input_shape: tuple[int, ...] | None,
) -> dict[str, ActivationRange]:
    names = [layer.name for layer in plan.layers]
    if inputs is None or activations.observer == "sigma":
        shape = tuple(inputs.shape[1:]) if inputs is not None else input_shape
        assert shape is not None, "checked by _spec"
        batches = [torch.randn((NOISE_BATCH, *shape), generator=torch.Generator().manual_seed(NOISE_SEED))]
    else:
        batches = list(torch.split(inputs, batch_size))
    histograms = observe_inputs(network, names, batches, "The model")
    parts = [Observed(histograms={key: one.to_dict() for key, one in histograms.items()}, samples=0, skipped=())]
    return {
        name: read_range(name, parts, activations, last=name == names[-1])
        for name in quantized_inputs(names, activations, parts)
    }


def _stored(
    registry: Registry,
    plan: Plan,
    spec: QuantizeSpec,
    *,
    name: str,
    model: nn.Module,
    state: Mapping[str, Tensor],
    source_digest: str,
    sites: Sequence[EqualizedSite],
    solved: Mapping[str, Solved],
    ranges: Mapping[str, ActivationRange],
    calibration: CalibrationRecord | None,
) -> Manifest:
    """Encode the version's blobs into a store, and return its manifest, which is there as version 1."""
    groups = []
    for group in plan.groups:
        pieces = [(piece, _rows(solved[piece.layer].weight, piece.start, piece.stop)) for piece in group.pieces]
        levels = tuple(registry.put_shard(shard) for shard in encode_group(pieces))
        groups.append(GroupRecord(index=group.index, levels=levels, pieces=()))
    base = [
        registry.put_blob(build_base({key: as_numpy(state[key]) for key in task.parameters}), MEDIA_TYPE_BASE)
        for task in plan.base
    ]
    layers = tuple(
        layer.model_copy(
            update={"activation": ranges.get(layer.name), "biases": solved[layer.name].weight.biases is not None}
        )
        for layer in plan.layers
    )
    float_bytes = sum(tensor.nbytes for tensor in state.values())
    draft = Manifest(
        name=name,
        version=1,
        model=ModelRecord(
            library=LIBRARY,
            arch=f"{type(model).__module__}:{type(model).__qualname__}",
            kwargs={},
            source_digest=source_digest,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        ),
        recipe={
            "method": METHOD_VERSIONS[spec.recipe],
            **spec.model_dump(mode="json"),
            **equalized_recipe(sites),
        },
        layers=layers,
        groups=tuple(ShardGroup(levels=record.levels) for record in groups),
        base=tuple(base),
        kept_float=plan.kept_float,
        calibration=calibration,
        sizes=sizes_of(groups, sum(blob.size_bytes for blob in base), layers, float_bytes),
        tool_versions=tool_versions(TOOLS),
    )
    registry.publish(draft)
    return registry.resolve(name, 1).manifest


def _nest(network: nn.Module, manifest: Manifest, solved: Mapping[str, Solved], residency: Residency) -> None:
    for record in manifest.layers:
        activation = None if record.activation is None else runtime.activation_qparams(record.activation)
        module, weight = network.get_submodule(record.name), solved[record.name].weight
        put_layer(network, record.name, from_float(module, weight, residency=residency, activation=activation))


def _rows(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Return some output channels of a layer."""
    grid = replace(
        weight.qparams, scale=weight.qparams.scale[start:stop], zero_point=weight.qparams.zero_point[start:stop]
    )
    parts = tuple(part[start:stop] for part in weight.parts)
    biases = None if weight.biases is None else weight.biases[:, start:stop].contiguous()
    return QuantizedWeight(grid, parts, weight.config, biases)


def _notes(order: ExecutionOrder, solved: Mapping[str, Solved], spec: QuantizeSpec) -> list[str]:
    unsolved = ((layer, one.without) for layer, one in solved.items() if one.without is not None)
    notes = [] if spec.recipe == "paper" else list(without_data(unsolved))
    if order.never_ran:
        notes.append(f"{len(order.never_ran)} layers never ran: {shown(list(order.never_ran))}.")
    return notes
