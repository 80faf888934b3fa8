"""Files that people write: each key once, bounded, and every fault one short line."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import SpecError
from jobs.spec.document import MAX_BYTES, parse_yaml, read_text, shown_value
from jobs.spec.file import load_spec, read_document
from jobs.spec.zoo import load_zoo

BOMB = "\n".join(
    ["a: &a0 [x, x, x, x, x, x, x, x, x]", *(f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: a\nstore: {uri: x}\nname: b", "spec: key 'name' stands twice, in lines 1 and 3; keep one."),
        ("quantize:\n  bits: [8, 4]\n  bits: [8, 6]", "spec: key 'bits' stands twice, in lines 2 and 3; keep one."),
        ('{"a": 1, "a": 2}', "spec: key 'a' stands twice, in lines 1 and 1; keep one."),
        (BOMB, "spec, line 6: more than 100,000 values, aliases written out; a spec has some dozens."),
        ("a: &a [*a]", "spec, line 1: nested more than 64 levels deep."),
        ("[" * 3000 + "]" * 3000, "spec is nested more than 64 levels deep."),
        ("[" * 70 + "]" * 70, "spec, line 1: nested more than 64 levels deep."),
        ("a: " + "7" * 5000, "spec holds a value that cannot be read: Exceeds the limit (4300 digits)"),
        ("a: 2026-13-45", "spec holds a value that cannot be read: month must be in 1..12"),
        ("a: [1, 2", "spec is not valid YAML in line 1: expected ',' or ']', but got '<stream end>'."),
        (
            "a: !!python/object/apply:os.system [ls]",
            "spec is not valid YAML in line 1: could not",
        ),
        ("a: b: c", "spec is not valid YAML in line 1: mapping values are not allowed here."),
    ],
)
def test_a_fault_is_one_line(text: str, told: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, "spec")
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_merge_keys_and_aliases_work() -> None:
    text = "base: &base {a: 1}\none: {<<: *base, b: 2}\ntwo: *base"
    assert parse_yaml(text, "spec") == {"base": {"a": 1}, "one": {"a": 1, "b": 2}, "two": {"a": 1}}


def test_the_same_key_in_two_mappings_is_no_fault() -> None:
    text = "a: {x: 1}\nb: {x: 2}\n1: one\n'1': other"
    assert parse_yaml(text, "spec") == {"a": {"x": 1}, "b": {"x": 2}, 1: "one", "1": "other"}


def test_a_zoo_file_is_read_by_the_same_rules(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo.yaml"
    zoo.write_text("name: a\nname: b\n")
    with pytest.raises(SpecError, match=r"zoo\.yaml: key 'name' stands twice, in lines 1 and 2; keep one\.$"):
        load_zoo(zoo)


def test_an_endless_file_is_refused_after_its_first_bytes() -> None:
    with pytest.raises(SpecError, match=r"^/dev/zero holds more than 4 MiB; expected spec\.$"):
        read_text("/dev/zero", "spec")


def test_a_spec_may_come_through_a_pipe(tmp_path: Path) -> None:
    """As with ``nestquant quantize <(envsubst < job.yaml)``."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("name: piped",))
    writer.start()
    assert read_document(pipe, {}) == {"name": "piped"}
    writer.join()


def test_what_is_no_readable_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    for path, told in (
        (tmp_path, "Is a directory; expected spec."),
        (tmp_path / "latin.yaml", "is not UTF-8 (byte 9); expected spec: save it as UTF-8."),
        (tmp_path / ("n" * 300), "File name too long; expected spec."),
        (f"{tmp_path}/a\0b", "embedded null byte; expected spec."),
    ):
        with pytest.raises(SpecError) as caught:
            load_spec(path)
        assert str(caught.value).endswith(told)
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(SpecError, match=r"holds more than 4 MiB"):
        load_spec(tmp_path / "big.yaml")


@pytest.mark.parametrize(
    "document",
    [
        {"name": "x" * 100_000},
        {"name": [["deep" * 50] * 50] * 50},
        {"name": 10**4000},
        {"k" * 5000: 1},
        {"model": {"library": "timm", "arch": "a", "kwargs": 3, "random_seed": {"z" * 9000: 1}}},
    ],
)
def test_a_message_shows_little_of_what_was_seen(tmp_path: Path, document: dict[str, object]) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(document))
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert max(map(len, str(caught.value).splitlines())) < len(str(path)) + 700


def test_no_value_is_written_out_in_full() -> None:
    assert len(shown_value([["a" * 500] * 90] * 90)) <= 200
    assert shown_value(10**6000) == "a int"
    assert shown_value("Bad Name!") == "'Bad Name!'"


def one_line(read: Callable[[], object]) -> str:
    """Return what a reader says of a fault; it may raise nothing else."""
    try:
        read()
    except SpecError as error:
        return str(error)
    return "fine"


@given(st.binary(max_size=400))
def test_any_bytes_are_a_document_or_a_spec_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    assert len(one_line(lambda: read_document(path, {}))) < 400 + len(str(path))


@given(st.text(alphabet="[]{}&*<:,-!|>#'\"%@`\n\t 0a?.~", max_size=60))
def test_any_yaml_is_a_value_or_a_spec_error(text: str) -> None:
    assert len(one_line(lambda: parse_yaml(text, "spec"))) < 400
