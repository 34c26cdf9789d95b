"""Run the simulator: one seed with its story, or many on all cores. Exit status 0 only if every check held."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial

from tests.sim.fleet import FIXED, HASH_SEED, failures, prepare
from tests.sim.scenarios import SCENARIOS, SWARMS, run


def _seeds(text: str) -> range:
    first, dots, last = text.partition("..")
    return range(int(first), int(last if dots else first) + 1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="one run, told as it happens")
    parser.add_argument("--seeds", type=_seeds, metavar="A..B", help="many runs, one line for each that fails")
    parser.add_argument("--scenario", choices=sorted((*SCENARIOS, *SWARMS)), default="mixed")
    arguments = parser.parse_args()
    if (arguments.seed is None) == (arguments.seeds is None):
        parser.error("give one of --seed N and --seeds A..B")
    if arguments.seeds is not None:
        return many(arguments.seeds, arguments.scenario)
    prepare()
    result = run(arguments.seed, arguments.scenario, partial(print, flush=True))
    if result.violation:
        print(f"VIOLATION: {result.violation}")
    print(result.summary)
    return 1 if result.violation else 0


def many(seeds: range, scenario: str) -> int:
    failed = 0
    for result in failures(seeds, scenario):
        failed += 1
        print(f"{result.summary}\n  {result.violation}", flush=True)
    print(f"{scenario}: {len(seeds)} seeds, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    if os.environ.get(HASH_SEED) != FIXED:
        os.environ[HASH_SEED] = FIXED
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]])
    sys.exit(main())
