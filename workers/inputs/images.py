"""Labelled or unlabelled images from a folder, a tar or an npz, read a few at a time.

* folder: image files; labels from ``labels.csv`` (``file,...,label``), else from the folders (`workers.inputs.labels`)
* tar: the same, uncompressed or compressed; members are read on demand
* npz: `workers.inputs.arrays`, images or inputs that are prepared already
"""

from __future__ import annotations

import hashlib
import posixpath
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from nestquant.engines.images import ImageFault, Preprocessing, decode, image_fault, to_input
from workers.errors import DataError, one_line, printable
from workers.inputs.arrays import InputsReader, NpzReader, array_labels, has_inputs
from workers.inputs.files import IMAGES, fetch, reading
from workers.inputs.labels import (
    IMAGE_SUFFIXES,
    MAX_TABLE_BYTES,
    TABLE,
    Labelling,
    by_folders,
    by_table,
    root_of,
)
from workers.inputs.listing import file_digest, list_archive, list_folder, open_file


class _Reader(Protocol):
    @property
    def resident_bytes(self) -> int: ...

    def load(self, index: int) -> Image.Image | torch.Tensor: ...

    def check(self) -> None: ...


@dataclass
class ImageSet:
    """Images by index, and what is known of their labels.

    ``path`` is where they are read, ``uri`` what the user calls them. ``skipped`` fills with ``(name, reason)`` as bad
    images are met.
    """

    path: Path
    uri: str
    labelling: Labelling
    reader: _Reader
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def names(self) -> Sequence[str]:
        """Return the images' names, in their order."""
        return self.labelling.names

    @property
    def labels(self) -> Sequence[int] | None:
        """Return the images' labels; None where there are none, or none that are beyond doubt."""
        return self.labelling.labels

    def batches(
        self, preprocessing: Preprocessing, *, batch_size: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield ``(images, labels)``: float32 (B, C, H, W) contiguous and int64 (B,), labels -1 where there are none.

        An image that cannot be used is left out and noted in ``skipped``; it is never replaced.

        Raises:
            DataError: the machine cannot read an image now; it is not left out, as another machine would use it.
        """
        last = len(self) if stop is None else min(stop, len(self))
        for begin in range(start, last, batch_size):
            images, labels = [], []
            for index in range(begin, min(begin + batch_size, last)):
                name = printable(self.names[index])
                try:
                    with image_boundary(name):
                        loaded = self.reader.load(index)
                        images.append(self._prepared(loaded, preprocessing))
                except ImageFault as fault:
                    self.skipped.append((name, str(fault)))
                    continue
                labels.append(-1 if self.labels is None else self.labels[index])
            if images:
                yield torch.stack(images), torch.tensor(labels, dtype=torch.int64)

    def _prepared(self, loaded: Image.Image | torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
        if not isinstance(loaded, torch.Tensor):
            return torch.from_numpy(to_input(loaded, preprocessing))
        if tuple(loaded.shape) != preprocessing.input_shape:
            raise DataError(
                f"{self.uri}: its inputs are {tuple(loaded.shape)}; the network takes {preprocessing.input_shape} "
                "(preprocess.size, and a value of mean for each channel)."
            )
        return loaded

    def sample(self, count: int) -> ImageSet:
        """Return ``count`` of the images, evenly spread over the set and in its order; all where there are no more.

        Sets are often sorted by class: the first images of one would be a few classes alone.
        """
        return self if count >= len(self) else self.take(spread(len(self), count))

    def take(self, chosen: Sequence[int]) -> ImageSet:
        """Return the images at these places, in the order given."""
        names = [self.names[index] for index in chosen]
        labels = None if self.labels is None else [self.labels[index] for index in chosen]
        return ImageSet(
            self.path, self.uri, replace(self.labelling, names=names, labels=labels), _Chosen(self.reader, chosen)
        )

    @property
    def resident_bytes(self) -> int:
        """Return what the set keeps in memory as long as it is open: all the images of an npz, none of a tar's."""
        return self.reader.resident_bytes

    def check(self) -> None:
        """Find out whether the set can be read as a whole, where that is its own question, as an npz is one piece; of
        files, decode them up to the first that can be.

        Raises:
            DataError: it is damaged, or not one image can be used; it names the first, with the reason.
        """
        self.reader.check()
        if self.reader.resident_bytes:
            return
        skipped: list[tuple[str, str]] = []
        for index, name in enumerate(map(printable, self.names)):
            try:
                with image_boundary(name):
                    self.reader.load(index)
                    return
            except ImageFault as fault:
                skipped.append((name, str(fault)))
        raise DataError(none_readable(self.uri, skipped))

    def require_labels(self) -> Sequence[int]:
        """Return the labels.

        Raises:
            DataError: there are none, or none that are beyond doubt; it says why.
        """
        if self.labels is None:
            raise DataError(
                f"{self.uri} has no labels: {self.labelling.fault}. Evaluation needs labels.csv, a folder for each "
                "class, or 'y' in the npz."
            )
        return self.labels

    def require_classes(self, limit: int | None = None) -> Sequence[int]:
        """Return the labels of the first ``limit`` images, or of all.

        Raises:
            DataError: there are none, or they are all the same, so that a constant answer would be right.
        """
        labels = self.require_labels()[:limit]
        if len(set(labels)) < 2:
            part = "" if len(labels) == len(self) else f" in its first {len(labels)} images"
            reading = f" ({self.labelling.reading})" if self.labelling.reading else ""
            raise DataError(
                f"{self.uri} has one label alone{part}, {labels[0]}{reading}: a network that always gives this answer "
                "would be right. Give the folder above the folders of all classes, labels.csv, or more images."
            )
        return labels

    def digest(self, count: int | None = None) -> str:
        """Return ``sha256:<hex>`` of the whole source and of how many of its images count, in order.

        An image that cannot be opened counts as that.

        Raises:
            DataError: the machine cannot read a file now.
        """
        hasher = hashlib.sha256(f"{len(self) if count is None else count}\n".encode())
        if self.path.is_file():
            hasher.update(file_digest(self.path))
        else:
            for name in self.names:
                try:
                    with image_boundary(printable(name)):
                        hasher.update(file_digest(self.path / name))
                except ImageFault:
                    hasher.update(_NO_DIGEST)
        return f"sha256:{hasher.hexdigest()}"


_NO_DIGEST = bytes(32)


def none_readable(where: str, skipped: Sequence[tuple[str, str]]) -> str:
    """Return what to say of images, (name, reason), of which not one can be used."""
    first = f"; the first, {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
    return f"{where}: none of {len(skipped)} images can be used{first}."


@contextmanager
def image_boundary(name: str) -> Iterator[None]:
    """Turn whatever is raised inside into one line.

    Raises:
        ImageFault: the image is at fault.
        DataError: the machine is; it names the image.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        fault = image_fault(error)
        if fault is None:
            raise DataError(f"Image {name} cannot be read on this machine: {one_line(error)}; try again.") from error
        if fault is error:
            raise
        raise fault from error


def spread(total: int, count: int) -> list[int]:
    """Return ``count`` of ``range(total)``, evenly spread."""
    return [index * total // count for index in range(count)]


def fetch_images(uri: str, folder: Path) -> ImageSet:
    """Open a folder, a tar or an npz by its path or URI (`workers.inputs.files.fetch`); messages name it as given.

    Raises:
        DataError: no such set, or none that can be relied upon; see ``open_images``.
        ScratchError, storage.StorageError: it cannot be downloaded to ``folder``.
    """
    return open_images(fetch(uri, folder, IMAGES), uri=uri)


def open_images(path: str | Path, *, uri: str | None = None) -> ImageSet:
    """Open a folder, a tar or an npz.

    Args:
        path: where it is.
        uri: what the user calls it; the path, where that is its only name.

    Raises:
        DataError: no such path, no image in it, or a table, an archive or an array that cannot be relied upon.
    """
    source, name = Path(path), printable(uri or str(path), most=1000)
    with reading(name, IMAGES):
        if source.is_dir():
            return _open_folder(source, name)
        if not source.exists():
            raise IMAGES.missing(name)
        if not source.is_file():
            raise DataError(f"{name} is no file. Give a folder, a .tar or an .npz.")
        if source.suffix == ".npz":
            reader = InputsReader(source, name) if has_inputs(source, name) else NpzReader(source, name)
            return ImageSet(source, name, array_labels(source, name, reader.shape[0]), reader)
        return _open_tar(source, name)


class _Chosen:
    def __init__(self, reader: _Reader, chosen: Sequence[int]) -> None:
        self.reader, self.chosen = reader, chosen
        self.resident_bytes = reader.resident_bytes

    def load(self, index: int) -> Image.Image | torch.Tensor:
        return self.reader.load(self.chosen[index])

    def check(self) -> None:
        self.reader.check()


class _Folder:
    resident_bytes = 0

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def load(self, index: int) -> Image.Image:
        with open_file(self.files[index]) as stream:
            return decode(stream)

    def check(self) -> None:
        """Find nothing: each image is a file of its own."""


class _Tar:
    resident_bytes = 0

    def __init__(self, path: Path, members: Sequence[tarfile.TarInfo]) -> None:
        self.archive = tarfile.open(path)  # noqa: SIM115 - stays open as long as the set does
        self.members = members

    def load(self, index: int) -> Image.Image:
        stream = self.archive.extractfile(self.members[index])
        if stream is None:
            raise ImageFault("not a regular file")
        return decode(stream)

    def check(self) -> None:
        """Find nothing: the list of members was read to its end when the archive was opened."""


def _open_folder(path: Path, uri: str) -> ImageSet:
    listing = list_folder(path, uri)
    tables = [name for name in listing.others if posixpath.basename(name) == TABLE]
    root = root_of(listing, tables)
    labelling = by_folders(listing, root=root)
    if root + TABLE in tables:
        try:
            with open_file(path / root / TABLE) as stream:
                content = stream.read(MAX_TABLE_BYTES + 1)
        except (OSError, ImageFault) as error:
            raise DataError(f"{uri}: {root}{TABLE} cannot be read: {one_line(error)}.") from error
        labelling = by_table(content, listing, root=root, where=uri)
    _require_images(labelling, uri)
    return ImageSet(path, uri, labelling, _Folder([path / name for name in labelling.names]))


def _open_tar(path: Path, uri: str) -> ImageSet:
    try:
        with tarfile.open(path) as archive:
            members = {posixpath.normpath(member.name).lstrip("/"): member for member in archive.getmembers()}
            listing = list_archive(members)
            tables = [name for name in listing.others if posixpath.basename(name) == TABLE]
            root = root_of(listing, tables)
            table = archive.extractfile(members[root + TABLE]) if root + TABLE in tables else None
            content = table.read(MAX_TABLE_BYTES + 1) if table is not None else None
    except tarfile.ReadError as error:
        if zipfile.is_zipfile(path):
            raise DataError(f"{uri} is a zip archive; expected a folder, an .npz or a tar: unpack it.") from error
        first = printable(str(error).partition("\n")[0]).rstrip(":")
        raise DataError(f"{uri} is neither a folder, an .npz nor a tar ({first}).") from error
    except Exception as error:  # a damaged archive raises errors of gzip, lzma, zlib, struct and the system
        raise DataError(f"{uri} cannot be read as a tar: {one_line(error)}.") from error
    labelling = by_folders(listing, root=root) if content is None else by_table(content, listing, root=root, where=uri)
    _require_images(labelling, uri)
    return ImageSet(path, uri, labelling, _Tar(path, [members[name] for name in labelling.names]))


def _require_images(labelling: Labelling, uri: str) -> None:
    if not labelling.names:
        raise DataError(f"{uri} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
