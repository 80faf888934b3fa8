"""Image sets in one npz: ``x`` uint8 (N, H, W, C) or (N, H, W) and, for evaluation, ``y`` (N,), whole numbers.

In the place of ``x``, ``inputs`` float32 (N, C, H, W): what goes into the network, prepared already.

What an array claims to be is held against its file before memory is taken, and the pixels are read when the first image
is asked for: a driver that only checks a set never holds it.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from workers.errors import DataError, one_line, shown
from workers.inputs.labels import MAX_LABEL, Labelling, by_array

_DEFLATE_FACTOR = 1032
"""What deflate can shrink bytes by, at most: a claim beyond it is a lie."""

INPUTS = "inputs"
_CHANNELS = (1, 2, 3, 4)
_CHUNK = 2**20


class NumberedNames(Sequence[str]):
    """``x[0]``, ``x[1]`` ... for so many images."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        """Return the name of one image, or of several."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self.total))]
        if not -self.total <= index < self.total:
            raise IndexError(index)
        return f"x[{index % self.total}]"


class NpzReader:
    """The images of an npz, read as a whole when the first is asked for; ``resident_bytes`` is what they take then.

    ``path`` is where it is read, ``uri`` what the user calls it.
    """

    def __init__(self, path: Path, uri: str) -> None:
        self.path, self.uri = path, uri
        self.shape, dtype = _header(path, uri, "x")
        if dtype != np.uint8 or len(self.shape) not in (3, 4):
            raise DataError(f"{uri}: x is {dtype} {self.shape}; expected x as uint8 (N, H, W, C) or (N, H, W).")
        if len(self.shape) == 4 and self.shape[3] not in _CHANNELS:
            hint = ""
            if self.shape[1] in _CHANNELS:
                hint = " This looks like (N, C, H, W): store x.transpose(0, 2, 3, 1)."
            raise DataError(f"{uri}: x is uint8 {self.shape}; expected (N, H, W, C) with 1 to 4 channels.{hint}")
        if 0 in self.shape:
            raise DataError(f"{uri} holds no image: x is uint8 {self.shape}.")
        self.resident_bytes = math.prod(self.shape)
        self._pixels: np.ndarray | None = None

    def load(self, index: int) -> Image.Image:
        """Return one image.

        Raises:
            DataError: the file is damaged, or larger than the memory.
        """
        if self._pixels is None:
            self._pixels = _array(self.path, self.uri, "x")
        pixels = self._pixels[index]
        return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)

    def check(self) -> None:
        """Read the pixels once without keeping them.

        Raises:
            DataError: the file is damaged.
        """
        _drain(self.path, self.uri, "x")


class InputsReader:
    """The prepared inputs of an npz; see ``NpzReader``."""

    def __init__(self, path: Path, uri: str) -> None:
        self.path, self.uri = path, uri
        self.shape, dtype = _header(path, uri, INPUTS)
        if dtype != np.float32 or len(self.shape) != 4 or 0 in self.shape:
            raise DataError(f"{uri}: inputs is {dtype} {self.shape}; expected float32 (N, C, H, W), none of them 0.")
        self.resident_bytes = 4 * math.prod(self.shape)
        self._values: np.ndarray | None = None

    def load(self, index: int) -> Tensor:
        """Return one input, float32 (C, H, W).

        Raises:
            DataError: the file is damaged, or larger than the memory; the input holds NaN or infinity.
        """
        if self._values is None:
            self._values = _array(self.path, self.uri, INPUTS)
        value = torch.from_numpy(self._values[index])
        if not value.isfinite().all():
            raise DataError(f"{self.uri}: inputs[{index}] holds NaN or infinity.")
        return value

    def check(self) -> None:
        """Read the values once without keeping them.

        Raises:
            DataError: the file is damaged.
        """
        _drain(self.path, self.uri, INPUTS)


def has_inputs(path: Path, uri: str) -> bool:
    """Tell whether an npz holds prepared inputs. Raises `DataError` where it cannot be read."""
    return f"{INPUTS}.npy" in _members(path, uri)


def array_labels(path: Path, uri: str, count: int) -> Labelling:
    """Return the labels of an npz of so many images; none where it has no ``y``, or one that is no label for each.

    Raises:
        DataError: ``y`` is not one value an image, or cannot be read.
    """
    names = NumberedNames(count)
    if "y.npy" not in _members(path, uri):
        return Labelling(names, None, fault="there is no array 'y' in the npz")
    shape, dtype = _header(path, uri, "y")
    if shape != (count,):
        hint = " For one-hot rows, store y.argmax(axis=1)." if len(shape) == 2 and shape[0] == count else ""
        raise DataError(f"{uri}: y has shape {shape}; expected ({count},), one label an image.{hint}")
    if dtype.kind not in "biuf":
        return Labelling(names, None, fault=f"y is {dtype}; expected whole numbers")
    values = _array(path, uri, "y")
    fits = (values >= 0) & (values <= MAX_LABEL)
    if dtype.kind == "f":
        fits &= values == np.floor(values)
    wrong = np.flatnonzero(~fits)
    if len(wrong):
        first = int(wrong[0])
        fault = f"y[{first}] is {values[first]}; expected whole numbers, 0 or more and below the number of classes"
        return Labelling(names, None, fault=fault)
    labels = [int(value) for value in values]
    return Labelling(names, labels, reading=by_array(labels, where="the array 'y'"))


def _drain(path: Path, uri: str, name: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
            while stream.read(_CHUNK):
                pass
    except Exception as error:  # a damaged archive raises errors of zipfile, zlib, struct and the system
        raise DataError(f"{uri} is damaged: {one_line(error)}.") from error


def _members(path: Path, uri: str) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename: info for info in archive.infolist()}
    except Exception as error:  # zipfile raises errors of its own, of struct and of the system
        raise DataError(f"{uri} cannot be read as an npz: {one_line(error)}.") from error


def _header(path: Path, uri: str, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of an array, held against the size of its file."""
    members = _members(path, uri)
    info = members.get(f"{name}.npy")
    if info is None:
        members_text = shown([member.removesuffix(".npy") for member in members]) or "nothing"
        raise DataError(f"{uri}: no array {name!r}, but {members_text}; expected x as uint8 (N, H, W, C) or (N, H, W).")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = parse(stream)
            content = info.file_size - stream.tell()
    except Exception as error:  # as above, and what numpy raises for a header that is none
        raise DataError(f"{uri}: array {name!r} cannot be read: {one_line(error)}.") from error
    claimed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or (not dtype.hasobject and claimed != content):
        raise DataError(f"{uri}: {name} claims to be {dtype} {shape}, {claimed} bytes, but has {content}.")
    if content > _DEFLATE_FACTOR * path.stat().st_size:
        raise DataError(f"{uri}: {name} claims {content} bytes, more than the file can hold.")
    return shape, dtype


def _array(path: Path, uri: str, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[name])
    except Exception as error:  # as above; MemoryError where the array is larger than the memory
        raise DataError(f"{uri}: array {name!r} cannot be read: {one_line(error)}.") from error
