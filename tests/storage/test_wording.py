"""What strangers wrote, as it may be shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import StorageError
from storage.wording import printable, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:password@host/x does not answer", "https://...@host/x does not answer"),
        ("https://token@host", "https://...@host"),
        ("s3://key:secret@bucket", "s3://...@bucket"),
        (
            "GET https://b.example/k?X-Amz-Credential=AKIA%2F1&X-Amz-Date=2&X-Amz-Signature=abc 403",
            "GET https://b.example/k?X-Amz-Credential=...&X-Amz-Date=2&X-Amz-Signature=... 403",
        ),
        ("https://h/x?a=1&sig=Zm9v%3D&b=2", "https://h/x?a=1&sig=...&b=2"),
        ("model@latest, mail me@host", "model@latest, mail me@host"),
        ("s3://bucket/prefix?region=eu", "s3://bucket/prefix?region=eu"),
    ],
)
def test_no_secret_of_an_address_is_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert str(StorageError(text)) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07\x1b[31mred", "\ufffd]0;title\ufffd\ufffd[31mred"),
        ("a\rb\x08c\x7fd\x9b31me", "a\ufffdb\ufffdc\ufffdd\ufffd31me"),
        ("abc\u202edef\u2066x", "abc\ufffddef\ufffdx"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("naïve 日本語 👩\u200d🚀", "naïve 日本語 👩\u200d🚀"),
        ("[bold]name[/]", "[bold]name[/]"),
    ],
)
def test_no_character_steers_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(max_size=80))
def test_what_is_shown_holds_no_control_character(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert not {*shown} & {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160), 0x202E)}
    assert printable(shown) == shown
