"""Figures on narrow terminals: whole at every width; commands are run on a pseudo-terminal of 80 columns."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from jobs.cli.show_zoo import _LiveTable, results_table
from jobs.cli.tables import Column, WholeTable
from jobs.zoo.run import ZooEvent
from storage.wording import size
from tests.jobs.test_zoo_report import row

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
CHILD = """
import json, sys
from jobs.cli.main import app
for words in json.loads(sys.argv[1]):
    print("COMMAND", words[0], flush=True)
    app(words, standalone_mode=False)
"""


def shown(table: WholeTable, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def layers() -> WholeTable:
    table = WholeTable(
        [Column("layer"), Column("kind"), Column("weights", figures=True), Column("SQNR dB part", figures=True)],
        title="two layers",
        caption="part-bit",
    )
    table.add_row("features.init_block.conv1.conv", "conv", "1,234,567", "12.5")
    table.add_row("output", "linear", "8", "exact")
    return table


def test_where_there_is_room_every_column_has_lines() -> None:
    assert shown(layers(), 80) == [
        "two layers",
        "┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━┳━━━━━━━━━━━━━━┓",
        "┃ layer                          ┃ kind   ┃   weights ┃ SQNR dB part ┃",
        "┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━╇━━━━━━━━━━━━━━┩",
        "│ features.init_block.conv1.conv │ conv   │ 1,234,567 │         12.5 │",
        "│ output                         │ linear │         8 │        exact │",
        "└────────────────────────────────┴────────┴───────────┴──────────────┘",
        "part-bit",
    ]


def test_a_name_folds_before_a_figure_is_touched() -> None:
    assert shown(layers(), 42) == [
        "two layers",
        "                                      SQNR",
        "                                        dB",
        "layer             kind      weights   part",
        "features.init_bl  conv    1,234,567   12.5",
        "ock.conv1.conv",
        "output            linear          8  exact",
        "part-bit",
    ]


def test_where_columns_do_not_fit_a_row_takes_more_lines() -> None:
    assert shown(layers(), 36) == [
        "two layers",
        "features.init_block.conv1.conv",
        "    kind conv  weights 1,234,567",
        "    SQNR dB part 12.5",
        "output",
        "    kind linear  weights 8",
        "    SQNR dB part exact",
        "part-bit",
    ]


@pytest.mark.parametrize("width", range(30, 141, 5))
def test_every_figure_of_a_zoo_is_whole_at_every_width(width: int) -> None:
    rows = [row("mobilenetv3_small_100", top1=91.25, high=345_670_000), row("x", top1=None, status="failed", error="e")]
    lines = shown(results_table(rows, title="latest"), width)
    assert max(map(len, lines)) <= width
    assert {"91.25", "90.75", "88.25", "8.00", "691.34", "1.5"} <= set(re.findall(r"[\d.]+", "\n".join(lines)))
    assert "…" not in "\n".join(lines)


def test_the_live_table_of_a_zoo_is_no_taller_than_the_terminal() -> None:
    table = _LiveTable(40)
    for name, status in product(("mobilenetv3_small_100", "a.model.with.a.long.name.of.its.own"), ("done", "failed")):
        for number in range(5):
            ended = row(f"{name}{number}", top1=91.25, high=345_670_000, status=status)
            job = SimpleNamespace(spec=SimpleNamespace(name=ended.name), recipe="w8-4")
            table.listen(ZooEvent(job=job, kind="ended", row=ended))  # type: ignore[arg-type]
    console = Console(width=80, height=24, color_system=None)
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    assert lines[0].rstrip() == "20 of 40: 10 done, 10 failed; 0 from earlier runs, 0 at work"
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "345.67" not in captured.get()  # both levels are told
    assert captured.get().count("691.34 MB") >= 5


def test_commands_on_a_terminal_of_80_columns_cut_no_figure(
    tiny_document: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    store, spec = str(tmp_path / "store"), tmp_path / "job.yaml"
    document = tiny_document(evaluate__limit=10, quantize__bits=[8, 6, 4])
    spec.write_text(yaml.safe_dump(document))
    commands = [
        ["quantize", str(spec), "--local", "--store", store],
        ["ls", "--store", store],
        ["inspect", "tiny", "--store", store],
        ["analyze", "tiny", "--store", store],
        ["quantize", str(spec), "--dry-run", "--store", store],
        ["evaluate", "tiny", "--store", store, "--data", document["evaluate"]["data"], "--limit", "10"],
        ["doctor", "--store", store],
    ]
    seen = on_terminal([sys.executable, "-c", CHILD, json.dumps(commands)], columns=80)
    told = dict(zip([words[0] for words in commands], seen.split("COMMAND ")[1:], strict=False))
    assert list(told) == ["quantize", "ls", "inspect", "analyze", "evaluate", "doctor"], seen
    assert "…" not in seen
    published = json.loads((Path(store) / "models/tiny/versions/00000001.json").read_bytes())
    report = json.loads((Path(store) / "models/tiny/versions/00000001.job.json").read_bytes())
    sizes = published["sizes"]
    moved = {size(count) for count in sizes["level_bytes"]} | {size(sizes["float_bytes"])}
    assert all(text in told["inspect"] for text in moved)
    for layer in report["layers"]:
        for values, command in ((layer["sqnr_db"], "analyze"), (layer["sqnr_db"][::2], "inspect")):
            assert all(re.search(rf"(?<![\d.]){value:.1f}(?!\d)", told[command]) for value in values), layer
        assert f"{layer['weights']:,}" in told["analyze"]


def on_terminal(words: list[str], *, columns: int) -> str:
    """Run a command on a pseudo-terminal and return what it showed, without escape sequences."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        words, stdin=slave, stdout=slave, stderr=slave, env={**environment, "TERM": "xterm-256color"}
    )
    os.close(slave)
    chunks = []
    try:
        while chunk := os.read(master, 65536):
            chunks.append(chunk)
    except OSError:  # how a pseudo-terminal says that the other end is closed
        pass
    os.close(master)
    assert process.wait(60) == 0, b"".join(chunks).decode()
    return ESCAPES.sub("", b"".join(chunks).decode()).replace("\r", "")
