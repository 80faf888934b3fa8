"""The manifest: the one document that names everything a version consists of.

A manifest is canonical JSON (RFC 8259 with sorted keys, no insignificant white space, UTF-8), created once under its
version number and never rewritten. It carries no time stamp and no measurement that could differ from run to run: the
same job gives the same bytes on one machine and on a cluster. What was measured (accuracy, seconds) stands in a report
of its own beside it.

Levels. ``bits = [8, 4]`` is one nesting: level 0 (*high*, 4 bits, runs part-bit) and level 1 (*low*, the rest, makes it
full-bit). ``bits = [8, 6, 4]`` has three levels. Every group of layers has one shard for each level.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
    model_validator,
)

from storage.document import as_record, parse_json
from storage.errors import InvalidManifest
from storage.layout import MODEL_NAME
from storage.preprocessing import check_preprocessing

# What a device may be asked to hold in mind before it has verified anything else.
MAX_MANIFEST_BYTES = 64 << 20
MAX_BLOB_BYTES = 1 << 40
MAX_WEIGHTS = 1 << 40
MAX_DELTAS_A_BLOB = 8
MAX_DELTA_STEPS = 3

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
ModelName = Annotated[str, StringConstraints(pattern=f"^{MODEL_NAME}$")]
Codec = Literal["packed", "zstd"]
# Names from a state dict: printable, so that they can be shown, and short enough to be looked at.
LayerName = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f\u2028\u2029]{0,512}$")]
LayerKind = Literal["conv1d", "conv2d", "conv_transpose2d", "linear"]
Scheme = Literal["asymmetric", "symmetric"]
Library = Literal["timm", "pytorchcv"]
"""Libraries that build a network by its name."""

Origin = Literal["timm", "pytorchcv", "own"]
"""Where a network's architecture comes from: a library, or its publisher's own code, which no manifest holds."""
Engine = Literal["onnx"]

MEDIA_TYPE_SHARD = "application/vnd.nestquant.shard.v1+safetensors"
MEDIA_TYPE_BASE = "application/vnd.nestquant.base.v1+safetensors"
MEDIA_TYPE_ONNX_GRAPH = "application/vnd.nestquant.engine-graph.v1+onnx"
MEDIA_TYPE_DELTA = "application/vnd.nestquant.delta.v1+zstd"
MEDIA_TYPE_LABELS = "application/vnd.nestquant.labels.v1+text"
MEDIA_TYPE_LAYOUT = "application/vnd.nestquant.engine-layout.v1+safetensors"


class Record(BaseModel):
    """Base of all documents: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Descriptor(Record):
    """Points at one blob: what it is, its digest, its exact length in bytes (OCI image specification, descriptor)."""

    digest: Digest
    size_bytes: int = Field(ge=0, le=MAX_BLOB_BYTES)
    media_type: str = Field(max_length=128)


class CanonicalForm(Record):
    """Digest and length of a shard's canonical form (`storage.shard.canonical_form`): no compressor has a say in it."""

    digest: Digest
    size_bytes: int = Field(ge=0, le=MAX_BLOB_BYTES)


class ShardDescriptor(Descriptor):
    """A shard of one level. ``decoded_bytes`` is the sum of its integer payloads once decoded, one byte a weight.

    ``canonical``: what a delta's result is verified against; None where no delta makes the shard.
    """

    codec: Codec
    decoded_bytes: int = Field(ge=0, le=MAX_WEIGHTS)
    canonical: CanonicalForm | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = serialize(self)
        if self.canonical is None:
            del document["canonical"]
        return document


class DeltaRecord(Record):
    """How the blob with the digest ``of`` is made from the one with the digest ``source`` (``from`` in the document).

    ``descriptor`` is what travels (`storage.delta`). ``of`` is a blob of this version, or of an earlier one, from which
    another delta leads on.
    """

    model_config = ConfigDict(populate_by_name=True)

    of: Digest
    source: Digest = Field(alias="from")
    descriptor: Descriptor

    @model_serializer(mode="plain")
    def _document(self) -> dict[str, Any]:
        return {"of": self.of, "from": self.source, "descriptor": self.descriptor.model_dump(mode="json")}


