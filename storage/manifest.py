"""The manifest: the one document that names everything a version consists of.

A manifest is canonical JSON (RFC 8259 with sorted keys, no insignificant white space, UTF-8), created once under its version number and
never rewritten. It carries no time stamp and no measurement that could differ from run to run: the same job gives the same bytes on one machine
and on a cluster. What was measured (accuracy, seconds) stands in a report of its own beside it.

Levels. ``bits = [8, 4]`` is one nesting: level 0 (*high*, 4 bits, runs part-bit) and level 1 (*low*, the rest, makes it full-bit).
``bits = [8, 6, 4]`` has three levels. Every group of layers has one shard for each level.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

SCHEMA_VERSION = 1

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9])?$")]
Codec = Literal["packed", "zstd"]
LayerKind = Literal["conv1d", "conv2d", "conv_transpose2d", "linear"]
Scheme = Literal["asymmetric", "symmetric"]

MEDIA_TYPE_SHARD = "application/vnd.nestquant.shard.v1+safetensors"
MEDIA_TYPE_BASE = "application/vnd.nestquant.base.v1+safetensors"


class Record(BaseModel):
    """Base of all documents: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Descriptor(Record):
    """Points at one blob: what it is, its digest, its exact length in bytes (OCI image specification, descriptor)."""

    digest: Digest
    size_bytes: int = Field(ge=0)
    media_type: str


class ShardDescriptor(Descriptor):
    """A shard of one level. ``decoded_bytes`` is the sum of its integer payloads once decoded, one byte a weight."""

    codec: Codec
    decoded_bytes: int = Field(ge=0)


class ShardGroup(Record):
    """Consecutive pieces of layers that travel together: ``levels[0]`` is their high shard, ``levels[k]`` their k-th low shard."""

    levels: tuple[ShardDescriptor, ...] = Field(min_length=1)


class Piece(Record):
    """Output channels ``start:stop`` of a layer, stored in shard group ``group``."""

    group: int = Field(ge=0)
    start: int = Field(ge=0)
    stop: int = Field(gt=0)


class ActivationRange(Record):
    """Range ``[low, high]`` of a layer's input, quantized per tensor to ``bits`` bits; how it was found and on how many samples."""

    bits: int = Field(ge=2, le=8)
    low: float
    high: float
    signed: bool
    observer: str


class LayerRecord(Record):
    """One quantized layer. ``shape`` is that of the float weight in the state dict; axis 0 of the stored integers is the output channel.

    A layer's integers at level ``k`` are stored piece by piece under the key ``piece_key(name, start, stop, k)`` of the piece's shard.
    """

    name: str
    kind: LayerKind
    parameter: str
    shape: tuple[int, ...]
    groups: int = Field(ge=1, default=1)
    bits: tuple[int, ...] = Field(min_length=1)
    scheme: Scheme
    pieces: tuple[Piece, ...] = Field(min_length=1)
    activation: ActivationRange | None = None


class FloatRecord(Record):
    """A layer that stays float, and why."""

    name: str
    reason: str


class ModelRecord(Record):
    """What is needed to build the empty network again. ``source_digest`` is that of the float weights the job read."""

    library: str
    arch: str
    kwargs: dict[str, Any]
    source_digest: Digest
    parameters: int = Field(ge=0)


class CalibrationRecord(Record):
    """Which images set the activation ranges: their digest, how many were used, what was skipped."""

    source_digest: Digest | None
    samples: int = Field(ge=0)
    skipped: int = Field(ge=0)
    observer: str


class SizeRecord(Record):
    """Bytes by kind. ``weights`` counts quantized weights; ``level_bytes[k]`` what level k moves over the wire."""

    weights: int
    float_bytes: int
    base_bytes: int
    level_bytes: tuple[int, ...]


class Manifest(Record):
    """Everything a version consists of. ``version`` is part of the signed bytes, so that a manifest cannot be served under another number."""

    schema_version: Literal[1] = 1
    name: ModelName
    version: int = Field(ge=1)
    model: ModelRecord
    recipe: dict[str, Any]
    layers: tuple[LayerRecord, ...]
    groups: tuple[ShardGroup, ...]
    base: tuple[Descriptor, ...]
    kept_float: tuple[FloatRecord, ...] = ()
    preprocessing: dict[str, Any] | None = None
    calibration: CalibrationRecord | None = None
    sizes: SizeRecord
    tool_versions: dict[str, str]
    single_writer: bool = False
    job: Digest | None = None

    def level_count(self) -> int:
        """Return the number of levels; 2 for one nesting."""
        return max((len(group.levels) for group in self.groups), default=1)


def piece_key(layer: str, start: int, stop: int, level: int) -> str:
    """Return the safetensors key of a piece's integers at a level; level 0 is the high part."""
    return f"{layer}[{start}:{stop}]/level{level}"


def canonical_json(document: BaseModel | dict[str, Any]) -> bytes:
    """Return the one byte string for a document: keys sorted, no white space, UTF-8, no NaN or infinity."""
    value = document.model_dump(mode="json") if isinstance(document, BaseModel) else document
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
