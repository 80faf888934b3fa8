"""Labelled or unlabelled images from a folder, a tar or an npz, read a few at a time.

* folder: image files; labels from ``labels.csv`` (``file,...,label``), else from the sorted names of the sub-folders
  (as torchvision's ImageFolder)
* tar: the same, uncompressed or compressed; members are read on demand
* npz: arrays ``x`` uint8 (N, H, W, C) and, for evaluation, ``y`` int (N,)
"""

from __future__ import annotations

import csv
import hashlib
import io
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from workers.errors import DataError, printable
from workers.inputs.networks import Preprocessing
from workers.inputs.pixels import ImageFault, decode, image_boundary, to_input

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


class _Reader(Protocol):
    @property
    def resident_bytes(self) -> int: ...

    def load(self, index: int) -> Image.Image: ...


@dataclass
class ImageSet:
    """Images by index; ``labels`` is None where none are to be had.

    ``skipped`` fills with ``(name, reason)`` as bad images are met.
    """

    path: Path
    names: Sequence[str]
    labels: Sequence[int] | None
    reader: _Reader
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def batches(
        self, preprocessing: Preprocessing, *, batch_size: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield ``(images, labels)``: float32 (B, C, S, S) contiguous and int64 (B,), labels -1 where there are none.

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
                        images.append(to_input(self.reader.load(index), preprocessing))
                except ImageFault as fault:
                    self.skipped.append((name, str(fault)))
                    continue
                labels.append(-1 if self.labels is None else self.labels[index])
            if images:
                yield torch.stack(images), torch.tensor(labels, dtype=torch.int64)

    def sample(self, count: int) -> ImageSet:
        """Return ``count`` of the images, evenly spread over the set and in its order; all where there are no more.

        Sets are often sorted by class: the first images of one would be a few classes alone.
        """
        return self if count >= len(self) else self.take(spread(len(self), count))

    def take(self, chosen: Sequence[int]) -> ImageSet:
        """Return the images at these places, in the order given."""
        labels = None if self.labels is None else [self.labels[index] for index in chosen]
        return ImageSet(self.path, [self.names[index] for index in chosen], labels, _Chosen(self.reader, chosen))

    @property
    def resident_bytes(self) -> int:
        """Return what the set keeps in memory as long as it is open: all the images of an npz, none of a tar's."""
        return self.reader.resident_bytes

    def require_labels(self) -> Sequence[int]:
        """Return the labels.

        Raises:
            DataError: there are none.
        """
        if self.labels is None:
            raise DataError(
                f"{self.path} has no labels: evaluation needs labels.csv, a folder for each class, or 'y' in the npz."
            )
        return self.labels

    def digest(self, count: int | None = None) -> str:
        """Return ``sha256:<hex>`` of the whole source and of how many of its images count, in order."""
        hasher = hashlib.sha256(f"{len(self) if count is None else count}\n".encode())
        files = [self.path] if self.path.is_file() else [self.path / name for name in self.names]
        for file in files:
            with file.open("rb") as stream:
                hasher.update(hashlib.file_digest(stream, "sha256").digest())
        return f"sha256:{hasher.hexdigest()}"


def spread(total: int, count: int) -> list[int]:
    """Return ``count`` of ``range(total)``, evenly spread."""
    return [index * total // count for index in range(count)]


def open_images(path: str | Path) -> ImageSet:
    """Open a folder, a tar or an npz.

    Raises:
        DataError: no such path, no image in it, or an npz without ``x``.
    """
    source = Path(path)
    if source.is_dir():
        return _open_folder(source)
    if not source.exists():
        raise DataError(f"No images at {path}: there is no such file or folder. Give a folder, a .tar or an .npz.")
    if source.suffix == ".npz":
        return _open_npz(source)
    try:
        return _open_tar(source)
    except tarfile.ReadError as error:
        raise DataError(f"{path} is neither a folder, an .npz nor a tar ({error}).") from error


class _Chosen:
    def __init__(self, reader: _Reader, chosen: Sequence[int]) -> None:
        self.reader, self.chosen = reader, chosen
        self.resident_bytes = reader.resident_bytes

    def load(self, index: int) -> Image.Image:
        return self.reader.load(self.chosen[index])


class _Npz:
    def __init__(self, x: np.ndarray) -> None:
        self.x = x
        self.resident_bytes = x.nbytes

    def load(self, index: int) -> Image.Image:
        pixels = self.x[index]
        return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)


class _Folder:
    resident_bytes = 0

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def load(self, index: int) -> Image.Image:
        with self.files[index].open("rb") as stream:
            return decode(stream)


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


def _open_npz(path: Path) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files if name in ("x", "y")}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an npz: {error}") from error
    x, y = found.get("x"), found.get("y")
    if x is None or x.dtype != np.uint8 or x.ndim not in (3, 4):
        seen = "no array 'x'" if x is None else f"x is {x.dtype} {x.shape}"
        raise DataError(f"{path}: {seen}; expected x as uint8 (N, H, W, C) or (N, H, W).")
    if y is not None and y.shape != (len(x),):
        raise DataError(f"{path}: y has shape {y.shape}; expected ({len(x)},), one label an image.")
    labels = None if y is None else [int(label) for label in y]
    return ImageSet(path, [f"x[{index}]" for index in range(len(x))], labels, _Npz(x))


def _open_folder(path: Path) -> ImageSet:
    names = sorted(
        file.relative_to(path).as_posix() for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES
    )
    table = path / "labels.csv"
    labels = _labels(names, table.read_text() if table.exists() else None, where=str(path))
    names, kept = labels
    return ImageSet(path, names, kept, _Folder([path / name for name in names]))


def _open_tar(path: Path) -> ImageSet:
    with tarfile.open(path) as archive:
        members = {posixpath.normpath(member.name): member for member in archive.getmembers() if member.isfile()}
        table = archive.extractfile(members["labels.csv"]) if "labels.csv" in members else None
        text = table.read().decode() if table is not None else None
    images = [name for name in members if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    names, labels = _labels(sorted(images), text, where=str(path))
    return ImageSet(path, names, labels, _Tar(path, [members[name] for name in names]))


def _labels(names: list[str], table: str | None, *, where: str) -> tuple[list[str], list[int] | None]:
    """Return the names in their fixed order and their labels: from the table, else from the sub-folders, else
    none.
    """
    if not names:
        raise DataError(f"{where} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    if table is not None:
        rows = list(csv.DictReader(io.StringIO(table)))
        try:
            by_name = {row["file"]: int(row["label"]) for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: labels.csv needs the columns 'file' and 'label' (a whole number): {error!r}"
            ) from error
        present = set(names)
        missing = [name for name in by_name if name not in present]
        if missing:
            raise DataError(f"{where}: labels.csv names {len(missing)} files that are not there, {missing[0]!r} first.")
        return list(by_name), list(by_name.values())
    folders = sorted({name.split("/")[0] for name in names if "/" in name})
    if folders and all("/" in name for name in names):
        index = {folder: label for label, folder in enumerate(folders)}
        return names, [index[name.split("/")[0]] for name in names]
    return names, None
