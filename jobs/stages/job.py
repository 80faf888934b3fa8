"""One job on its way through the stages: what is asked, what it is made of, and what each stage has added to it.

Every stage is a function ``run(job, executor, clock)`` that returns the job with its own field filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from jobs.events import StageClock
from jobs.result import MixedRecord, PullSummary
from jobs.spec.job import CalibrationSpec, JobSpec
from jobs.stages.plan import Plan
from jobs.stages.weights import StagedModel
from storage.digest import digest_bytes
from storage.manifest import (
    ActivationRange,
    CalibrationRecord,
    Descriptor,
    EngineRecord,
    Manifest,
    canonical_json,
)
from storage.registry import Published, Registry
from workers.equalize import EqualizedSite
from workers.errors import Need
from workers.executor import Executor
from workers.inputs.images import ImageSet
from workers.measure import Measured
from workers.sensitivity import SensitivityRecord
from workers.solutions import SolvedRecord
from workers.tasks import NetworkRef, TaskContext, UnitResult


@dataclass(frozen=True)
class Observation:
    """What the stages that look at activations read: which network, on which images (None: on noise).

    ``digest`` is that of the images. The recipe ``data_free`` puts images and a network of its own here.
    """

    network: NetworkRef
    images: CalibrationSpec | None
    digest: str | None


@dataclass(frozen=True)
class ActivationRanges:
    """Ranges by layer, the record of what they rest on, and the images that could not be read: (name, reason)."""

    ranges: Mapping[str, ActivationRange] = field(default_factory=dict)
    record: CalibrationRecord | None = None
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class EvaluationImages:
    """The images that a version is judged by: how many, the digest of them and of their labels, how those were read."""

    count: int
    digest: str
    reading: str

    @classmethod
    def of(cls, images: ImageSet) -> EvaluationImages:
        """Look at a labelled set, all of which counts."""
        document = {"images": images.digest(), "labels": list(images.require_labels())}
        return cls(len(images), digest_bytes(canonical_json(document)), images.labelling.reading)


@dataclass(frozen=True)
class Reconstruction:
    """The solved layers in execution order, and what people should know of them."""

    layers: tuple[SolvedRecord, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """Return the images that could not be read: (name, reason)."""
        return tuple(dict.fromkeys(image for layer in self.layers for image in layer.skipped))

    def record(self, digest: str | None) -> CalibrationRecord | None:
        """Return what the integers rest on; None where images had no part in them."""
        samples = max((layer.samples for layer in self.layers), default=0)
        if not self.layers:
            return None
        return CalibrationRecord(source_digest=digest, samples=samples, skipped=len(self.skipped), observer="moments")


@dataclass(frozen=True)
class PulledVersion:
    """What came back from the store as a device gets it: the manifest, the bytes moved, and the device's folder."""

    manifest: Manifest
    summary: PullSummary
    cache: Path


@dataclass(frozen=True)
class Job:
    """A job whose inputs are checked and whose plan is made, and what the stages have added since.

    ``digest`` names the job's ledger; ``image_bytes`` is what the largest image set keeps in memory; ``judged`` are the
    images of ``evaluate``; ``needs`` are the memory of each stage's largest task; ``network`` is what is published,
    where that is not the staged one (``equalized`` says by what); ``class_names`` go into ``labels``; ``fault`` is what
    falls short of the gate; ``notes`` are lines for people.
    """

    spec: JobSpec
    registry: Registry
    folder: Path
    staged: StagedModel
    plan: Plan
    observation: Observation
    image_bytes: int
    digest: str
    judged: EvaluationImages | None = None
    needs: Mapping[str, Need] = field(default_factory=dict)
    sensitivities: tuple[SensitivityRecord, ...] = ()
    mixed: MixedRecord | None = None
    activations: ActivationRanges = ActivationRanges()
    reconstruction: Reconstruction = Reconstruction()
    results: Sequence[UnitResult] = ()
    class_names: tuple[str, ...] | None = None
    engines: tuple[EngineRecord, ...] = ()
    labels: Descriptor | None = None
    published: Published | None = None
    pulled: PulledVersion | None = None
    measured: tuple[Measured, ...] = ()
    fault: str | None = None
    tags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    network: NetworkRef | None = None
    equalized: tuple[EqualizedSite, ...] = ()

    @property
    def context(self) -> TaskContext:
        """Return where the job's tasks read and write."""
        return TaskContext(
            store_uri=self.registry.store.uri, job=self.digest, network=self.network or self.staged.network
        )

    @property
    def version(self) -> Published:
        """Return the published version; stages behind ``publish`` have one."""
        assert self.published is not None, "nothing is published yet"
        return self.published

    @property
    def skipped_images(self) -> tuple[tuple[str, str], ...]:
        """Return every image that a stage could not read, once: (name, reason)."""
        images = [image for record in self.sensitivities for image in record.skipped]
        images += [*self.activations.skipped, *self.reconstruction.skipped]
        images += [image for one in self.measured for image in one.skipped]
        return tuple(dict.fromkeys(images))


class Stage(Protocol):
    """One stage of a job."""

    def __call__(self, job: Job, executor: Executor, clock: StageClock, /) -> Job:
        """Do the stage's work and return the job with what came of it; a job that does not ask for it comes back as
        it is.
        """
        ...
