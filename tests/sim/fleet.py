"""Many runs, on all cores."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import structlog

from swarm.manager import GC_THRESHOLDS
from tests.sim.scenarios import Result, run

HASH_SEED, FIXED = "PYTHONHASHSEED", "0"


def prepare() -> None:
    """This process is for the simulator. The members' own logs carry the real clock; the story here is its own. A large
    swarm holds a million objects for long: half of the time would go into looking for garbage among them."""
    gc.set_threshold(*GC_THRESHOLDS)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable()


@contextlib.contextmanager
def one_order_of_sets() -> Iterator[None]:
    """Processes started in the block find what `python -m tests.sim --seed` finds: the loops of managers keep tasks and
    node IDs in sets."""
    before = os.environ.get(HASH_SEED)
    os.environ[HASH_SEED] = FIXED
    try:
        yield
    finally:
        os.environ.pop(HASH_SEED)
        os.environ.update({HASH_SEED: before} if before is not None else {})


def one(seed: int, scenario: str) -> Result:
    prepare()
    return run(seed, scenario)


def failures(seeds: range, scenario: str) -> Iterator[Result]:
    """Those that fail, as they come. Progress goes to a terminal only."""
    failed = 0
    context = multiprocessing.get_context("spawn")  # whoever calls may have threads
    with one_order_of_sets(), ProcessPoolExecutor(os.cpu_count(), context) as pool:
        runs = [pool.submit(one, seed, scenario) for seed in seeds]
        for count, done in enumerate(as_completed(runs), 1):
            result = done.result()
            if result.violation:
                failed += 1
                yield result
            if sys.stderr.isatty():
                print(f"\r{count} of {len(seeds)} runs, {failed} failed", end="", file=sys.stderr, flush=True)
