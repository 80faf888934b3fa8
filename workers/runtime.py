"""A network that runs from a pulled version: built by name, its weights taken from shards, part-bit or full-bit.

Every file is opened once, read whole and hashed before a byte of it is used. A level is decoded and checked for every
layer before the first layer takes it, so that a network runs at one level or at another, never at a mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from nestquant.config import NestConfig
from nestquant.engines.images import Preprocessing
from nestquant.modules import NestedLayer, from_packed, resident_bytes, set_residency
from nestquant.nested_weight import Residency
from nestquant.observers import ActivationQParams
from nestquant.packing import pack
from nestquant.surgery import channel_first_shape, find_layers, replace
from storage.device.cache import read_blob
from storage.errors import Damaged
from storage.files import open_regular
from storage.manifest import ActivationRange, Descriptor, LayerRecord, Manifest
from storage.shard import Int8Array, Shard, UInt8Array, read_base, read_shard
from workers.errors import ArtifactError, ModelError, shown, system_line
from workers.inputs import networks
from workers.pieces import Grid, PieceCode

BlobPath = Callable[[Descriptor], Path]

_REGISTERED_MORE = 4
"""A network may register a tensor anew while it is built (a classifier that is replaced), and has buffers too."""


@dataclass
class NestedModel:
    """A network and where its shards lie.

    ``upgrade`` and ``downgrade`` page levels in and out, one shard decoded at a time.
    """

    network: nn.Module
    manifest: Manifest
    blobs: Blobs
    level: int = 0

    @property
    def preprocessing(self) -> Preprocessing:
        """Return how images become inputs: as the manifest says, else as the library does."""
        record, model = self.manifest.preprocessing, self.manifest.model
        if record is not None:
            return Preprocessing.from_record(record)
        return networks.default_preprocessing(model.library, self.network, model.kwargs)

    def layers(self) -> Iterator[tuple[LayerRecord, NestedLayer]]:
        """Yield each quantized layer's record and its module, in execution order."""
        for record in self.manifest.layers:
            module = self.network.get_submodule(record.name)
            if not isinstance(module, NestedLayer):
                raise ArtifactError(
                    f"Layer {record.name!r} of the network is {type(module).__name__}; expected a nested layer."
                )
            yield record, module

    def upgrade(self, level: int | None = None) -> None:
        """Page in the low shards up to ``level`` (default: all).

        Whatever goes wrong, and wherever, the network runs at the level at which it ran before.

        Raises:
            ArtifactError: a shard is not here, lacks a layer, or its integers do not belong to the levels below.
            storage.StorageError: a shard is damaged, or is not one.
        """
        before = self.level
        try:
            for step in range(before + 1, (self.manifest.level_count() if level is None else level + 1)):
                # All of the level first: what is taken below is in memory, and was checked.
                ready = [(self._nested(record), packed) for record, packed in self._checked_level(step)]
                for layer, part in ready:
                    layer.nested.accept(part)
                self.level = step
        except BaseException:
            self._page_out(before)
            self.level = before
            raise

    def downgrade(self, level: int = 0) -> None:
        """Page out the low shards above ``level``; their memory is free afterwards."""
        self._page_out(level)
        self.level = min(self.level, level)

    def to_level(self, level: int) -> None:
        """Page in or out until the network runs at ``level``."""
        if level > self.level:
            self.upgrade(level)
        else:
            self.downgrade(level)

    def resident_bytes(self) -> int:
        """Return the bytes of every parameter and buffer that the network holds now."""
        return resident_bytes(self.network)

    def set_residency(self, residency: Residency) -> None:
        """Keep weights packed (least memory), or expanded beside them (fast)."""
        set_residency(self.network, residency)

    def quantize_activations(self, *, enabled: bool) -> None:
        """Quantize layer inputs by the manifest's ranges, or run with float activations."""
        for record, module in self.layers():
            module.activation = (
                activation_qparams(record.activation) if enabled and record.activation is not None else None
            )

    def _checked_level(self, level: int) -> Iterator[tuple[LayerRecord, torch.Tensor]]:
        for record, packed in _packed_level(self.manifest, self.blobs, level):
            try:
                yield record, self._nested(record).nested.check_next(packed)
            except ValueError as error:
                raise ArtifactError(
                    f"{self.manifest.name} version {self.manifest.version}: layer {record.name!r}: a low shard does "
                    f"not fit: {error}"
                ) from error

    def _page_out(self, level: int) -> None:
        for record, module in self.layers():
            while module.nested.level_count - 1 > min(level, len(record.bits) - 1):
                module.page_out()

    def _nested(self, record: LayerRecord) -> NestedLayer:
        module = self.network.get_submodule(record.name)
        assert isinstance(module, NestedLayer)
        return module


