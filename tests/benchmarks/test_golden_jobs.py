"""The comparison of whole jobs before and after a change: it names what differs, and nothing else."""

from __future__ import annotations

import copy

from tests.benchmarks.golden_jobs import JOBS, differences, without_clock

RECORD = {
    "jobs": {"paper": {"result": {"bits": [8, 4], "gate": None}, "keys": {"blobs/a": "1f", "blobs/b": "2e"}}},
    "commands": {"ls": {"exit": 0, "out": ["tiny", "other"], "err": []}},
}


def test_the_same_record_has_no_difference() -> None:
    assert list(differences(RECORD, copy.deepcopy(RECORD))) == []


def test_every_difference_is_named_with_both_sides() -> None:
    other = copy.deepcopy(RECORD)
    paper = other["jobs"]["paper"]
    paper["result"]["bits"] = [8, 5]  # type: ignore[index]
    paper["keys"] = {"blobs/a": "1e", "blobs/c": "2e"}
    other["commands"]["ls"] |= {"exit": 3, "out": ["tiny"]}
    assert list(differences(RECORD, other)) == [
        "commands > ls > exit: was 0, is 3",
        'commands > ls > out: was ["tiny", "other"], is ["tiny"]',
        'jobs > paper > keys > blobs/a: was "1f", is "1e"',
        'jobs > paper > keys > blobs/b: gone; was "2e"',
        'jobs > paper > keys > blobs/c: new: "2e"',
        "jobs > paper > result > bits > 1: was 4, is 5",
    ]


def test_what_a_clock_told_is_left_out_at_any_depth() -> None:
    told = {"seconds": {"plan": 1.0}, "work": {"worker_seconds": 2.0, "units": 3}, "row": [{"seconds_plan": 1.0}]}
    left = {"work": {"units": 3}, "row": [{}], "at": "FOLDER/store", "beyond": "seconds"}
    assert without_clock(told | {"at": "/tmp/x/store", "beyond": "seconds"}, folder="/tmp/x") == left


def test_every_recipe_has_a_job() -> None:
    assert {"paper", "calibrated", "data-free", "mixed", "analysis", "symmetric", "three-levels", "gate"} <= set(JOBS)
