"""How labels are read: from folders as ImageFolder reads them, from tables, from arrays; and what is not guessed."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from nestquant.engines.images import Preprocessing
from storage.stores.uri import open_store
from workers.errors import DataError
from workers.inputs.files import stored_file
from workers.inputs.images import ImageSet, fetch_images, open_images
from workers.inputs.labels import IMAGE_SUFFIXES, Listing, by_table

PLAIN = Preprocessing(size=8, resize=None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(stream, "png")
    return stream.getvalue()


PNG = png()


def plant(root: Path, *names: str, **content: bytes) -> Path:
    """Make files and, where a name ends with a slash, folders."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content.get(name, PNG))
    return root


def table(root: Path, content: bytes | str) -> Path:
    (root / "labels.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def packed(folder: Path, mode: str = "w") -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.add(folder, arcname=".")
    return path


def both(folder: Path) -> list[ImageSet]:
    """The same files as a folder and as a tar."""
    return [open_images(folder), open_images(packed(folder))]


def by_name(images: ImageSet) -> dict[str, int]:
    return dict(zip(images.names, images.require_labels(), strict=True))


def test_suffixes_are_torchvisions() -> None:
    assert sorted(IMAGE_SUFFIXES) == sorted(IMG_EXTENSIONS)


def test_folders_are_labelled_as_image_folder_labels_them(tmp_path: Path) -> None:
    names = ["dog/1.PNG", "dog/2.webp", "Cat/x/3.jpeg", "ant/4.tif", "über/5.ppm", "zebra fish/6.pgm", "dog/notes.txt"]
    root = plant(tmp_path / "set", *names, "bee/")
    theirs = ImageFolder(str(root), allow_empty=True)
    expected = {Path(path).relative_to(root).as_posix(): label for path, label in theirs.samples}
    for images in both(root):
        assert by_name(images) == expected
        assert images.labelling.classes == len(theirs.classes) == 6
        assert images.labelling.reading == (
            "6 classes by the folders: 0 = Cat, 1 = ant, ... 5 = über; 1 of them without images: bee"
        )


def test_the_folders_above_the_classes_are_no_classes(tmp_path: Path) -> None:
    """All of these gave the label 0 to every image."""
    inner = plant(tmp_path / "deep" / "data" / "val", "cat/1.png", "dog/2.png", "dog/3.png")
    for root in (inner, inner.parent, inner.parent.parent):
        for images in both(root):
            assert [*by_name(images).values()] == [0, 1, 1]
    images = open_images(tmp_path / "deep")
    assert [*images.names] == ["data/val/cat/1.png", "data/val/dog/2.png", "data/val/dog/3.png"]
    assert images.labelling.reading == "2 classes by the folders in 'data/val': 0 = cat, 1 = dog"


def test_a_table_below_the_top_is_found(tmp_path: Path) -> None:
    table(plant(tmp_path / "set" / "val", "b.png", "a.png"), "file,label\nb.png,3\na.png,1\n")
    for images in both(tmp_path / "set"):
        assert by_name(images) == {"val/b.png": 3, "val/a.png": 1}
        assert next(images.batches(PLAIN, batch_size=2))[1].tolist() == [3, 1]


def test_what_programs_leave_behind_is_no_class_and_no_image(tmp_path: Path) -> None:
    junk = [
        ".ipynb_checkpoints/1-checkpoint.png",
        "__MACOSX/cat/._1.png",
        ".git/x.png",
        "@eaDir/1.png",
        "Thumbs.db",
        "cat/Thumbs.db",
        "cat/._1.png",
        "cat/.ipynb_checkpoints/1-checkpoint.png",
        "dog/desktop.ini",
        ".DS_Store",
    ]
    root = plant(tmp_path / "set", "cat/1.png", "dog/2.png", *junk)
    for images in both(root):
        assert by_name(images) == {"cat/1.png": 0, "dog/2.png": 1}


def test_a_hidden_folder_on_the_way_to_a_set_is_the_users_own(tmp_path: Path) -> None:
    root = plant(tmp_path / ".cache" / "set", "cat/1.png", "dog/2.png")
    assert [*by_name(open_images(root)).values()] == [0, 1]
    path = tmp_path / "set.tar"
    for prefix in ("../set", "a/b/set"):
        with tarfile.open(path, "w") as archive:
            archive.add(root, arcname=prefix)
        assert [*by_name(open_images(path)).values()] == [0, 1]
    with tarfile.open(path, "w") as archive:
        for name in ("/data/dog/2.png", "/data/cat/1.png"):
            member = tarfile.TarInfo(name)
            member.size = len(PNG)
            archive.addfile(member, io.BytesIO(PNG))
    assert by_name(open_images(path)) == {"data/cat/1.png": 0, "data/dog/2.png": 1}


def test_an_empty_folder_keeps_its_place(tmp_path: Path) -> None:
    for images in both(plant(tmp_path / "set", "ant/", "bee/.gitkeep", "cat/1.png", "dog/2.png")):
        assert by_name(images) == {"cat/1.png": 2, "dog/2.png": 3}
        assert images.labelling.reading.endswith("2 of them without images: ant, bee")


def test_a_folder_of_other_files_is_refused_by_name(tmp_path: Path) -> None:
    for images in both(plant(tmp_path / "set", "annotations/1.xml", "cat/1.png", "dog/2.png")):
        assert images.labels is None
        with pytest.raises(DataError, match="the folder 'annotations' holds files, but no image"):
            images.require_labels()
        assert len(list(images.batches(PLAIN, batch_size=2))) == 1


def test_folders_that_are_numbers_count_as_numbers(tmp_path: Path) -> None:
    """As text, 10 and 11 come before 2."""
    for width in (1, 3):
        names = [f"{number:0{width}d}/x.png" for number in range(12)]
        for images in both(plant(tmp_path / f"set{width}", *names)):
            assert by_name(images) == {name: number for number, name in enumerate(names)}
    assert open_images(tmp_path / "set1").labelling.reading == "12 classes by the folders: 0 = 0, 1 = 1, ... 11 = 11"


@pytest.mark.parametrize(
    ("folders", "seen"),
    [
        (["0", "1", "3"], "the 3 folders are numbers from 0 to 3; expected 0 to 2 without a gap"),
        (["1", "2", "3"], "the 3 folders are numbers from 1 to 3; expected 0 to 2"),
        (["1", "01"], "the 2 folders are numbers from 1 to 1; expected 0 to 1"),
        (["20240101", "9" * 5000], "the 2 folders are numbers from 20240101 to 999999999999; expected 0 to 1"),
    ],
)
def test_numbers_with_a_gap_are_refused(folders: list[str], seen: str, tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        for folder in folders:
            member = tarfile.TarInfo(f"{folder}/x.png")
            member.size = len(PNG)
            archive.addfile(member, io.BytesIO(PNG))
    with pytest.raises(DataError, match=seen):
        open_images(path).require_labels()


def test_a_gap_is_closed_by_an_empty_folder(tmp_path: Path) -> None:
    for images in both(plant(tmp_path / "set", "0/x.png", "1/x.png", "2/", "3/x.png")):
        assert [*by_name(images).values()] == [0, 1, 3]


@pytest.mark.parametrize(
    ("names", "seen"),
    [
        (["1.png"], r"there is neither labels\.csv nor a folder for each class"),
        (["cat/1.png", "dog/2.png", "3.png"], r"1 images lie beside the folders, '3\.png' first"),
        (["train/cat/1.png", "val/dog/2.png"], "the folders train, val look like parts of a data set"),
    ],
)
def test_folders_that_do_not_say_the_classes_are_not_asked(names: list[str], seen: str, tmp_path: Path) -> None:
    for images in both(plant(tmp_path / "set", *names)):
        with pytest.raises(DataError, match=seen):
            images.require_labels()
        assert sum(len(batch) for batch, _ in images.batches(PLAIN, batch_size=8)) == len(names)


def test_a_set_with_one_label_measures_nothing(tmp_path: Path) -> None:
    for images in both(plant(tmp_path / "set", "cat/1.png", "cat/2.png")):
        with pytest.raises(DataError, match=r"has one label alone, 0 \(1 class by the folders: 0 = cat\)"):
            images.require_classes()
    images = open_images(plant(tmp_path / "sorted", "cat/1.png", "cat/2.png", "dog/3.png"))
    assert images.require_classes() == [0, 0, 1]
    with pytest.raises(DataError, match=r"has one label alone in its first 2 images, 0"):
        images.require_classes(2)


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    elsewhere = plant(tmp_path / "elsewhere", "1.png")
    root = plant(tmp_path / "set", "dog/2.png")
    (root / "cat").symlink_to(elsewhere)
    (root / "dog" / "again").symlink_to(root)
    assert by_name(open_images(root)) == {"cat/1.png": 0, "dog/2.png": 1}


def test_what_is_no_file_is_left_out_by_name_and_changes_no_digest_silently(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", "cat/1.png", "dog/2.png", "dog/4.png")
    whole = open_images(root).digest()
    (root / "dog" / "4.png").unlink()
    (root / "dog" / "4.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(root / "dog" / "5.png")
    images = open_images(root)
    assert whole != images.digest() == open_images(root).digest()
    assert sum(len(batch) for batch, _ in images.batches(PLAIN, batch_size=8)) == 2
    told = [(name, reason.split(":")[0]) for name, reason in images.skipped]
    assert told == [("dog/4.png", "FileNotFoundError"), ("dog/5.png", "not a regular file")]


def test_links_in_an_archive_are_images_too(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", "cat/1.png")
    (root / "dog").mkdir()
    os.link(root / "cat" / "1.png", root / "dog" / "2.png")
    (root / "dog" / "3.png").symlink_to("../cat/1.png")
    (root / "dog" / "4.png").symlink_to("../cat/none.png")
    images = open_images(packed(root))
    assert [*by_name(images).values()] == [0, 1, 1, 1]
    assert sum(len(batch) for batch, _ in images.batches(PLAIN, batch_size=8)) == 3
    assert [name for name, _ in images.skipped] == ["dog/4.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    root = plant(tmp_path / "set", "cat/1.png", "dog/2.png")
    (root / "dog").chmod(0)
    with pytest.raises(DataError, match="a folder cannot be read: PermissionError"):
        open_images(root)


def test_a_table_with_fewer_rows_than_images_says_so(tmp_path: Path) -> None:
    root = table(plant(tmp_path / "set", "a.png", "b.png", "c.png"), "file,name,label\nc.png,hen,7\na.png,cat,3\n")
    for images in both(root):
        assert by_name(images) == {"c.png": 7, "a.png": 3}
        assert images.labelling.reading == "2 classes by labels.csv: 3 = cat, 7 = hen"
        assert images.labelling.left_out == "labels.csv names 2 of 3 images; the other 1 do not count"


def test_a_table_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    root = table(
        plant(tmp_path / "set", "a.png", "d/b.png"), b"\xef\xbb\xbffile,label\r\n./a.png, 3\r\nd/b.png,4 \r\n\r\n"
    )
    for images in both(root):
        assert by_name(images) == {"a.png": 3, "d/b.png": 4}
        assert images.labelling.reading == "2 classes by labels.csv, 3 to 4"
        assert images.labelling.left_out == ""


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ("file,label\na.png,1\nb.png,0\na.png,2\n", r"labels\.csv names 'a\.png' twice, in lines 2 and 4\."),
        ("file,label\na.png,1\n./a.png,1\n", r"labels\.csv names 'a\.png' twice, in lines 2 and 3\."),
        ("file,label\nc.png,1\nd.png,1\n", r"names 2 files that are not there, or are no images, 'c\.png' first"),
        ("file,label\n../a.png,1\n", r"names 1 files that are not there, or are no images, '\.\./a\.png' first"),
        ("file,label\na.png,cat\n", r"labels\.csv line 2: label 'cat'; expected a whole number"),
        ("file,label\na.png,3.7\n", r"labels\.csv line 2: label '3\.7'; expected a whole number"),
        ("file,label\na.png,\u0661\n", "labels\\.csv line 2: label '\u0661'; expected a whole number"),
        ("file,label\na.png,\n", r"labels\.csv line 2: label ''; expected a whole number"),
        ("file,label\na.png\n", r"labels\.csv line 2 has no label"),
        ("file,label\n", r"labels\.csv has no rows below its columns"),
        ("", r"labels\.csv has the columns none; expected 'file' and 'label', separated by commas"),
        ("file;label\na.png;1\n", r"labels\.csv has the columns 'file;label'; expected 'file' and 'label'"),
        (b"file,label\n\xe9.png,1\n", r"labels\.csv is not UTF-8 \(byte 0xe9 in line 2\); save it as UTF-8\."),
        ("file,label\n".encode("utf-16"), r"labels\.csv is not UTF-8 \(byte 0xff in line 1\)"),
        ("file,label\n" + "a" * 200_000 + ",1\n", r"labels\.csv line 2: field larger than field limit \(131072\)\."),
        ('file,label\n"a.png\n' + "x," * 90_000, r"labels\.csv line \d+: field larger than field limit"),
    ],
)
def test_a_table_that_cannot_be_relied_upon_is_refused_by_its_line(
    content: str | bytes, seen: str, tmp_path: Path
) -> None:
    root = table(plant(tmp_path / "set", "a.png", "b.png"), content)
    for path in (root, packed(root)):
        with pytest.raises(DataError, match=seen) as told:
            open_images(path)
        assert len(str(told.value).splitlines()) == 1
        assert len(str(told.value)) < 500


@pytest.mark.parametrize("label", ["-1", "2147483648", str(2**64), "9" * 5000])
def test_labels_that_no_network_has_are_no_labels(label: str, tmp_path: Path) -> None:
    root = table(plant(tmp_path / "set", "a.png", "b.png"), f"file,label\na.png,0\nb.png,{label}\n")
    for images in both(root):
        assert (len(images), images.labels) == (2, None)
        with pytest.raises(DataError, match=rf"has no labels: labels\.csv line 3: label {label[:40]}") as told:
            images.require_labels()
        assert len(str(told.value)) < 500


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("gone"), os.mkfifo])
def test_a_table_that_is_no_file_is_not_waited_for(make: Callable[[Path], object], tmp_path: Path) -> None:
    root = plant(tmp_path / "set", "a.png", "b.png")
    make(root / "labels.csv")
    if (root / "labels.csv").is_dir():
        assert open_images(root).labels is None
        return
    with pytest.raises(DataError, match=r"labels\.csv cannot be read: "):
        open_images(root)


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


X = np.zeros((3, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("y", "seen"),
    [
        (np.array([0.0, 3.7, 1.0]), r"y\[1\] is 3\.7; expected whole numbers"),
        (np.array([0, 1, -1]), r"y\[2\] is -1; expected whole numbers, 0 or more"),
        (np.array([0.0, np.nan, 1.0]), r"y\[1\] is nan"),
        (np.array([np.inf, 0.0, 1.0]), r"y\[0\] is inf"),
        (np.array([0, 1, 2**64 - 1], dtype=np.uint64), r"y\[2\] is 18446744073709551615"),
        (np.array(["a", "b", "c"]), "y is <U1; expected whole numbers"),
        (np.array([1j, 0, 1]), "y is complex128; expected whole numbers"),
        (None, "there is no array 'y' in the npz"),
    ],
)
def test_an_array_of_no_whole_numbers_is_no_labels(y: np.ndarray | None, seen: str, tmp_path: Path) -> None:
    images = open_images(npz(tmp_path / "a.npz", x=X, **({} if y is None else {"y": y})))
    assert len(list(images.batches(PLAIN, batch_size=3))) == 1
    with pytest.raises(DataError, match=f"has no labels: {seen}"):
        images.require_labels()


@pytest.mark.parametrize("kind", [np.int8, np.uint64, np.float32, np.bool_])
def test_whole_numbers_of_any_kind_are_labels(kind: type, tmp_path: Path) -> None:
    images = open_images(npz(tmp_path / "a.npz", x=X, y=np.array([1, 0, 1], dtype=kind)))
    assert images.require_classes() == [1, 0, 1]
    assert images.labelling.reading == "2 classes by the array 'y', 0 to 1"


@pytest.mark.parametrize(
    ("arrays", "seen"),
    [
        ({"x": np.zeros((2, 3, 32, 32), np.uint8)}, r"looks like \(N, C, H, W\): store x\.transpose\(0, 2, 3, 1\)"),
        (
            {"x": np.zeros((2, 7, 32, 32), np.uint8)},
            r"x is uint8 \(2, 7, 32, 32\); expected \(N, H, W, C\) with 1 to 4",
        ),
        ({"x": np.zeros((0, 32, 32, 3), np.uint8)}, r"holds no image: x is uint8 \(0, 32, 32, 3\)"),
        ({"x": np.zeros((2, 0, 32, 3), np.uint8)}, r"holds no image"),
        ({"images": X}, "no array 'x', but images; expected x as uint8"),
        ({}, "no array 'x', but nothing"),
        ({"x": np.array(["a", None], dtype=object)}, r"x is object \(2,\); expected x as uint8"),
        ({"x": X, "y": np.eye(3)}, r"y has shape \(3, 3\); expected \(3,\), .* store y\.argmax\(axis=1\)"),
    ],
)
def test_an_npz_of_another_kind_is_refused_in_one_line(
    arrays: dict[str, np.ndarray], seen: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=seen):
        open_images(npz(tmp_path / "a.npz", **arrays))


def claiming(path: Path, shape: tuple[int, ...], content: bytes = b"x" * 100, *, size: int | None = None) -> Path:
    """An npz whose x says that it has this shape, and whose archive says that it has this size."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    data = header.getvalue() + content
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", data)
    if size is not None:
        raw = path.read_bytes()
        place = raw.index(b"PK\x01\x02") + 24  # the central directory's uncompressed size
        path.write_bytes(raw[:place] + struct.pack("<I", len(header.getvalue()) + size) + raw[place + 4 :])
    return path


def test_an_npz_is_held_against_its_file_before_memory_is_taken(tmp_path: Path) -> None:
    huge = (10**9, 224, 224, 3)
    with pytest.raises(
        DataError, match=r"x claims to be uint8 \(1000000000, 224, 224, 3\), 150528000000000 bytes, but"
    ):
        open_images(claiming(tmp_path / "a.npz", huge))
    with pytest.raises(DataError, match=r"x claims 3221225472 bytes, more than the file can hold"):
        open_images(claiming(tmp_path / "b.npz", (1024, 1024, 1024, 3), size=3 * 2**30))
    with pytest.raises(DataError, match=r"x claims to be uint8 \(-1, 8, 8, 3\)"):
        open_images(claiming(tmp_path / "c.npz", (-1, 8, 8, 3)))


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"no zip", PNG, zlib.compress(b"0" * 999)], ids=repr
)
def test_what_is_no_npz_is_said_in_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.npz cannot be read as an npz: BadZipFile: File is not a zip file"):
        open_images(tmp_path / "a.npz")


def test_a_damaged_npz_is_found_without_holding_it(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", x=np.zeros((1, 256, 256, 3), np.uint8))
    open_images(path).check()
    raw = bytearray(path.read_bytes())
    raw[100_000] ^= 1
    path.write_bytes(raw)
    images = open_images(path)
    assert images.resident_bytes == 256 * 256 * 3
    with pytest.raises(DataError, match=r"a\.npz is damaged: BadZipFile: Bad CRC-32"):
        images.check()
    with pytest.raises(DataError, match=r"array 'x' cannot be read: BadZipFile: Bad CRC-32"):
        list(images.batches(PLAIN, batch_size=1))


@pytest.mark.parametrize("kind", ["w:gz", "w:xz"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_tar_that_is_cut_off_is_said_in_one_line(kind: str, part: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 40_000, dtype=np.uint8).tobytes()
    root = plant(tmp_path / "set", "cat/1.png", "dog/2.png")
    (root / "dog" / "3.png").write_bytes(noise)
    path = packed(root, kind)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(DataError, match=r"set\.tar (cannot be read as a tar: EOFError|is neither a folder)"):
        open_images(path)


def test_a_name_that_is_no_text_is_told_in_characters(tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "cat").mkdir(parents=True)
    with open(os.fsencode(root) + b"/cat/\xff\n\x1b.png", "wb") as file:
        file.write(b"no image")
    images = open_images(root)
    assert list(images.batches(PLAIN, batch_size=1)) == []
    assert images.skipped[0][0] == "cat/\\udcff\\n\\x1b.png"


def packed_bytes(mode: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in (
            ("cat/1.png", PNG),
            ("dog/2.png", PNG),
            ("labels.csv", b"file,label\ncat/1.png,0\ndog/2.png,1\n"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def array_bytes() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, x=X, y=np.arange(3))
    return stream.getvalue()


WHOLE = {"set.tar": [packed_bytes("w"), packed_bytes("w:gz")], "set.npz": [array_bytes()]}


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(WHOLE)))
    data = bytearray(draw(st.sampled_from(WHOLE[name])))
    for _ in range(draw(st.integers(1, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return name, bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@given(st.one_of(st.tuples(st.sampled_from(["set.tar", "set.npz"]), st.binary(max_size=100)), damaged()))
@settings(max_examples=300, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_arbitrary_bytes_are_a_set_or_one_line(file: tuple[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, file[0])
        path.write_bytes(file[1])
        try:
            images = open_images(path)
            images.check()
            count = sum(len(batch) for batch, _ in images.batches(PLAIN, batch_size=2))
        except DataError as told:
            text = str(told)
            assert text.isprintable()
            assert len(text) < 700
        else:
            assert count + len(images.skipped) == len(images) > 0


@given(st.one_of(st.binary(max_size=300), st.text().map(lambda text: f"file,label\n{text}".encode(errors="replace"))))
@settings(max_examples=300, deadline=None)
def test_an_arbitrary_table_is_read_or_refused_in_one_line(content: bytes) -> None:
    listing = Listing({"a.png", "b.png"}, ())
    try:
        labelling = by_table(content, listing, root="", where="set")
    except DataError as told:
        text = str(told)
        assert text.isprintable()
        assert len(text) < 700
    else:
        assert set(labelling.names) <= {"a.png", "b.png"}


def test_messages_name_the_set_as_its_owner_does(tmp_path: Path) -> None:
    uri = stored_file("memory://images", "sets/val.npz")
    open_store("memory://images").put("sets/val.npz", b"no zip", mode="create")
    with pytest.raises(DataError) as told:
        fetch_images(uri, tmp_path)
    assert (
        str(told.value) == "memory://images#sets/val.npz cannot be read as an npz: BadZipFile: File is not a zip file."
    )
    open_store("memory://images").put("sets/val.npz", npz(tmp_path / "a.npz", x=X).read_bytes(), mode="overwrite")
    with pytest.raises(DataError, match=r"^memory://images#sets/val\.npz has no labels: "):
        fetch_images(uri, tmp_path / "again").require_labels()


@pytest.mark.parametrize(
    ("uri", "seen"),
    [
        (
            "/nowhere/val.tar",
            r"^No images at /nowhere/val\.tar: there is no such file or folder\. Give a folder, a \.tar",
        ),
        ("file:///nowhere/val", r"^No images at file:///nowhere/val: there is no such file or folder"),
        (
            "~nobody-here/val",
            "^~nobody-here/val cannot be read as an image set: RuntimeError: Could not determine home",
        ),
        ("a" * 5000, r"^Cannot read the image set a+ \.\.\. a+: File name too long"),
        ("s3://bucket", "^s3://bucket names a bucket; expected s3://bucket/path/to/file"),
        ("/dev/null", "^/dev/null is no file"),
    ],
)
def test_a_set_that_is_not_there_is_an_error_of_image_sets(uri: str, seen: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=seen):
        fetch_images(uri, tmp_path)
