"""One image file's bytes to one input: decoded, turned upright, brought to 8 bits a channel, cut and normalised.

The only place where images are decoded, by the service and by devices, with Pillow and numpy alone. Whatever a file
makes the decoders raise comes to one line about that file (`ImageFault`), unless it is the machine's trouble.
"""

from __future__ import annotations

import errno
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from nestquant.engines.errors import PhotoError
from storage.files import open_regular
from storage.preprocessing import Interpolation
from storage.wording import in_one_line, one_line

MAX_ENLARGED_PIXELS = 2**26
"""Pixels of an enlarged image, at most (200 MB): a strip of 1 x 100,000 pixels would grow to 224 x 22,400,000."""

_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are tried, whatever a file is called. Pillow knows more; some of them start other programs (EPS)."""

_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
"""Modes of 8 bits a channel or less, which Pillow converts to RGB and L as torchvision does: transparency is dropped.

Pillow reads 16 bits a channel in colour as the high byte, in these modes.
"""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation. `ImageOps.exif_transpose` also writes the EXIF anew, which
fails where that is damaged elsewhere."""

_ORIENTATION = 0x0112
_PHOTOMETRIC = 262
_LEAST_16_BIT = 4096

_MACHINE_TROUBLE = frozenset(
    {
        errno.EIO,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
        errno.ESTALE,
        errno.EINTR,
        errno.EAGAIN,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EREMOTEIO,
    }
)
"""Errors that come and go with the machine: to leave an image out for one would give other results elsewhere."""


class ImageFault(Exception):
    """One image cannot be used; the message says why in one line."""


def image_fault(error: Exception) -> ImageFault | None:
    """Return what an error says of the image that was read; None where it says nothing of it, but of the machine: no
    memory, no more open files, a disk or mount that fails.
    """
    if isinstance(error, ImageFault):
        return error
    if isinstance(error, UnidentifiedImageError):  # its own text ends with an address in memory
        return ImageFault("UnidentifiedImageError: no image of a format known here")
    if isinstance(error, FileNotFoundError):
        return ImageFault("FileNotFoundError: no such file any more, or a link to nothing")
    machine = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _MACHINE_TROUBLE)
    return None if machine else ImageFault(one_line(error))


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input.

    ``size`` and ``resize`` are pixels, one number for a square or ``(height, width)``. The image is shrunk until it
    just covers ``resize`` where it is larger (never enlarged), then ``size`` is cut from its centre, scaled to [0, 1]
    and normalised per channel. An image smaller than ``size`` is enlarged until it covers it.
    """

    size: int | tuple[int, int]
    resize: int | tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bilinear"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Return the shape of one input: channels, height, width."""
        return (len(self.mean), *sides_of(self.size))

    @property
    def cover(self) -> tuple[int, int] | None:
        """Return height and width of ``resize``."""
        return None if self.resize is None else sides_of(self.resize)

    def to_record(self) -> dict[str, Any]:
        """Return it as plain JSON values, as the manifest keeps it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Preprocessing:
        """Return what ``to_record`` wrote."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
        }
        return cls(**values)


def decode(stream: IO[bytes]) -> Image.Image:
    """Return the first frame, upright, in one of Pillow's modes of 8 bits a channel.

    Raises:
        ImageFault: its mode has no known scale (`to_8_bits`).
        Exception: whatever Pillow's decoders raise; see `image_fault`.
    """
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with Image.open(stream, formats=formats) as image:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        plain = to_8_bits(image)
    return plain if turn is None else plain.transpose(turn)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Return an image of 8 bits a channel: itself, or 16-bit grey by its high byte, as Pillow does for 16-bit colour.

    Raises:
        ImageFault: 32-bit integers, floats and the like, whose black and white are not known, and 16-bit grey that uses
            so little of its range that they are not.
    """
    if image.mode in _PLAIN_MODES:
        return image
    # A PGM of more than 8 bits comes as 32-bit integers, scaled to 16 bits by its own header.
    if not image.mode.startswith("I;16") and (image.mode, image.format) != ("I", "PPM"):
        raise ImageFault(f"mode {image.mode}: which values are black and white is not known; save it with 8 bits")
    if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        raise ImageFault("16-bit TIFF in which zero is white: save it with 8 bits")
    values = np.asarray(image)
    highest = int(values.max(initial=0))
    if 0 < highest < _LEAST_16_BIT:
        raise ImageFault(
            f"mode {image.mode}: the highest of its 16-bit values is {highest}, so that fewer bits are in use, and how "
            "many is not known; save it with 8 bits"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


def to_input(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Turn one image into float32 (C, H, W), normalised.

    Raises:
        ImageFault: the image is so narrow that it would have to be enlarged beyond all bounds.
    """
    channels, height, width = preprocessing.input_shape
    image = image.convert("L" if channels == 1 else "RGB")
    # As divisions of whole numbers, so that a factor of one is exactly that.
    least = max(height / image.height, width / image.width)
    cover = preprocessing.cover
    factor = max(least, 1.0 if cover is None else min(1.0, max(cover[0] / image.height, cover[1] / image.width)))
    if factor != 1.0:
        size = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
        if factor > 1 and size[0] * size[1] > MAX_ENLARGED_PIXELS:
            raise ImageFault(f"{image.width} x {image.height} pixels would be enlarged to {size[0]} x {size[1]}")
        image = image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])
    # As torchvision's CenterCrop: an odd margin's half goes to the nearest even offset.
    column, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((column, top, column + width, top + height))
    pixels = np.asarray(image, dtype=np.float32).reshape(height, width, channels) / np.float32(255)
    mean, std = np.asarray(preprocessing.mean, dtype=np.float32), np.asarray(preprocessing.std, dtype=np.float32)
    normalised = (pixels - mean) / std
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def photo_input(path: Path, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Read a photograph as one input, float32 ``[C, H, W]``.

    Raises:
        PhotoError: there is no such file, it cannot be read, or it is no image that can be used; it names the file.
    """
    name = in_one_line(str(path))
    try:
        with open_regular(path) as file:
            return to_input(decode(file), preprocessing)
    except FileNotFoundError as error:
        raise PhotoError(f"No photograph at {name}: there is no such file.") from error
    except Exception as error:  # whatever the decoders raise
        fault = image_fault(error)
        reason = f"cannot be read on this machine: {one_line(error)}; try again" if fault is None else str(fault)
        raise PhotoError(f"Photograph {name}: {reason}.") from error


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, upright, where there is none or it cannot be read: the pixels can."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises anything; it says nothing about the pixels
        return 1


def sides_of(size: Any) -> tuple[int, int]:
    """Return height and width of what is one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
