"""A version that a device pulled, run by ONNX Runtime: part-bit, full-bit, and switched between two answers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from nestquant.engines.errors import EngineError, LevelMissing, NotExported, PhotoError
from nestquant.engines.images import Preprocessing
from nestquant.engines.open_graph import with_weights_as_inputs
from nestquant.engines.ort import options, session_with
from nestquant.engines.weights import engine_tensors
from storage.class_labels import parse_labels
from storage.device import Device
from storage.device.cache import read_blob
from storage.device.errors import NotInstalled
from storage.engine_layout import read_layout
from storage.errors import Damaged
from storage.manifest import Descriptor, EngineRecord, Manifest
from storage.wording import one_line

Array = npt.NDArray[Any]
Residency = Literal["fast", "hot"]


@dataclass(frozen=True)
class Answer:
    """What the network says of a batch: ``logits`` float32 ``[batch, classes]``, all of one ``level``."""

    level: int
    logits: npt.NDArray[np.float32]


class _Loaded(Protocol):
    """A network at one level, which it never leaves."""

    @property
    def level(self) -> int: ...

    def run(self, image: str, answer: str, inputs: Array) -> Array: ...


@dataclass(frozen=True)
class _Own:
    """Weights in a session of their own, packed for the engine's kernels."""

    level: int
    session: ort.InferenceSession

    def run(self, image: str, answer: str, inputs: Array) -> Array:
        logits: Array = self.session.run([answer], {image: inputs})[0]
        return logits


@dataclass(frozen=True)
class _Given:
    """Weights beside a session that all levels share: each run is given all of them."""

    level: int
    session: ort.InferenceSession
    weights: dict[str, ort.OrtValue]

    def run(self, image: str, answer: str, inputs: Array) -> Array:
        inputs_by_name = self.weights | {image: ort.OrtValue.ortvalue_from_numpy(inputs)}
        logits: Array = self.session.run_with_ort_values([answer], inputs_by_name)[0].numpy()
        return logits


