"""Names of classes as bytes: what is written is read, and what is no name is refused by its line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.class_labels import build_labels, parse_labels
from storage.wording import printable

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cf")), min_size=1, max_size=40).filter(
    lambda name: name == name.strip(" ") and printable(name) == name
)


@given(st.lists(NAMES, min_size=1, max_size=20))
def test_what_is_written_is_read(names: list[str]) -> None:
    assert parse_labels(build_labels(names)) == tuple(names)


@given(st.binary(max_size=60))
def test_any_bytes_are_names_or_refused(raw: bytes) -> None:
    try:
        names = parse_labels(raw)
    except ValueError:
        return
    assert parse_labels(build_labels(names)) == names


def test_a_users_file_may_come_from_any_editor() -> None:
    assert parse_labels("\ufefftench\r\n goldfish \r\nhen\u00e9".encode()) == ("tench", "goldfish", "hené")
    assert build_labels(("tench", "a b")) == b"tench\na b\n"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "no line"),
        (b"cat\n\ndog\n", "line 2 is blank"),
        (b"cat\ndog\n\n", "line 3 is blank"),
        (b"cat\nd\x1b[31mog\n", "line 2 holds control characters"),
        (b"cat\tfelis\n", "line 1 holds control characters"),
        (b"cat\n" + b"x" * 257, "line 2 has 257 characters; expected 256 at most"),
        (b"cat\n\xff", "byte 0xff at 4 is not UTF-8"),
        (b"x" * ((16 << 20) + 1), "16777217 bytes; expected 16777216 at most"),
    ],
)
def test_what_is_no_name_is_refused_by_its_line(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_labels(raw)


@pytest.mark.parametrize("names", [("cat\ndog",), (" cat",), (), ("",)])
def test_what_could_not_be_read_back_is_not_written(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"line|name"):
        build_labels(names)
