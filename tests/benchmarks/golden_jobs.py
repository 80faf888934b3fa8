"""What whole jobs and commands leave behind, written down before a change and compared after it.

    python -m tests.benchmarks.golden_jobs --write before.json      # then change the code
    python -m tests.benchmarks.golden_jobs --against before.json    # names every difference; exits with 1 then

Runs every kind of job on the tiny model in this process, and the commands that people and scripts use on what came of
them. Of each job it keeps the result and the SHA-256 of every key in its store, of each command the exit code and what
it printed. Only what a clock or a process told is left out. Figures of one machine hold for this machine: activation
ranges, damages and accuracies may differ elsewhere in their last bits.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from jobs.cli.main import main as command_line
from jobs.driver import run_job
from jobs.spec.file import parse_spec, with_changes
from storage.stores.uri import open_store
from tests import tiny
from workers.executor import InProcessExecutor

_CLOCK = re.compile(r"(worker_)?seconds(_\w+)?|host|pid|unix_s|traceback")
"""Fields that say when, how long or where, never what."""

_TIMED = re.compile(r"\.(job|started|row)\.json$|/results\.jsonl$")
"""Keys whose documents hold such fields: hashed without them."""

_UNCOUNTED = re.compile(r"/results\.(csv|parquet)$")
"""The tables say again what ``results.jsonl`` says, seconds among it."""

_MIXED = {"mean_bits": 4.0, "choices": [3, 5], "samples": 8}

JOBS: dict[str, dict[str, Any]] = {
    "paper": {},
    "weights-alone": {"quantize.activations": None, "calibration": None, "evaluate": None},
    "calibrated": {"quantize.recipe": "calibrated"},
    "data-free": {"quantize.recipe": "data_free", "calibration": None},
    "mixed": {"quantize.recipe": "calibrated", "quantize.mixed": _MIXED},
    "mixed-paper": {"quantize.mixed": {**_MIXED, "mean_bits": None, "target_bytes": 190_000}, "analysis": None},
    "analysis": {"analysis": {"samples": 8}},
    "symmetric": {
        "quantize": {"recipe": "paper", "bits": [8, 5], "scheme": "symmetric", "activations": {"observer": "sigma"}},
        "calibration": None,
    },
    "three-levels": {
        "quantize": {
            "recipe": "paper",
            "bits": [8, 6, 4],
            "ignore": ["conv1.0"],
            "overrides": {"fc": {"bits": [8]}, "layer3.*": {"scheme": "symmetric", "rounding": "nearest"}},
        },
        "store.shard_bytes": 16384,
    },
    "gate": {"evaluate.min_part_top1": 99.9},
}


def main() -> None:
    """Write the record, or compare with one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", type=Path, metavar="FILE", help="keep what jobs and commands leave behind")
    choice.add_argument("--against", type=Path, metavar="FILE", help="compare with what was kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = everything()
    if arguments.write is not None:
        arguments.write.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        print(f"{arguments.write}: {len(record['jobs'])} jobs, {len(record['commands'])} commands.")
        return
    found = list(differences(json.loads(arguments.against.read_text()), json.loads(json.dumps(record))))
    for line in found:
        print(line)
    print(f"{len(found)} differences from {arguments.against}.")
    sys.exit(1 if found else 0)


def everything() -> dict[str, Any]:
    """Return the record of all jobs and all commands, made in a temporary folder of its own."""
    with tempfile.TemporaryDirectory() as folder, _inside(folder), contextlib.redirect_stderr(io.StringIO()):
        tiny.write_checkpoint(Path("tiny.safetensors"))
        tiny.write_images(Path("noise.npz"))
        jobs = {name: _job(name, changes) for name, changes in JOBS.items()}
        return without_clock({"jobs": jobs, "commands": _commands()}, folder=folder)


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Yield one line for each place where two records differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            at = f"{where} > {key}" if where else str(key)
            if key not in after:
                yield f"{at}: gone; was {_short(before[key])}"
            elif key not in before:
                yield f"{at}: new: {_short(after[key])}"
            else:
                yield from differences(before[key], after[key], at)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, f"{where} > {index}")
    elif before != after:
        yield f"{where}: was {_short(before)}, is {_short(after)}"


def _document(store: str, changes: dict[str, Any]) -> dict[str, Any]:
    document = tiny.job_document(checkpoint="tiny.safetensors", images="noise.npz", store=store)
    return with_changes(document, changes)


