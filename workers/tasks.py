"""What travels between the driver and the workers: names, digests and small numbers, never tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from nestquant.config import NestConfig, Range, Rounding
from storage.manifest import Descriptor, Digest, LayerKind, Record, Scheme, ShardDescriptor


@dataclass(frozen=True)
class TensorSource:
    """Where a checkpoint's safetensors file lies: a path on this machine (``store`` is None), or a key in a store.

    ``version`` is that of the file that is meant (`storage.digest.file_version`); None means what lies there now.
    ``name`` is what the user calls it, for messages. Small and picklable.
    """

    store: str | None
    key: str
    version: str | None = None
    name: str | None = None

    def __str__(self) -> str:
        return self.name or (self.key if self.store is None else f"{self.store} {self.key}")


class Code(Record):
    """A function that builds a network of a team's own (`workers.inputs.own`), and the code that it stands in.

    ``entry`` is ``package.module:function``, ``digest`` that of a zip at ``key`` (a path where ``store`` is None), or
    of the installed module's file where ``key`` is None too.
    """

    entry: str
    digest: Digest
    store: str | None = None
    key: str | None = None


class NetworkRef(Record):
    """A float network as every task names it: its architecture, where its weights lie, how images become its inputs.

    ``preprocessing`` as in ``nestquant.engines.images.Preprocessing``; ``code`` where the architecture is a team's own.
    """

    library: str
    arch: str
    kwargs: dict[str, Any]
    source: TensorSource
    preprocessing: dict[str, Any]
    code: Code | None = None

    @property
    def title(self) -> str:
        """Return what messages call the network."""
        return f"{self.library} {self.arch}"


class PieceTask(Record):
    """Quantize output channels ``start:stop`` of one layer.

    ``shape`` is that of the whole float weight in the checkpoint. ``solution`` numbers the layers that a recipe solves
    with images, in execution order; None where the piece is quantized on its own.
    """

    layer: str
    kind: LayerKind
    parameter: str
    shape: tuple[int, ...]
    groups: int
    start: int
    stop: int
    bits: tuple[int, ...]
    scheme: Scheme
    rounding: Rounding
    range: Range = "full"
    solution: int | None = None

    @property
    def config(self) -> NestConfig:
        """Return what the method needs to know."""
        return NestConfig(bits=self.bits, scheme=self.scheme, rounding=self.rounding, range=self.range)

    @property
    def out_channels(self) -> int:
        """Return the whole layer's number of output channels."""
        return self.shape[1] * self.groups if self.kind == "conv_transpose2d" else self.shape[0]

    @property
    def weights(self) -> int:
        """Return the number of weights in this piece."""
        total = 1
        for extent in self.shape:
            total *= extent
        return total // self.out_channels * (self.stop - self.start)

    @property
    def inputs(self) -> int:
        """Return the number of inputs of one output channel."""
        return self.weights // (self.stop - self.start)


class GroupTask(Record):
    """Quantize and store one shard group: consecutive pieces in execution order, one shard for each level."""

    kind: Literal["group"] = "group"
    index: int
    pieces: tuple[PieceTask, ...]


class BaseTask(Record):
    """Store parameters that stay float, as they are in the checkpoint, in one blob."""

    kind: Literal["base"] = "base"
    index: int
    parameters: tuple[str, ...]


Unit = Annotated[GroupTask | BaseTask, Field(discriminator="kind")]


class TaskContext(Record):
    """Where a task reads and writes: the same for every task of a job."""

    store_uri: str
    job: str
    network: NetworkRef


class Bundle(Record):
    """What one task does: some units, one after the other."""

    context: TaskContext
    units: tuple[Unit, ...]


class PieceRecord(Record):
    """What quantizing one piece did.

    ``signal`` and ``noise[k]`` are sums of squares, so that pieces add up to a layer's signal-to-noise ratio.
    ``noise[0]`` is that of the part-bit weights, ``noise[-1]`` that of the full-bit ones. ``flips[k]`` counts the
    integers of level ``k``'s grid that are not the nearest to their weights, ``level_bytes[k]`` are what the level's
    integers take in its shard; both are empty in records of older releases.
    """

    layer: str
    start: int
    stop: int
    signal: float
    noise: tuple[float, ...]
    flips: tuple[int, ...] = ()
    level_bytes: tuple[int, ...] = ()


class GroupRecord(Record):
    """One shard group, stored: its shards by level and what was lost in it."""

    kind: Literal["group"] = "group"
    index: int
    levels: tuple[ShardDescriptor, ...]
    pieces: tuple[PieceRecord, ...]


class BaseRecord(Record):
    """One base blob, stored."""

    kind: Literal["base"] = "base"
    index: int
    descriptor: Descriptor


UnitRecord = Annotated[GroupRecord | BaseRecord, Field(discriminator="kind")]


class UnitResult(Record):
    """A unit's record and what it cost.

    ``reused`` is true where an earlier run of the same job had finished it.
    """

    record: UnitRecord
    seconds: float
    bytes_read: int
    bytes_written: int
    reused: bool