class ShardGroup(Record):
    """Consecutive pieces of layers that travel together.

    ``levels[0]`` is their high shard, ``levels[k]`` their k-th low shard.
    """

    levels: tuple[ShardDescriptor, ...] = Field(min_length=1)


class Piece(Record):
    """Output channels ``start:stop`` of a layer, stored in shard group ``group``."""

    group: int = Field(ge=0)
    start: int = Field(ge=0)
    stop: int = Field(gt=0, le=MAX_WEIGHTS)


class ActivationRange(Record):
    """Range ``[low, high]`` of a layer's input, quantized per tensor to ``bits`` bits.

    How it was found and on how many samples.
    """

    bits: int = Field(ge=2, le=8)
    low: float
    high: float
    signed: bool
    observer: str


class LayerRecord(Record):
    """One quantized layer.

    ``shape`` is that of the float weight in the state dict; axis 0 of the stored integers is the output channel.

    A layer's integers at level ``k`` are stored piece by piece under the key ``piece_key(name, start, stop, k)`` of the
    piece's shard. With ``biases``, its level-0 shard also says what each level adds to the layer's bias: float16
    ``[levels, rows]`` under ``<name>[<start>:<stop>]/biases``.
    """

    name: LayerName
    kind: LayerKind
    parameter: LayerName
    shape: tuple[Annotated[int, Field(gt=0, le=MAX_WEIGHTS)], ...] = Field(min_length=1, max_length=5)
    groups: int = Field(ge=1, default=1)
    bits: tuple[Annotated[int, Field(ge=1, le=8)], ...] = Field(min_length=1, max_length=8)
    scheme: Scheme
    pieces: tuple[Piece, ...] = Field(min_length=1)
    activation: ActivationRange | None = None
    biases: bool = False

    def out_channels(self) -> int:
        """Return the number of output channels.

        ``shape[0]``, but ``shape[1] * groups`` for a transposed convolution.
        """
        return self.shape[1] * self.groups if self.kind == "conv_transpose2d" else self.shape[0]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "conv_transpose2d" and len(self.shape) < 2:
            raise ValueError(f"layer {self.name!r}: shape {self.shape} has no output channels")
        if math.prod(self.shape) > MAX_WEIGHTS:
            raise ValueError(f"layer {self.name!r}: {math.prod(self.shape)} weights, at most {MAX_WEIGHTS} allowed")
        if any(wide <= narrow for wide, narrow in pairwise(self.bits)):
            raise ValueError(f"layer {self.name!r}: bits {self.bits} do not fall from full to high")
        edges = [0, *(piece.stop for piece in self.pieces)]
        if [piece.start for piece in self.pieces] != edges[:-1] or any(
            piece.stop <= piece.start for piece in self.pieces
        ):
            raise ValueError(f"layer {self.name!r}: its pieces leave a gap or overlap")
        if edges[-1] != self.out_channels():
            raise ValueError(
                f"layer {self.name!r}: its pieces end at output channel {edges[-1]} of {self.out_channels()}"
            )
        return self


class FloatRecord(Record):
    """A layer that stays float, and why."""

    name: LayerName
    reason: str = Field(max_length=1024)


class ModelRecord(Record):
    """What is needed to build the empty network again. ``source_digest`` is that of the float weights the job read."""

    library: str
    arch: str
    kwargs: dict[str, Any]
    source_digest: Digest
    parameters: int = Field(ge=0)


class CalibrationRecord(Record):
    """Which images were calibrated with: their digest, how many were used, what was skipped.

    ``observer`` set the activation ranges; ``moments`` where activations stay float and images choose integers alone.
    """

    source_digest: Digest | None
    samples: int = Field(ge=0)
    skipped: int = Field(ge=0)
    observer: str


class EngineRecord(Record):
    """What an inference engine runs the version from: its graph, which holds no nested weight, and the layout that says
    where the integers of each layer go in it (`storage.engine_layout`).

    ``activations``: the graph quantizes activations by the manifest's ranges; without, weights alone are quantized.
    """

    engine: Engine
    graph: Descriptor
    layout: Descriptor
    activations: bool = False


class SizeRecord(Record):
    """Bytes by kind. ``weights`` counts quantized weights; ``level_bytes[k]`` what level k moves over the wire."""

    weights: int
    float_bytes: int
    base_bytes: int
    level_bytes: tuple[int, ...]


