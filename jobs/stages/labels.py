"""Names of the classes: from a file, or from the folders or table of an image set; looked at before work, published
with the version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from jobs.errors import PlanError
from jobs.spec.job import JobSpec
from jobs.stages.job import Job
from storage.class_labels import build_labels
from storage.manifest import MEDIA_TYPE_LABELS
from workers.errors import DataError, printable
from workers.inputs.images import ImageSet
from workers.inputs.labels import labels_of_file


def class_names(
    spec: JobSpec, sets: Mapping[str, ImageSet], folder: Path, *, classes: int | None
) -> tuple[str, ...] | None:
    """Return the names that the spec asks for, class 0 first; None where it asks for none.

    Args:
        spec: the job.
        sets: its image sets by section.
        folder: where a file of a bucket is downloaded to.
        classes: of the network, where that is known.

    Raises:
        DataError: the file or set does not say them.
        PlanError: the network has another number of classes.
        storage.StorageError: the store refused.
    """
    if spec.labels is None:
        return None
    if spec.labels.file is not None:
        where = f"labels.file {printable(spec.labels.file, most=200)}"
        names = labels_of_file(spec.labels.file, folder, where=where)
    else:
        assert spec.labels.images is not None, "one of the two, the spec sees to that"
        where = f"{spec.labels.images}.data"
        names = _of_set(sets[spec.labels.images], where)
    try:
        build_labels(names)
    except ValueError as error:
        raise DataError(f"{where}: the names of its classes cannot be published: {error}.") from error
    if classes is not None and len(names) != classes:
        raise PlanError(
            f"{where} has {len(names)} names, {spec.model.library} {spec.model.arch} has {classes} classes; expected a "
            "name for each, class 0 first."
        )
    return names


def put(job: Job) -> Job:
    """Store the names, where the job has some; the manifest will point at them."""
    if job.class_names is None:
        return job
    return replace(job, labels=job.registry.put_blob(build_labels(job.class_names), MEDIA_TYPE_LABELS))


def _of_set(images: ImageSet, where: str) -> tuple[str, ...]:
    names = images.labelling.class_names
    if names is None:
        reason = images.labelling.fault or images.labelling.reading or "it has no labels"
        raise DataError(
            f"{where} does not name its classes ({reason}): expected a folder for each class, or a column of names in "
            "labels.csv with a row for each; or give labels.file."
        )
    return names
