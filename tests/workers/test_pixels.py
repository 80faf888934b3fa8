"""Every mode and orientation of an image, and every way in which one can be broken."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torchvision.transforms import v2

from nestquant.engines.images import ImageFault, Preprocessing, decode, to_input
from workers.errors import DataError
from workers.inputs.images import ImageSet, image_boundary, open_images
from workers.inputs.labels import Labelling

PLAIN = Preprocessing(size=8, resize=None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
GREY = Preprocessing(size=8, resize=None, mean=(0.0,), std=(1.0,))
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def encoded(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    stream.seek(0)
    return stream


def levels(image: Image.Image, preprocessing: Preprocessing = PLAIN) -> np.ndarray:
    """What the network sees, as numbers from 0 to 255."""
    return np.round(to_input(image, preprocessing) * 255).astype(int)


def colours() -> Image.Image:
    return Image.fromarray(np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_modes_of_8_bits_are_what_torchvision_makes_of_them(mode: str) -> None:
    source = colours().convert("L") if mode == "LA" else colours().convert("P") if mode == "PA" else colours()
    image = source.convert(mode)
    expected = v2.functional.pil_to_tensor(image.convert("RGB"))
    assert np.array_equal(levels(image), expected.numpy())
    assert np.array_equal(levels(image, GREY), v2.functional.pil_to_tensor(image.convert("L")).numpy())


def test_a_palette_with_transparency_keeps_its_colours() -> None:
    image = colours().convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    image.info["transparency"] = 3
    opened = decode(encoded(image, "png", transparency=3))
    assert (opened.mode, opened.info["transparency"]) == ("P", 3)
    assert np.array_equal(levels(opened), levels(image))


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff", "pgm"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    """Clipped at 255, as Pillow converts it, all of this but the first row was white."""
    values = (RAMP.astype(np.uint16) << 8) | 0x34
    if kind == "pgm":
        stream: io.BytesIO = io.BytesIO(b"P5\n8 8\n65535\n" + values.astype(">u2").tobytes())
    elif kind == "big-endian tiff":
        stream = io.BytesIO(grey_tiff(values, photometric=1, order=">"))
    else:
        stream = encoded(Image.fromarray(values), kind)
    image = decode(stream)
    assert np.array_equal(levels(image, GREY)[0], RAMP)
    assert np.array_equal(levels(image), np.stack([RAMP] * 3))


def test_16_bit_grey_and_16_bit_colour_agree() -> None:
    values = (RAMP.astype(np.uint16) << 8) | 0xFE
    grey, colour = (decode(io.BytesIO(png_16(one))) for one in (values, np.stack([values] * 3, axis=-1)))
    assert (grey.mode, colour.mode) == ("L", "RGB")
    assert np.array_equal(levels(grey), levels(colour))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "mode F: which values are black"),
        (Image.fromarray(RAMP.astype(np.int32)), "mode I: which values are black"),
        (Image.fromarray(RAMP.astype(np.uint16)), "mode I;16: the highest of its 16-bit values is 252"),
        (Image.fromarray(RAMP.astype(np.uint16) * 16), "mode I;16: the highest of its 16-bit values is 4032"),
        (Image.new("LAB", (8, 8)), "mode LAB: which values are black"),
    ],
)
def test_a_mode_without_a_known_scale_is_refused_by_name(image: Image.Image, reason: str, tmp_path: Path) -> None:
    image.save(tmp_path / "odd.tiff")
    colours().save(tmp_path / "plain.png")
    images = open_images(tmp_path)
    inputs = torch.cat([batch for batch, _ in images.batches(PLAIN, batch_size=2)])
    assert np.array_equal(np.round(inputs.numpy() * 255).astype(int), levels(colours())[None])
    ((name, found),) = images.skipped
    assert name == "odd.tiff"
    assert found.startswith(reason)


def test_a_16_bit_image_that_is_all_black_is_black() -> None:
    assert levels(decode(encoded(Image.fromarray(np.zeros((8, 8), np.uint16)), "png"))).max() == 0


def test_16_bits_with_white_at_zero_are_refused() -> None:
    tiff = grey_tiff(np.full((8, 8), 0x8000, np.uint16), photometric=0, order="<")
    with pytest.raises(ImageFault, match="zero is white"):
        decode(io.BytesIO(tiff))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_the_camera_held_sideways_gives_an_upright_image(orientation: int, kind: str) -> None:
    wide = Image.fromarray(np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, 8, 0), 8, 1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {"quality": 100} if kind == "jpeg" else {}
    data = encoded(wide.convert("RGB"), kind, exif=exif, **options)
    pixels = np.asarray(wide)[4::8, 4::8]
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).T,
        8: np.rot90(pixels, 1),
    }[orientation]
    found = np.asarray(decode(data).convert("L"))[4::8, 4::8]
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= 2


def test_damaged_exif_says_nothing_about_the_pixels() -> None:
    whole = encoded(colours(), "png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert np.array_equal(levels(decode(whole)), levels(colours()))


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_several_frames_the_first_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (value, value, value)) for value in (200, 10, 90)]
    options = {"lossless": True} if kind == "webp" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(data).n_frames == 3  # type: ignore[attr-defined]
    assert np.unique(levels(decode(data))).tolist() == [200]


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "bmp", "gif", "webp"])
def test_a_truncated_file_is_left_out_by_name(kind: str, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    data = encoded(noise, kind).getvalue()
    for part in (0, 1, 10, len(data) // 2, len(data) - 40):
        (tmp_path / f"{part:06d}.png").write_bytes(data[:part])
    images = open_images(tmp_path)
    assert sum(len(batch) for batch, _ in images.batches(PLAIN, batch_size=8)) == 0
    assert [name for name, _ in images.skipped] == list(images.names)


@pytest.mark.parametrize("shape", [(64, 96), (40, 200), (300, 50), (33, 47), (20, 20), (12, 90)])
@pytest.mark.parametrize("size", [(24, 40), (40, 24), (32, 32)])
def test_inputs_that_are_no_squares_are_what_timm_makes_of_them(shape: tuple[int, int], size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    cover = ResizeKeepRatio(size, longest=0.0, interpolation="bilinear")
    expected = v2.functional.pil_to_tensor(v2.functional.center_crop(cover(image), list(size)))
    # Ours never enlarges to ``resize``; to ``size`` it does, as here.
    preprocessing = Preprocessing(size, size, (0.0,) * 3, (1.0,) * 3)
    assert preprocessing.input_shape == (3, *size)
    assert np.array_equal(levels(image, preprocessing), expected.numpy())
    unshrunk = Preprocessing(size, None, (0.0,) * 3, (1.0,) * 3)
    if shape[0] >= size[0] and shape[1] >= size[1]:
        expected = v2.functional.pil_to_tensor(v2.functional.center_crop(image, list(size)))
        assert np.array_equal(levels(image, unshrunk), expected.numpy())


def test_two_equal_sides_are_a_square() -> None:
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (50, 61, 3), dtype=np.uint8))
    square, sides = (
        Preprocessing(24, 30, (0.5,) * 3, (0.2,) * 3),
        Preprocessing((24, 24), (30, 30), (0.5,) * 3, (0.2,) * 3),
    )
    assert np.array_equal(to_input(image, square), to_input(image, sides))


def test_a_strip_is_refused_and_not_enlarged_to_gigabytes() -> None:
    strip = Image.new("RGB", (1, 100_000))
    with pytest.raises(ImageFault, match="1 x 100000 pixels would be enlarged to 224 x 22400000"):
        to_input(strip, Preprocessing(224, None, (0.0,) * 3, (1.0,) * 3))
    assert to_input(Image.new("RGB", (10, 3000)), Preprocessing(224, None, (0.0,) * 3, (1.0,) * 3)).shape[1:] == (
        224,
        224,
    )


def test_a_decompression_bomb_is_left_out_before_it_is_decoded() -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "png")
    bomb.seek(0)
    with pytest.raises(ImageFault, match="DecompressionBombError: Image size"), image_boundary("bomb.png"):
        decode(bomb)


def test_no_other_program_is_started_for_an_image() -> None:
    stream = io.BytesIO()
    colours().save(stream, "eps")
    stream.seek(0)
    assert Image.open(stream).format == "EPS"
    with pytest.raises(ImageFault, match="no image of a format known here"), image_boundary("page.jpg"):
        decode(stream)


class Raising:
    """Images that raise, whatever it is."""

    resident_bytes = 0

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def load(self, index: int) -> Image.Image:
        if index == 1:
            raise self.error
        return colours()

    def check(self) -> None:
        raise self.error


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class Two(Exception):
    """One that cannot be made from a text alone."""

    def __init__(self, first: str, second: int) -> None:
        super().__init__(first, second)


def plain_kinds() -> list[type[Exception]]:
    """Every exception of Python's own that takes one text."""
    found: list[type[Exception]] = []
    for kind in (getattr(builtins, name) for name in dir(builtins)):
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError | OSError):
            with contextlib.suppress(TypeError):
                kind("text")
                found.append(kind)
    return found