class Manifest(Record):
    """Everything a version consists of.

    ``version`` is part of the signed bytes, so that a manifest cannot be served under another number.
    ``schema_version`` says what a reader has to know: 4 where there are ``deltas``, else 3 where there are ``labels``
    (`storage.class_labels`), else 2 where there are ``engines``, else 1. What is not there is left out: such a manifest
    has the bytes that it always had.
    """

    schema_version: Literal[1, 2, 3, 4] = 1
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
    engines: tuple[EngineRecord, ...] = ()
    labels: Descriptor | None = None
    deltas: tuple[DeltaRecord, ...] = ()

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = serialize(self)
        if not self.engines:
            del document["engines"]
        if self.labels is None:
            del document["labels"]
        if not self.deltas:
            del document["deltas"]
        return document

    @field_validator("preprocessing")
    @classmethod
    def _within_reason(cls, record: dict[str, Any] | None) -> dict[str, Any] | None:
        if record is not None:
            check_preprocessing(record)
        return record

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (twice := first_repeated(layer.name for layer in self.layers)) is not None:
            raise ValueError(f"layer {twice!r} stands twice")
        if (twice := first_repeated(engine.engine for engine in self.engines)) is not None:
            raise ValueError(f"engine {twice!r} stands twice")
        if self.schema_version != self.least_schema:
            raise ValueError(
                f"schema_version is {self.schema_version} with {len(self.engines)} engines, "
                f"{'no labels' if self.labels is None else 'labels'}"
                f"{f', {len(self.deltas)} deltas' if self.deltas else ''}; expected {self.least_schema}"
            )
        self._check_deltas()
        # A layer may have fewer levels than its group: then the group's further shards do not hold it.
        weights = [[0] * len(group.levels) for group in self.groups]
        for layer in self.layers:
            channel_weights = math.prod(layer.shape) // layer.out_channels()
            for piece in layer.pieces:
                if piece.group >= len(self.groups):
                    raise ValueError(f"layer {layer.name!r}: shard group {piece.group} of {len(self.groups)}")
                levels = len(self.groups[piece.group].levels)
                if levels < len(layer.bits):
                    raise ValueError(
                        f"layer {layer.name!r}: {len(layer.bits)} levels, its shard group {piece.group} has {levels}"
                    )
                for level in range(len(layer.bits)):
                    weights[piece.group][level] += channel_weights * (piece.stop - piece.start)
        for index, group in enumerate(self.groups):
            for level, (shard, expected) in enumerate(zip(group.levels, weights[index], strict=True)):
                if shard.decoded_bytes != expected:
                    raise ValueError(
                        f"group {index} level {level}: decoded_bytes {shard.decoded_bytes}, its layers {expected}"
                    )
        return self

    def _check_deltas(self) -> None:
        if (twice := first_repeated(f"{delta.of} from {delta.source}" for delta in self.deltas)) is not None:
            raise ValueError(f"the delta of {twice} stands twice")
        counts = Counter(delta.of for delta in self.deltas)
        for group in self.groups:
            for shard in group.levels:
                if (shard.canonical is None) is (shard.digest in counts):
                    fault = (
                        "deltas and no canonical form" if shard.canonical is None else "a canonical form and no delta"
                    )
                    raise ValueError(f"shard {shard.digest} has {fault}")
        if any(delta.of == delta.source for delta in self.deltas):
            raise ValueError("a delta leads from a blob to itself")
        if max(counts.values(), default=0) > MAX_DELTAS_A_BLOB:
            digest, count = counts.most_common(1)[0]
            raise ValueError(f"{count} deltas of {digest}, at most {MAX_DELTAS_A_BLOB} allowed")

    @property
    def least_schema(self) -> Literal[1, 2, 3, 4]:
        """Return the schema that a version with these deltas, engines and labels has."""
        if self.deltas:
            return 4
        return 3 if self.labels is not None else 2 if self.engines else 1

    def with_additions(self, *, engines: tuple[EngineRecord, ...], labels: Descriptor | None) -> Manifest:
        """Return the manifest with these in the place of its own, under the schema that has them."""
        changed = self.model_copy(update={"engines": engines, "labels": labels})
        return changed.model_copy(update={"schema_version": changed.least_schema})

    def with_deltas(self, deltas: tuple[DeltaRecord, ...], canonical: Mapping[str, CanonicalForm]) -> Manifest:
        """Return the manifest with these deltas in the place of its own; ``canonical`` by the digest of a shard."""
        groups = tuple(
            ShardGroup(
                levels=tuple(
                    shard.model_copy(update={"canonical": canonical.get(shard.digest)}) for shard in group.levels
                )
            )
            for group in self.groups
        )
        changed = self.model_copy(update={"deltas": deltas, "groups": groups})
        return changed.model_copy(update={"schema_version": changed.least_schema})

    def named_blobs(self) -> tuple[Descriptor, ...]:
        """Return every blob that the version names: those that it needs (`descriptors`), then its deltas."""
        blobs = (*self.descriptors(), *(delta.descriptor for delta in self.deltas))
        return tuple({blob.digest: blob for blob in blobs}.values())

    def descriptors(self) -> tuple[Descriptor, ...]:
        """Return every blob that this version needs, each digest once: `shared_blobs`, then shards level by level."""
        levels = [
            shard
            for level in range(self.level_count())
            for group in self.groups
            for shard in group.levels[level : level + 1]
        ]
        return tuple({blob.digest: blob for blob in (*self.shared_blobs(), *levels)}.values())

    def shared_blobs(self) -> tuple[Descriptor, ...]:
        """Return what every level needs: base, the engines' graphs and layouts, labels."""
        engines = [blob for engine in self.engines for blob in (engine.graph, engine.layout)]
        return (*self.base, *engines, *(() if self.labels is None else (self.labels,)))

    def engine(self, name: Engine) -> EngineRecord | None:
        """Return what an engine runs the version from; None where the version was not exported for it."""
        return next((engine for engine in self.engines if engine.engine == name), None)

    def level_count(self) -> int:
        """Return the number of levels; 2 for one nesting."""
        return max((len(group.levels) for group in self.groups), default=1)


