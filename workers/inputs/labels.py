"""Which images of a set count, in which order, and the class of each.

Labels come from a table, ``labels.csv``, else from the folders, by the rules of torchvision's ImageFolder with
``allow_empty``: a class is a folder at the top, its index its place among them. Where those rules would guess, nothing
is guessed (ADR 13): junk that programs leave behind is no class, folders that are numbers count as numbers, and a set
whose labels are in doubt has none, with the reason (`Labelling.fault`).
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.class_labels import MAX_LABELS_BYTES, parse_labels
from storage.files import open_regular
from workers.errors import DataError, printable, shown
from workers.inputs.files import LABELS, fetch, reading

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""As torchvision has them."""

TABLE = "labels.csv"
MAX_TABLE_BYTES = 2**28
MAX_LABEL = 2**31 - 1

_JUNK = frozenset({"__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
_JUNK_FILES = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db"})
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev"})
_WHOLE = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class Listing:
    """What a folder or an archive holds, by names relative to it, with ``/``; junk (`is_junk`) left out."""

    images: Collection[str]
    folders: Collection[str]
    others: Collection[str] = ()


@dataclass(frozen=True)
class Labelling:
    """The images that count, in their order, and their labels; None where there are none, ``fault`` says why.

    ``reading`` says how labels were read, ``left_out`` which images do not count and why; either may be empty.
    ``classes`` is the number of classes where the set itself says it (folders do, a table does not). ``class_names``:
    their names, class 0 first, where the set has one for each.
    """

    names: Sequence[str]
    labels: Sequence[int] | None
    reading: str = ""
    left_out: str = ""
    fault: str = ""
    classes: int | None = None
    class_names: tuple[str, ...] | None = None


def is_image(name: str) -> bool:
    """Tell by its suffix whether a file counts as an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_junk(name: str) -> bool:
    """Tell whether a file or folder is hidden, or one that programs leave behind: ``.ipynb_checkpoints``, ``__MACOSX``,
    ``Thumbs.db``, the ``._`` files of macOS.
    """
    parts = name.split("/")
    return (
        any(part in _JUNK or (part.startswith(".") and part not in (".", "..")) for part in parts)
        or parts[-1].lower() in _JUNK_FILES
    )


def root_of(listing: Listing, tables: Collection[str]) -> str:
    """Return the folder inside a set that its classes or its table lie in: empty, or with a ``/`` at its end.

    A folder that holds nothing but one folder of folders is a wrapping: ``val.tar`` with ``val/cat``, ``val/dog``.
    """
    inner = _children(listing.folders)
    with_images = {posixpath.dirname(name) for name in listing.images}
    root = ""
    while root + TABLE not in tables and root.rstrip("/") not in with_images and len(inner.get(root, ())) == 1:
        below = f"{root}{inner[root][0]}/"
        if below + TABLE not in tables and below not in inner:
            break
        root = below
    return root


def by_folders(listing: Listing, *, root: str = "") -> Labelling:
    """Return every image, sorted, labelled by the folders in ``root``."""
    names = sorted(listing.images)
    folders = sorted(_children(listing.folders).get(root, ()))
    loose = [name for name in names if "/" not in name[len(root) :]]
    fault = _doubt(listing, root, folders, loose)
    if fault is not None:
        return Labelling(names, None, fault=fault)
    numbers = all(folder.isascii() and folder.isdigit() for folder in folders)
    index = {folder: int(folder) if numbers else place for place, folder in enumerate(folders)}
    labels = [index[name[len(root) :].split("/")[0]] for name in names]
    where = f" in {root.rstrip('/')!r}" if root else ""
    empty = sorted(set(index.values()).difference(labels))
    by_index = {label: folder for folder, label in index.items()}
    reading = f"{_counted(len(index), 'class', 'classes')} by the folders{where}: {_shown_classes(by_index)}"
    if empty:
        reading += f"; {len(empty)} of them without images: {shown([by_index[label] for label in empty], most=3)}"
    class_names = tuple(folder for _, folder in sorted(by_index.items()))
    return Labelling(names, labels, reading=printable(reading), classes=len(index), class_names=class_names)


def by_table(content: bytes, listing: Listing, *, root: str, where: str) -> Labelling:
    """Return the images that ``labels.csv`` names, in its order, with its labels.

    Raises:
        DataError: the table cannot be read, names a file twice or one that is not there, or has labels that are no
            whole numbers; it says the line.
    """
    rows, columns = _rows(content, where)
    labels: dict[str, int] = {}
    lines: dict[str, int] = {}
    titles: dict[int, set[str]] = {}
    title = next((column for column in columns if column not in ("file", "label")), None)
    fault = ""
    for line, row in rows:
        name, text = posixpath.normpath(root + row["file"]), row["label"].strip()
        if name in labels:
            raise DataError(
                f"{where}: {TABLE} names {printable(name, most=100)!r} twice, in lines {lines[name]} and {line}."
            )
        if not _WHOLE.fullmatch(text):
            raise DataError(
                f"{where}: {TABLE} line {line}: label {printable(text, most=40)!r}; expected a whole number."
            )
        if len(text) > 12 or not 0 <= int(text) <= MAX_LABEL:
            label = printable(text, most=40)
            fault = fault or f"{TABLE} line {line}: label {label}; expected 0 or more, and below the number of classes"
        labels[name], lines[name] = int(text[:12]), line
        titles.setdefault(labels[name], set()).add(row.get(title or "") or "")
    missing = [name for name in labels if name not in listing.images]
    if missing:
        raise DataError(
            f"{where}: {TABLE} names {len(missing)} files that are not there, or are no images, "
            f"{printable(missing[0], most=100)!r} first."
        )
    single_titles = {label: names.copy().pop() for label, names in sorted(titles.items())}
    single = title is not None and all(len(names) == 1 and all(names) for names in titles.values())
    reading = f"{_counted(len(single_titles), 'class', 'classes')} by {TABLE}"
    reading += f": {_shown_classes(single_titles)}" if single else f", {min(single_titles)} to {max(single_titles)}"
    rest = len(listing.images) - len(labels)
    left_out = f"{TABLE} names {len(labels)} of {len(listing.images)} images; the other {rest} do not count"
    return Labelling(
        list(labels),
        None if fault else list(labels.values()),
        reading=printable(reading),
        left_out=left_out if rest else "",
        fault=fault,
        class_names=tuple(single_titles.values()) if single and list(single_titles) == [*range(len(titles))] else None,
    )


def by_array(labels: Sequence[int], *, where: str) -> str:
    """Return how labels that stand beside the images read; empty where there are none."""
    classes = sorted(set(labels))
    return f"{_counted(len(classes), 'class', 'classes')} by {where}, {classes[0]} to {classes[-1]}" if classes else ""


def labels_of_file(uri: str, folder: Path, *, where: str) -> tuple[str, ...]:
    """Return the names that a text file holds, class 0 first (`storage.class_labels`).

    Args:
        uri: a path or URI.
        folder: where it is downloaded to, if it is in a bucket.
        where: what messages call it.

    Raises:
        DataError: there is no such file, or a line of it is no name.
        storage.StorageError: the store refused.
    """
    path = fetch(uri, folder, LABELS)
    with reading(where, LABELS), open_regular(path) as file:
        raw = file.read(MAX_LABELS_BYTES + 1)
    try:
        return parse_labels(raw)
    except ValueError as error:
        raise DataError(f"{where}: {error}.") from error


def _doubt(listing: Listing, root: str, folders: Sequence[str], loose: Sequence[str]) -> str | None:
    """Return why the folders in ``root`` do not say the classes, or None."""
    if not folders:
        return f"there is neither {TABLE} nor a folder for each class"
    if loose:
        first = printable(loose[0], most=100)
        return f"{len(loose)} images lie beside the folders, {first!r} first, so that folders are no classes"
    if len(folders) > 1 and all(folder.lower() in _SPLITS for folder in folders):
        return f"the folders {', '.join(folders)} look like parts of a data set, not like classes; give one of them"
    holding = {name[len(root) :].split("/")[0] for name in listing.images}
    foreign = {name[len(root) :].split("/")[0] for name in listing.others if "/" in name[len(root) :]}
    stray = [folder for folder in folders if folder in foreign and folder not in holding]
    if stray:
        return (
            f"the folder {printable(stray[0], most=100)!r} holds files, but no image ({', '.join(IMAGE_SUFFIXES)}): as "
            "a class it would move those behind it; take it away, or leave it empty if it is one"
        )
    if all(folder.isascii() and folder.isdigit() for folder in folders):
        numbers = sorted(int(folder[:12]) for folder in folders)
        if numbers != list(range(len(folders))):
            return (
                f"the {len(folders)} folders are numbers from {numbers[0]} to {numbers[-1]}; expected 0 to "
                f"{len(folders) - 1} without a gap (a class without images is an empty folder)"
            )
    return None


def _rows(content: bytes, where: str) -> tuple[list[tuple[int, dict[str, str]]], Sequence[str]]:
    """Return the table's rows with their lines, and its columns."""
    if len(content) > MAX_TABLE_BYTES:
        raise DataError(f"{where}: {TABLE} has {len(content)} bytes; expected {MAX_TABLE_BYTES} at most.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{where}: {TABLE} is not UTF-8 (byte 0x{content[error.start]:02x} in line {line}); save it as UTF-8."
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        columns = list(reader.fieldnames or ())
        if not {"file", "label"} <= set(columns):
            actual = printable(shown([repr(column) for column in columns]) if columns else "none")
            raise DataError(
                f"{where}: {TABLE} has the columns {actual}; expected 'file' and 'label', separated by commas."
            )
        for row in reader:
            if row["file"] is None or row["label"] is None:
                raise DataError(f"{where}: {TABLE} line {reader.line_num} has no label.")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise DataError(f"{where}: {TABLE} line {reader.reader.line_num}: {printable(str(error))}.") from error
    if not rows:
        raise DataError(f"{where}: {TABLE} has no rows below its columns.")
    return rows, columns


def _children(folders: Collection[str]) -> dict[str, list[str]]:
    """Return the names of the folders inside each folder; those of the top under the empty string, others ``a/b/``."""
    inner: dict[str, list[str]] = {}
    for folder in folders:
        parent, _, name = folder.rpartition("/")
        inner.setdefault(f"{parent}/" if parent else "", []).append(name)
    return inner


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _shown_classes(names: Mapping[int, str]) -> str:
    """Return ``0 = tench, 1 = goldfish, ... 11 = hen``."""
    labels = sorted(names)
    chosen = labels if len(labels) <= 4 else [*labels[:2], labels[-1]]
    lines = [f"{label} = {printable(names[label], most=40)}" for label in chosen]
    return ", ".join(lines) if len(labels) <= 4 else f"{', '.join(lines[:-1])}, ... {lines[-1]}"