anything = st.one_of(
    st.builds(lambda kind, text: kind(text), st.sampled_from(plain_kinds()), st.text()),
    st.sampled_from([Mute(), Two("a", 1), AssertionError(), UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "no\nlines")]),
    st.sampled_from([zlib.error("x"), struct.error("y"), Image.DecompressionBombError("z"), OSError(-9)]),
    st.builds(OSError, st.integers(1, 140), st.text(), st.text()),
)


@given(anything)
@example(OSError(errno.EMFILE, "Too many open files"))
@settings(max_examples=300, deadline=None)
def test_whatever_is_raised_becomes_one_line_that_names_the_image(error: Exception) -> None:
    images = ImageSet(Path("set"), "set", Labelling(["a.png", "b\x1b[31m\nc.png", "d.png"], None), Raising(error))
    kind = type(error).__name__
    try:
        inputs = torch.cat([batch for batch, _ in images.batches(PLAIN, batch_size=2)])
    except DataError as told:
        assert isinstance(error, MemoryError | OSError)
        text = str(told)
        assert text.startswith("Image b\\x1b[31m\\nc.png cannot be read on this machine: ")
        assert kind in text
    else:
        ((name, text),) = images.skipped
        assert len(inputs) == 2
        assert name == "b\\x1b[31m\\nc.png"
        assert text.startswith(kind)
    assert text.isprintable()
    assert len(text) < 500


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENOMEM, errno.ESTALE])
def test_the_machines_trouble_ends_the_task_instead_of_leaving_images_out(number: int) -> None:
    images = ImageSet(Path("set"), "set", Labelling(["a.png", "b.png"], None), Raising(OSError(number, "trouble")))
    with pytest.raises(DataError, match=r"Image b\.png cannot be read on this machine: .*trouble; try again\."):
        list(images.batches(PLAIN, batch_size=2))
    assert images.skipped == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_wish_to_stop_is_no_fault_of_an_image(kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        list(
            ImageSet(Path("set"), "set", Labelling(["a.png", "b.png"], None), Raising(kind())).batches(
                PLAIN, batch_size=2
            )
        )


def whole_files() -> list[bytes]:
    small = colours()
    kinds = ("jpeg", "png", "gif", "webp", "tiff", "bmp", "ppm")
    files = [encoded(small, kind).getvalue() for kind in kinds]
    return [*files, encoded(Image.fromarray(RAMP.astype(np.uint16) << 8), "tiff").getvalue()]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(whole_files())))
    for _ in range(draw(st.integers(0, 8))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(data)))
    return bytes(data if draw(st.booleans()) else data[:cut])


