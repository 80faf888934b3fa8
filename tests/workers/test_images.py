"""Image sets: folder, tar and npz hold the same pixels; labels; bad images; preprocessing."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nestquant.engines.images import Preprocessing, to_input
from workers.errors import DataError
from workers.inputs.images import open_images

PLAIN = Preprocessing(size=8, resize=None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def everything(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(open_images(path).batches(PLAIN, batch_size=3))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_folder_tar_and_npz_give_the_same_inputs(pixels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x=pixels, y=np.array([0, 0, 1, 1]))
    folder = tmp_path / "folder"
    for index, one in enumerate(pixels):
        place = folder / ("cat" if index < 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.png").write_bytes(png(one))
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(folder, arcname=".")
    expected = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
    for path in (tmp_path / "set.npz", folder, tmp_path / "set.tar"):
        images, labels = everything(path)
        assert torch.equal(images, expected), path
        assert labels.tolist() == [0, 0, 1, 1], path
        assert images.is_contiguous()


def test_a_table_of_labels_wins_and_orders(pixels: np.ndarray, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        files = {f"{index}.png": png(one) for index, one in enumerate(pixels)}
        files["labels.csv"] = b"file,wnid,label\n2.png,n1,7\n0.png,n0,3\n"
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    images = open_images(tmp_path / "set.tar")
    assert (list(images.names), list(images.labels or [])) == (["2.png", "0.png"], [7, 3])


def test_a_bad_image_is_named_and_left_out(pixels: np.ndarray, tmp_path: Path) -> None:
    for index, one in enumerate(pixels):
        (tmp_path / f"{index}.png").write_bytes(png(one) if index != 1 else png(one)[:40])
    images = open_images(tmp_path)
    counted = sum(len(inputs) for inputs, _ in images.batches(PLAIN, batch_size=2))
    assert counted == 3
    assert [name for name, _ in images.skipped] == ["1.png"]


def test_resize_only_shrinks_and_a_small_image_is_enlarged_to_the_crop() -> None:
    wide = Image.fromarray(np.zeros((40, 80, 3), np.uint8))
    assert to_input(wide, Preprocessing(8, 10, (0.0,) * 3, (1.0,) * 3)).shape == (3, 8, 8)
    small = Image.fromarray(np.full((4, 6, 3), 255, np.uint8))
    assert to_input(small, Preprocessing(8, 10, (0.0,) * 3, (1.0,) * 3)).flatten().tolist() == [1.0] * 192
    gradient = Image.fromarray(np.tile(np.arange(9, dtype=np.uint8)[:, None, None], (1, 9, 3)))
    cropped = to_input(gradient, Preprocessing(7, 20, (0.0,) * 3, (1.0,) * 3))
    assert np.array_equal(cropped[0, :, 0] * 255, np.arange(1.0, 8.0))


def test_an_odd_margin_is_cut_as_torchvision_cuts_it() -> None:
    """227 pixels to 224, as the test data's ImageNet images: offset round(1.5) = 2, not 1."""
    gradient = Image.fromarray(np.tile(np.arange(227, dtype=np.uint8)[:, None, None], (1, 227, 3)))
    cropped = to_input(gradient, Preprocessing(224, 256, (0.0,) * 3, (1.0,) * 3))
    assert np.array_equal(cropped[0, :, 0] * 255, np.arange(2.0, 226.0))


def test_normalisation_is_per_channel() -> None:
    image = Image.fromarray(np.full((8, 8, 3), 255, np.uint8))
    values = to_input(image, Preprocessing(8, None, (0.5, 0.0, 1.0), (0.5, 2.0, 1.0)))[:, 0, 0]
    assert values.tolist() == [1.0, 0.5, 0.0]


def test_grey_networks_get_one_channel(pixels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", x=pixels[..., 0])
    images, labels = next(
        open_images(tmp_path / "grey.npz").batches(Preprocessing(8, None, (0.0,), (1.0,)), batch_size=4)
    )
    assert torch.equal(images[:, 0] * 255, torch.from_numpy(pixels[..., 0].astype(np.float32)))
    assert labels.tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no such file or folder"),
        (lambda p: p.mkdir(), "holds no image"),
        (
            lambda p: p.write_bytes(b"text"),
            r"is neither a folder, an \.npz nor a tar \(file could not be opened successfully\)\.$",
        ),
        (lambda p: zipfile.ZipFile(p, "w").close(), r"is a zip archive; expected a folder, .* or a tar: unpack it\.$"),
    ],
)
def test_what_is_no_image_set_is_said(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "images"
    make(path)
    with pytest.raises(DataError, match=message):
        open_images(path)


def test_an_npz_with_the_wrong_arrays_names_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3), np.float32))
    with pytest.raises(DataError, match=r"x is float32 \(2, 3\); expected x as uint8"):
        open_images(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.zeros((2, 8, 8, 3), np.uint8), y=np.zeros(3))
    with pytest.raises(DataError, match=r"y has shape \(3,\); expected \(2,\)"):
        open_images(tmp_path / "b.npz")


def test_evaluation_without_labels_says_what_is_needed(pixels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x=pixels)
    with pytest.raises(
        DataError, match=r"has no labels: there is no array 'y' in the npz\. Evaluation needs labels\.csv"
    ):
        open_images(tmp_path / "set.npz").require_labels()


def test_the_digest_follows_content_and_count(pixels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x=pixels)
    images = open_images(tmp_path / "set.npz")
    assert images.digest() == images.digest(4) != images.digest(3)
    np.savez(tmp_path / "set.npz", x=pixels[::-1])
    assert open_images(tmp_path / "set.npz").digest() != images.digest(3)


def test_a_sample_is_spread_over_the_whole_set(pixels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x=np.concatenate([pixels] * 2), y=np.arange(8))
    images = open_images(tmp_path / "set.npz")
    few = images.sample(3)
    assert (list(few.names), few.labels, len(few)) == (["x[0]", "x[2]", "x[5]"], [0, 2, 5], 3)
    inputs, labels = next(few.batches(PLAIN, batch_size=8))
    everyone, _ = next(images.batches(PLAIN, batch_size=8))
    assert torch.equal(inputs, everyone[[0, 2, 5]])
    assert labels.tolist() == [0, 2, 5]
    assert images.sample(8) is images
    assert images.sample(99) is images


@pytest.mark.parametrize("packed", [False, True])
def test_a_set_of_which_no_image_can_be_used_is_refused_and_one_good_image_is_enough(
    pixels: np.ndarray, tmp_path: Path, packed: bool
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "b.tif")
    (folder / "c.png").symlink_to(tmp_path / "gone")

    def opened() -> Path:
        if not packed:
            return folder
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            archive.add(folder, arcname=".")
        return tmp_path / "set.tar"

    path = opened()
    with pytest.raises(DataError) as caught:
        open_images(path).check()
    assert str(caught.value) == (
        f"{path}: none of 3 images can be used; the first, a.png: UnidentifiedImageError: no image of a format known "
        "here."
    )
    if not packed:
        with pytest.raises(
            DataError, match=r"none of 1 images .* c\.png: \w+: no such file any more, or a link to nothing\."
        ):
            open_images(path).take([2]).check()
    (folder / "d.png").write_bytes(png(pixels[0]))
    open_images(opened()).check()
    with pytest.raises(DataError, match=r"none of 2 images can be used; the first, a\.png"):
        open_images(opened()).take([0, 1]).check()
