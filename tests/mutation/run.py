"""Sample the mutants of folders, try each against the tests that cover it, print the score and what survives.

    make mutation PACKAGE=nestquant MUTANTS=150 MINUTES=30

Records and verdicts are kept in build/mutation: a second run goes on where the first stopped, --again tries what has
survived so far once more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork inherits no thread

import pytest
from hypothesis import Phase, settings

from tests.mutation import equal
from tests.mutation.covers import Covers, Recorder
from tests.mutation.equal import ROOT
from tests.mutation.mutants import Mutant, files, mutants, sample
from tests.mutation.trials import Trials, Verdict

# The same examples for every mutant; a failing one is not made smaller, and none is kept.
settings.register_profile(
    "mutation", derandomize=True, database=None, deadline=None, phases=(Phase.explicit, Phase.generate)
)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="what is mutated: nestquant, or jobs/stages jobs/spec")
    parser.add_argument("--mutants", type=int, default=150, help="size of the sample")
    parser.add_argument("--minutes", type=float, default=30, help="of trials, and of recording before them")
    parser.add_argument(
        "--seconds", type=float, default=60, help="of tests, as recorded, that one mutant is tried against"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    parser.add_argument("--again", action="store_true", help="try what has survived once more")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="tests to record and to try")
    parser.add_argument("--record", action="store_true", help="record what the tests cover, and stop")
    options = parser.parse_args()
    os.chdir(ROOT)
    population = [mutant for path in files(options.folders) for mutant in mutants(path)]
    chosen = sample(population, options.mutants, options.seed)
    folder = ROOT / "build" / "mutation"
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / f"{'+'.join(options.folders).replace('/', '.')}-seed{options.seed}.jsonl"
    verdicts = _read(results)
    todo = [m for m in chosen if m.name not in verdicts or (options.again and not verdicts[m.name].is_killed)]
    covers = Covers(folder / "covers")
    if options.record:
        _pytest(Recorder(covers, options.minutes), folder, options.tests)
        return
    if todo:
        # A process of its own: what the tests leave behind in it must not reach the forks.
        subprocess.run([sys.executable, "-m", "tests.mutation.run", *sys.argv[1:], "--record"], check=True)
        _pytest(Trials(todo, covers, results, options.minutes, options.seconds), folder, options.tests)
    _report(options.folders, len(population), chosen, _read(results))


def _read(results: Path) -> dict[str, Verdict]:
    lines = results.read_text().splitlines() if results.exists() else []
    return {verdict.name: verdict for verdict in (Verdict(**json.loads(line)) for line in lines)}


def _pytest(plugin: object, folder: Path, tests: list[str]) -> None:
    words = ["-q", "-s", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "--hypothesis-profile", "mutation"]
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder, ignore_cleanup_errors=True) as temporary:
        words += ["-W", "ignore", "--basetemp", f"{temporary}/base", *tests]
        code = pytest.main(words, plugins=[plugin])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"pytest ended with {code!r}")


def _report(folders: list[str], population: int, chosen: list[Mutant], verdicts: dict[str, Verdict]) -> None:
    tried = [verdicts[mutant.name] for mutant in chosen if mutant.name in verdicts]
    listed = {(entry.module, entry.function, entry.diff) for entry in equal.read()}
    survivors = [v for v in tried if not v.is_killed and (v.module, v.function, v.diff) not in listed]
    for verdict in survivors:
        print(f"\n{verdict.verdict}: {verdict.name} ({verdict.tests} tests, {verdict.left_out} left out for time)")
        print(verdict.diff, end="")
    count = Counter(verdict.verdict for verdict in tried)
    equals = sum(not v.is_killed for v in tried) - len(survivors)
    told = len(tried) - equals
    if not told:
        sys.exit("no mutant was tried")
    score = (told - len(survivors)) / told
    error = math.sqrt(score * (1 - score) / told)
    print(f"\n{' '.join(folders)}: {len(tried)} of {population} mutants tried: {dict(count)}, {equals} of them equal")
    print(f"score {100 * score:.1f} % +- {100 * error:.1f} (killed of those that are not equal; one standard error)")


if __name__ == "__main__":
    main()