def _job(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    store = f"stores/{name}"
    result = run_job(parse_spec(_document(store, changes), where=name), InProcessExecutor())
    return {"result": result.model_dump(mode="json"), "keys": _keys(store)}


def _keys(uri: str) -> dict[str, str]:
    store = open_store(uri)
    infos = [info for info in store.list() if not _UNCOUNTED.search(info.key)]
    return {info.key: _digest(info.key, store.get(info.key)) for info in infos}


def _digest(key: str, data: bytes) -> str:
    if _TIMED.search(key):
        lines = [json.loads(line) for line in data.splitlines()] if key.endswith(".jsonl") else [json.loads(data)]
        data = json.dumps([without_clock(line, folder=os.getcwd()) for line in lines], sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def _commands() -> dict[str, Any]:
    """Run the main commands, one after the other, on one store and one device's folder."""
    spec, zoo = Path("job.yaml"), Path("zoo.yaml")
    spec.write_text(yaml.safe_dump(_document("stores/cli", {"evaluate.limit": 10})))
    zoo.write_text(yaml.safe_dump(_zoo()))
    store, device = ["--store", "stores/cli"], ["--cache", "device"]
    run: dict[str, Callable[[], Any]] = {}

    def command(title: str, *words: str) -> None:
        run[title] = lambda: _command(*words)

    command("ls: no store", "ls", *store, "--json")
    command("quantize: plan", "quantize", "job.yaml", "--local", "--dry-run", "--json")
    command("quantize", "quantize", "job.yaml", "--local", "--json")
    command("quantize again", "quantize", "job.yaml", "--local", "--json")
    command("quantize: second version", "quantize", "job.yaml", "--local", "--set", "quantize.bits=[8,6,4]", "--json")
    command("quantize: gate", "quantize", "job.yaml", "--local", "--set", "evaluate.min_part_top1=99", "--json")
    command("quantize: wrong key", "quantize", "job.yaml", "--local", "--set", "quantize.bit=[8,4]", "--json")
    command("quantize: no spec", "quantize", "nowhere.yaml", "--local", "--json")
    command("quantize: wrong option", "quantize", "job.yaml", "--loca", "--json")
    command("ls", "ls", *store, "--json")
    command("ls for people", "ls", *store)
    command("inspect", "inspect", "tiny@1", *store, "--json")
    command("inspect for people", "inspect", "tiny@2", *store)
    command("inspect: no version", "inspect", "tiny@9", *store, "--json")
    command("analyze", "analyze", "tiny@1", *store, "--json")
    command("evaluate", "evaluate", "tiny@1", *store, "--data", "noise.npz", "--limit", "10", "--json")
    command("pull: unsigned", "pull", "tiny@1", *store, *device, "--json")
    command("pull", "pull", "tiny@1", *store, *device, "--allow-unsigned", "--json")
    command("pull again", "pull", "tiny@1", *store, *device, "--allow-unsigned", "--json")
    command("upgrade", "upgrade", "tiny", *store, *device, "--json")
    command("verify", "verify", "tiny", *device, "--json")
    command("downgrade", "downgrade", "tiny", *device, "--json")
    command("pull: second version", "pull", "tiny@2", *store, *device, "--allow-unsigned", "--json")
    command("rollback", "rollback", "tiny", *device, "--json")
    command("remove", "remove", "tiny", *device, "--json")
    command("verify: nothing there", "verify", "tiny", *device, "--json")
    command("fsck", "fsck", *store, "--json")
    command("gc", "gc", *store, "--json")
    command("delete-version", "delete-version", "tiny", "1", *store, "--json")
    command("fsck: no store", "fsck", "--store", "nowhere", "--json")
    command("zoo: plan", "zoo", "zoo.yaml", "--dry-run", "--local", "--json")
    command("zoo", "zoo", "zoo.yaml", "--local", "--json")
    command("zoo again", "zoo", "zoo.yaml", "--local", "--json")
    command("zoo report", "zoo", "report", "tiny-zoo", "--html", "zoo.html", "--json")
    done = {title: call() for title, call in run.items()}
    return done | {"keys of stores/cli": _keys("stores/cli"), "keys of stores/zoo": _keys("stores/zoo")}


def _zoo() -> dict[str, Any]:
    arguments = {"in_chans": 1, "num_classes": 10, "img_size": 32}
    return {
        "name": "tiny-zoo",
        "store": {"uri": "stores/zoo"},
        "models": [
            {"models": "timm/test_vit", "kwargs": arguments},
            {"models": "timm/test_vit3", "checkpoint": "nowhere.safetensors", "priority": 1},
        ],
        "random_seed": 0,
        "preprocess": {"size": 32, "mean": [0.5], "std": [0.5]},
        "recipes": {
            "8-4": {"recipe": "paper", "bits": [8, 4]},
            "8-6": {"recipe": "paper", "bits": [8, 6]},
        },
    }


def _command(*words: str) -> dict[str, Any]:
    """Run one command line; return its exit code and what it printed, documents parsed."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["nestquant", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command_line()
    except SystemExit as stop:
        return {"exit": stop.code, "out": _printed(out.getvalue()), "err": _printed(err.getvalue())}
    finally:
        sys.argv = before
    raise AssertionError("the command line ends the process")


def _printed(text: str) -> Any:
    for documents in (lambda: json.loads(text), lambda: [json.loads(line) for line in text.splitlines()]):
        with contextlib.suppress(json.JSONDecodeError):
            return documents()
    return text.splitlines()


def without_clock(value: Any, *, folder: str) -> Any:
    """Return a document without what a clock told, and without this run's folder."""
    if isinstance(value, dict):
        return {key: without_clock(item, folder=folder) for key, item in value.items() if not _CLOCK.fullmatch(key)}
    if isinstance(value, list | tuple):
        return [without_clock(item, folder=folder) for item in value]
    return value.replace(folder, "FOLDER") if isinstance(value, str) else value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    main()