class Session:
    """A model of a device's folder, ready to answer; any number of threads may use one session.

    A request is answered at the level at which it began, whatever is switched meanwhile: weights that a request in
    flight reads are never written, they are replaced as a whole, and freed with the last request that reads them.

    ``residency``: *fast* has the weights packed for the engine's kernels, and a switch makes a new session beside the
    old one; *hot* gives them to the engine on every run, which is slower, and a switch takes no longer than it takes to
    read and decode them.

    The version is the one in use when the session was made, whatever is pulled later.
    """

    def __init__(
        self,
        device: Device,
        name: str,
        *,
        level: int | None = None,
        residency: Residency = "fast",
        threads: int | None = None,
        exact: bool = False,
    ) -> None:
        """Open the version in use of a model.

        Args:
            device: the folder it is in; nothing is fetched.
            name: the model.
            level: 0 is part-bit; by default the highest that is here.
            residency: see above.
            threads: of the engine, for one request; by default one for each core.
            exact: where the processor's products saturate (x86 without VNNI), take the slower ones that do not; of
                *fast* alone.

        Raises:
            NotExported: the version has no graph for this engine.
            LevelMissing: the level is not here.
            EngineError: the engine refuses the graph.
            storage.StorageError: the model is not here, or a file is damaged.
        """
        self.manifest: Manifest = device.manifest(name)
        self.residency = residency
        self._device = device
        record = self._exported()
        self._graph = self._read(record.graph)
        self._layout, self._values = read_layout(self._read(record.layout), self.manifest)
        self._options = (threads, not record.activations, exact)
        self._switch = threading.Lock()
        self._shared: ort.InferenceSession | None = None
        if residency == "hot":
            self._shared = self._engine(with_weights_as_inputs(self._graph, self._layout), {})
        here = self.levels()
        if level is None and not here:
            raise LevelMissing(f"{self._where()}: no level is here whole; 'nestquant pull {name}' brings it.")
        self._loaded = self._load(here[-1] if level is None else level)

    @property
    def level(self) -> int:
        """Return the level at which the next request is answered; 0 is part-bit."""
        return self._loaded.level

    @property
    def preprocessing(self) -> Preprocessing:
        """Return how a photograph becomes an input. Raises `NotExported` where the version does not say."""
        if self.manifest.preprocessing is None:
            raise NotExported(f"{self._where()} says nothing of its inputs; publish it anew.")
        return Preprocessing.from_record(self.manifest.preprocessing)

    def labels(self) -> tuple[str, ...] | None:
        """Return the names of the classes, class 0 first; None where the version has none.

        Raises:
            storage.StorageError: they are not here, or damaged.
        """
        if self.manifest.labels is None:
            return None
        try:
            return parse_labels(self._read(self.manifest.labels))
        except ValueError as error:
            raise EngineError(f"{self._where()}: its labels cannot be read: {error}; publish it anew.") from error

    def levels(self) -> tuple[int, ...]:
        """Return the levels whose shards are here, without a gap."""
        count = 0
        while count < self.manifest.level_count() and self._is_here(count):
            count += 1
        return tuple(range(count))

    def run(self, inputs: Array) -> Answer:
        """Answer a batch: float32 ``[batch, channels, height, width]``, normalised (`nestquant.engines.images`).

        Raises:
            PhotoError: the inputs have another shape or type.
            EngineError: the engine fails on them.
        """
        shape = self.preprocessing.input_shape
        if inputs.dtype != np.float32 or inputs.ndim != 4 or inputs.shape[1:] != shape or not len(inputs):
            raise PhotoError(
                f"inputs are {inputs.dtype} {list(inputs.shape)}; {self._where()} takes float32 "
                f"[batch, {', '.join(map(str, shape))}]."
            )
        loaded = self._loaded  # one read: from here on this request has its level
        try:
            logits = loaded.run(self._layout.image, self._layout.answer, np.ascontiguousarray(inputs))
        except Exception as error:  # whatever the engine raises: its errors have no root of their own
            raise EngineError(f"{self._where()}: ONNX Runtime fails: {one_line(error)}.") from error
        return Answer(loaded.level, logits)

    def set_level(self, level: int) -> None:
        """Answer every request that begins from now on at ``level``; whatever goes wrong, the level stays as it was.

        Raises:
            LevelMissing: the level is not here.
            EngineError, storage.StorageError: as when the session was made.
        """
        with self._switch:
            if level != self._loaded.level:
                self._loaded = self._load(level)

    def upgrade(self) -> None:
        """Go to the highest level that is here."""
        self.set_level(max(self.levels(), default=0))

    def downgrade(self, level: int = 0) -> None:
        """Go to ``level``, part-bit by default, unless the session is there or below."""
        self.set_level(min(level, self.level))

    def _load(self, level: int) -> _Loaded:
        if not 0 <= level < self.manifest.level_count():
            raise LevelMissing(f"{self._where()} has levels 0 to {self.manifest.level_count() - 1}, not {level}.")
        if level not in self.levels():
            raise LevelMissing(
                f"{self._where()}: level {level} is not here; 'nestquant upgrade {self.manifest.name} --level {level}' "
                "brings it."
            )
        chosen = engine_tensors(self.manifest, self._layout, self._values, self._read, level)
        tensors = {tensor.name: array for tensor, array in chosen}
        if self._shared is None:
            return _Own(level, self._engine(self._graph, tensors))
        weights = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()}
        return _Given(level, self._shared, weights)

    def _engine(self, graph: bytes, tensors: dict[str, Array]) -> ort.InferenceSession:
        threads, float_weights, exact = self._options
        chosen = options(threads=threads, float_weights=float_weights, exact=exact)
        try:
            return session_with(graph, tensors, chosen)
        except Exception as error:  # as above
            raise EngineError(f"{self._where()}: ONNX Runtime refuses the graph: {one_line(error)}.") from error

    def _exported(self) -> EngineRecord:
        record = self.manifest.engine("onnx")
        if record is None:
            raise NotExported(
                f"{self._where()} has no graph for ONNX Runtime; 'nestquant export {self.manifest.name}@"
                f"{self.manifest.version} --engine onnx --tag latest' publishes a version that has one; then pull that."
            )
        return record

    def _is_here(self, level: int) -> bool:
        try:
            for blob in self._shards(level):
                self._device.blob_path(blob)
        except NotInstalled:
            return False
        return True

    def _shards(self, level: int) -> Sequence[Descriptor]:
        return [group.levels[level] for group in self.manifest.groups if level < len(group.levels)]

    def _read(self, blob: Descriptor) -> bytes:
        try:
            return read_blob(self._device.blob_path(blob), blob)
        except Damaged as error:
            raise Damaged(
                f"{self._where()}: {error}; 'nestquant pull {self.manifest.name}' brings it anew", key=blob.digest
            ) from error
        except OSError as error:
            raise EngineError(f"{self._where()}: {blob.digest} cannot be read: {one_line(error)}.") from error

    def _where(self) -> str:
        return f"{self.manifest.name} version {self.manifest.version}"