def activation_qparams(record: ActivationRange) -> ActivationQParams:
    """Return the method's view of a range that the manifest keeps."""
    return ActivationQParams(low=record.low, high=record.high, bits=record.bits, signed=record.signed)


class Blobs(Protocol):
    """The blobs of one version, wherever they lie."""

    def read(self, blob: Descriptor, /) -> bytes:
        """Return a blob's bytes, whole and verified.

        Raises:
            ArtifactError, storage.StorageError: it is not there, or damaged; the message says which.
        """
        ...


@dataclass(frozen=True)
class FileBlobs:
    """The files of one version, each read whole and, unless the caller has done it, hashed."""

    manifest: Manifest
    blob_path: BlobPath
    verify: bool

    def read(self, blob: Descriptor) -> bytes:
        """Return a blob's bytes; the errors say which file it is and what brings it anew."""
        where, path = f"{self.manifest.name} version {self.manifest.version}", self.blob_path(blob)
        try:
            if self.verify:
                return read_blob(path, blob)
            with open_regular(path) as file:
                return file.read()
        except Damaged as error:
            raise Damaged(
                f"{where}: {error}; pull or upgrade it again: what is damaged comes anew", key=blob.digest
            ) from error
        except OSError as error:
            raise ArtifactError(
                f"{where}: cannot read {path}: {system_line(error)}; pull or upgrade it again."
            ) from error


def load(
    manifest: Manifest,
    blob_path: BlobPath,
    *,
    level: int = 0,
    residency: Residency = "packed",
    verify: bool = True,
    network: nn.Module | None = None,
) -> NestedModel:
    """Build the network of a version and page in its shards up to ``level``.

    Args:
        manifest: the version, as resolved and trusted by the caller.
        blob_path: gives the local file of a blob.
        level: 0 runs part-bit; ``manifest.level_count() - 1`` runs full-bit.
        residency: ``packed`` keeps packed integers and unpacks on each use; ``expanded`` keeps weights ready.
        verify: hash every file as it is read; False takes the files as they are, now and in later upgrades.
        network: a float network of the version's architecture, whose weights are replaced; by default it is built by
            name. One of the publisher's own has to be given, unless this process trusts it (`workers.inputs.own`).

    Raises:
        ArtifactError: the network is not that of the manifest; a file is not here; a tensor is missing, too many, or
            has the wrong length.
        storage.StorageError: a file is damaged, or is no shard.
    """
    blobs = FileBlobs(manifest, blob_path, verify=verify)
    return fill(outlined(manifest, network), manifest, blobs, level=level, residency=residency)


def outlined(manifest: Manifest, network: nn.Module | None = None) -> nn.Module:
    """Return the float network that a manifest names, or the one given where it is the same; its weights are anything.

    Raises:
        ArtifactError: the network is not that of the manifest, or nobody knows how to build it.
    """
    _check_outline(manifest, network)
    if network is not None:
        return network
    return networks.build(manifest.model.library, manifest.model.arch, manifest.model.kwargs)


def fill(
    network: nn.Module, manifest: Manifest, blobs: Blobs, *, level: int = 0, residency: Residency = "packed"
) -> NestedModel:
    """Put a version into a float network of its architecture, in place, up to ``level``, and return it in eval mode.

    Raises as ``load`` does.
    """
    _load_base(network, manifest, blobs)
    grids: dict[str, Grid] = {}
    for record, packed in _packed_level(manifest, blobs, 0, grids):
        module, grid = network.get_submodule(record.name), grids.pop(record.name)
        try:
            nested = from_packed(
                module,
                qparams=grid.qparams,
                bits=record.bits,
                parts=[packed],
                residency=residency,
                biases=grid.biases,
            )
        except (TypeError, ValueError) as error:
            raise ArtifactError(
                f"{manifest.name} version {manifest.version}: layer {record.name!r}: {error}"
            ) from error
        replace(network, record.name, nested)
    model = NestedModel(network.eval(), manifest, blobs)
    model.upgrade(level)
    return model