@given(st.one_of(st.binary(max_size=200), damaged()))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.filterwarnings("ignore")
def test_arbitrary_bytes_are_an_image_or_one_line(data: bytes) -> None:
    try:
        with image_boundary("a.png"):
            inputs = to_input(decode(io.BytesIO(data)), PLAIN)
    except ImageFault as fault:
        text = str(fault)
        assert text.isprintable()
        assert 0 < len(text) < 500
        assert " at 0x" not in text
    else:
        assert inputs.shape == (3, 8, 8)
        assert np.isfinite(inputs).all()


def test_the_same_broken_image_is_told_in_the_same_words_each_time(tmp_path: Path) -> None:
    """Pillow's own words end with an address in memory, so that a list of them held an image once for every mode."""
    (tmp_path / "text.png").write_bytes(b"no image")
    told = set()
    for _ in range(2):
        images = open_images(tmp_path)
        assert list(images.batches(PLAIN, batch_size=1)) == []
        told.update(images.skipped)
    assert told == {("text.png", "UnidentifiedImageError: no image of a format known here")}


def grey_tiff(values: np.ndarray, *, photometric: int, order: str) -> bytes:
    """A TIFF of one strip of 16-bit grey, which Pillow reads but does not write in this byte order."""
    mark = b"MM" if order == ">" else b"II"
    data = values.astype(f"{order}u2").tobytes()
    tags = {
        256: values.shape[1],
        257: values.shape[0],
        258: 16,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        279: len(data),
    }
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 3, 1) + struct.pack(f"{order}H", value) + b"\0\0" for tag, value in tags.items()
    )
    table = struct.pack(f"{order}H", len(tags)) + entries + b"\0\0\0\0"
    return mark + struct.pack(f"{order}HI", 42, 8 + len(data)) + data + table


def png_16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, grey or colour, which Pillow reads but does not write in colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
