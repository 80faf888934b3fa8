"""Where the ``nestquant`` command begins: Ctrl-C is one line also while Python still imports."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    from nestquant._shadows import check_packages

    try:
        check_packages()
        from jobs.cli.main import main as run
    except KeyboardInterrupt:
        print("nestquant: Interrupted. Nothing was begun.", file=sys.stderr)
        sys.exit(130)
    except ImportError as error:
        if "hides it" not in str(error):
            raise
        print(f"nestquant: {error}", file=sys.stderr)
        sys.exit(1)
    run()