def _check_outline(manifest: Manifest, network: nn.Module | None) -> None:
    """Build the network that the manifest describes without memory, and compare: a manifest is a stranger's word, and
    what its arguments ask for is taken only where it is what its layers and its count say.
    """
    model, where = manifest.model, f"{manifest.name} version {manifest.version}"
    most = _REGISTERED_MORE * (model.parameters + 1_000_000)
    try:
        outline = (
            networks.build(model.library, model.arch, model.kwargs, meta=True, most_values=most)
            if network is None
            else network
        )
    except ModelError as error:
        raise ArtifactError(f"{where}: {error}") from error
    count = sum(parameter.numel() for parameter in outline.parameters())
    if count != model.parameters:
        raise ArtifactError(
            f"{where}: {model.arch} with the manifest's arguments has {count:,} parameters, the manifest says "
            f"{model.parameters:,}."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    for record in manifest.layers:
        if shapes.get(record.parameter) != record.shape:
            raise ArtifactError(
                f"{where}: layer {record.name!r}: the network's {record.parameter!r} is "
                f"{shapes.get(record.parameter, 'not there')}, the manifest says {record.shape}."
            )


def _load_base(network: nn.Module, manifest: Manifest, blobs: Blobs) -> None:
    state: dict[str, torch.Tensor] = {}
    for descriptor in manifest.base:
        tensors = read_base(blobs.read(descriptor))
        state |= {name: torch.from_numpy(array) for name, array in tensors.items()}
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ArtifactError(
            f"{manifest.name} version {manifest.version}: the base does not fit {manifest.model.arch}: {error}"
        ) from error
    # A module that stands under two names has its weight twice in the state dict, and once in the shards.
    names = {record.name for record in manifest.layers}
    quantized = {key for site in find_layers(network).layers if site.name in names for key in site.state_keys}
    lost = sorted(name for name in set(missing) - quantized if not name.endswith("num_batches_tracked"))
    if lost or unexpected:
        raise ArtifactError(
            f"{manifest.name} version {manifest.version}: the base blobs do not fit {manifest.model.arch}: "
            f"{len(lost)} parameters missing ({shown(lost)}), {len(unexpected)} unexpected ({shown(unexpected)})."
        )


def _packed_level(
    manifest: Manifest, blobs: Blobs, level: int, grids: dict[str, Grid] | None = None
) -> Iterator[tuple[LayerRecord, UInt8Array]]:
    """Yield every layer that has this level with its packed integers; shards are opened one after the other, in
    order.

    With level 0 comes each layer's grid, set in ``grids`` before the layer is yielded.
    """
    shards = _ShardCursor(manifest, blobs, level)
    for record in manifest.layers:
        if level >= len(record.bits):
            continue
        bits = NestConfig(bits=record.bits).level_bits[level]
        row_shape = channel_first_shape(record.shape, record.kind, record.groups)[1:]
        rows: list[Int8Array] = []
        beside: list[Grid] = []
        for piece in record.pieces:
            shard, code = shards.at(piece.group), PieceCode(record.name, piece.start, piece.stop)
            rows.append(code.read_integers(shard, level, bits, row_shape))
            if grids is not None:
                beside.append(code.read_grid(shard, biases=record.biases))
        if grids is not None:
            grids[record.name] = Grid.joined(beside)
        yield record, pack(rows[0] if len(rows) == 1 else np.concatenate(rows), bits)


class _ShardCursor:
    """Holds the one shard that is being read: layers stand in execution order, and so do their pieces."""

    def __init__(self, manifest: Manifest, blobs: Blobs, level: int) -> None:
        self.manifest, self.blobs, self.level = manifest, blobs, level
        self.group = -1
        self.shard: Shard | None = None

    def at(self, group: int) -> Shard:
        if self.shard is None or group != self.group:
            self.shard = read_shard(self.blobs.read(self.manifest.groups[group].levels[self.level]))
            self.group = group
        return self.shard
