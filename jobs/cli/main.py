"""The command line: ``nestquant``.

Commands import torch and ray only when they run, so that ``--help`` and the device's commands start fast.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import typer

from jobs.cli.commands import (
    agent,
    analyze,
    catalog,
    cluster,
    delta,
    device,
    export,
    jobs,
    keys,
    maintain,
    rollouts,
    store,
    tags,
    zoo,
)
from jobs.cli.commands import run as run_command
from jobs.errors import ClusterError, GateError, JobError
from storage.errors import (
    AccessDenied,
    BadKey,
    BadStoreURI,
    Corrupt,
    Damaged,
    InvalidManifest,
    InvalidShard,
    NoSpace,
    StorageError,
    StoreUnavailable,
    WouldGoBack,
)
from storage.wording import one_line, printable, system_text, without_secrets
from workers.errors import NoCluster, ScratchFull, WorkError


class Exit(IntEnum):
    """Exit codes that a script can rely on."""

    OK = 0
    FAILED = 1
    USAGE = 2
    STORE = 3
    INTEGRITY = 4
    GATE = 5
    DISK = 6
    INTERRUPTED = 130


app = typer.Typer(
    name="nestquant",
    help="Quantize a vision model once, publish it as nested shards, run it part-bit or full-bit on the device.",
    epilog="Exit codes: 0 done, 1 the work failed, 2 wrong command or spec, 3 store or cluster out of reach, "
    "4 damaged or untrusted bytes, "
    "5 below the accuracy gate, 6 disk full, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich alone takes a third of a second, more than all of a device's commands
    add_completion=False,
)
jobs.register(app)
analyze.register(app)
export.register(app)
delta.register(app)
device.register(app)
run_command.register(app)
agent.register(app)
store.register(app)
maintain.register(app)
keys.register(app)
tags.register(app)
rollouts.register(app)
zoo.register(app)
catalog.register(app)
cluster.register(app)


def exit_code(error: BaseException) -> Exit:
    """Return the exit code that tells a script what kind of failure it was."""
    from storage.device import errors as device_errors

    kinds: list[tuple[tuple[type[BaseException], ...], Exit]] = [
        ((GateError,), Exit.GATE),
        ((ClusterError, NoCluster), Exit.STORE),
        ((BadStoreURI, BadKey, WouldGoBack, device_errors.NotOurs), Exit.USAGE),
        ((JobError,), Exit.USAGE),
        ((NoSpace, ScratchFull, device_errors.NoSpace), Exit.DISK),
        ((AccessDenied, StoreUnavailable, device_errors.SourceDenied, device_errors.GaveUp), Exit.STORE),
        ((device_errors.ContentError, device_errors.Untrusted), Exit.INTEGRITY),
        ((Corrupt, Damaged, InvalidManifest, InvalidShard), Exit.INTEGRITY),
        ((KeyboardInterrupt,), Exit.INTERRUPTED),
    ]
    return next((code for types, code in kinds if isinstance(error, types)), Exit.FAILED)


def main() -> None:
    """Run the command line."""
    run(lambda: app(standalone_mode=False), as_json="--json" in sys.argv[1:])


def run(command: Callable[[], object], *, as_json: bool) -> NoReturn:
    """Run a command and leave the process: every failure is one clear line on standard error and an exit code of its
    own.
    """
    try:
        returned = command()
        if returned == Exit.INTERRUPTED:  # how the framework tells of Ctrl-C
            raise KeyboardInterrupt
        code = returned if isinstance(returned, int) else Exit.OK
    except typer.Exit as stop:
        code = stop.exit_code
    except typer.TyperException as error:
        # A wrong option or argument; the framework's message says which.
        message = getattr(error, "format_message", error.__str__)()
        context = getattr(error, "ctx", None)
        hint = f" Try '{context.command_path} --help'." if context is not None else ""
        code = _fail(f"{message}{hint}", Exit.USAGE, as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail(
            "Interrupted. Nothing is half-written; the same command goes on where it stopped.",
            Exit.INTERRUPTED,
            as_json=as_json,
        )
    except (JobError, WorkError, StorageError) as error:
        code = _fail(str(error), exit_code(error), as_json=as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.OK
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        code = _fail(
            f"{error.filename or 'The system'}: {system_text(error)}.",
            Exit.DISK if full else Exit.FAILED,
            as_json=as_json,
        )
    except Exception as error:  # nobody's word about a file or a network: a fault of ours
        if os.environ.get("NESTQUANT_TRACEBACK"):
            traceback.print_exception(error)
        at = traceback.extract_tb(error.__traceback__)[-1]
        code = _fail(
            f"A fault of nestquant's own: {one_line(error)}, in {at.name} ({Path(at.filename).name}:{at.lineno}); "
            "please report it with what NESTQUANT_TRACEBACK=1 in the environment shows.",
            Exit.FAILED,
            as_json=as_json,
        )
    sys.exit(int(code))


def _fail(message: str, code: Exit, *, as_json: bool) -> Exit:
    message = printable(without_secrets(message))
    if as_json:
        print(json.dumps({"error": message, "exit_code": int(code)}), file=sys.stderr)
    else:
        for line in message.splitlines():
            print(f"nestquant: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
