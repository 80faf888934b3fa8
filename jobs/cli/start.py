"""Where the ``nestquant`` command begins: Ctrl-C is one line also while Python still imports."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from jobs.cli.main import main as run
    except KeyboardInterrupt:
        print("nestquant: Interrupted. Nothing was begun.", file=sys.stderr)
        sys.exit(130)
    run()