def first_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that stood before, or None; one pass over however many there are."""
    earlier: set[str] = set()
    for name in names:
        if name in earlier:
            return name
        earlier.add(name)
    return None


def level_name(level: int | None, level_count: int) -> str:
    """Return ``float``, ``part-bit``, ``full-bit`` or, between them, ``level k``."""
    if level is None:
        return "float"
    if level == level_count - 1:
        return "full-bit"
    return "part-bit" if level == 0 else f"level {level}"


def piece_key(layer: str, start: int, stop: int, level: int) -> str:
    """Return the safetensors key of a piece's integers at a level; level 0 is the high part."""
    return f"{layer}[{start}:{stop}]/level{level}"


def canonical_json(document: BaseModel | dict[str, Any]) -> bytes:
    """Return the one byte string for a document: keys sorted, no white space, UTF-8, no NaN or infinity."""
    value = document.model_dump(mode="json") if isinstance(document, BaseModel) else document
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parse_manifest(raw: bytes, *, name: str, version: int) -> Manifest:
    """Return the manifest that ``raw`` holds, or raise `InvalidManifest`.

    Nothing of a manifest is used before this has passed.

    It must be canonical JSON of the schema, and carry the name and number it was asked for under.
    """
    where = f"manifest of {name} version {version}"
    if len(raw) > MAX_MANIFEST_BYTES:
        raise InvalidManifest(f"{where}: {len(raw)} bytes, at most {MAX_MANIFEST_BYTES} allowed")
    try:
        document = parse_json(raw)
        canonical = canonical_json(document) if isinstance(document, dict) else b""
    except ValueError as error:
        raise InvalidManifest(f"{where}: not canonical JSON ({error})") from error
    if canonical != raw:
        raise InvalidManifest(f"{where}: not canonical JSON (sorted keys, no white space, each key once)")
    try:
        manifest = as_record(document, Manifest)
    except ValueError as error:
        raise InvalidManifest(f"{where}: {error}") from error
    if (manifest.name, manifest.version) != (name, version):
        raise InvalidManifest(
            f"{where}: says that it is {manifest.name} version {manifest.version}; it was stored under another number"
        )
    return manifest
