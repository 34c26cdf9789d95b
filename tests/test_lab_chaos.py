"""Real managers under load while they are killed, stopped, cut off, replaced and starved of disk."""

from __future__ import annotations

import math
import sys

import pytest

from tests.chaos import Record, faults_found, run, summary
from tests.chaos_faults import FAULTS
from tests.labs import keep_logs, lab_up
from tests.sim.linearizable import Operation

SEED = 1
OF_FIVE = ("kill-leader", "kill-all", "cut-leader", "one-way", "member")


@pytest.mark.lab
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("managers", "names"), [(3, tuple(FAULTS)), (5, OF_FIVE)])
def test_nothing_acknowledged_is_lost_or_done_twice(managers: int, names: tuple[str, ...]) -> None:
    with lab_up(f"chaos{managers}", managers, 0) as cluster:
        try:
            record, found = run(cluster, SEED, names=names)
            print(summary(record))
            assert not found, "\n".join(found)
            assert record.acknowledged > 10 * len(names), "the load was none"
        finally:
            if sys.exc_info()[0] is not None:
                print(f"logs of the hosts: {keep_logs(cluster)}")


def test_what_was_lost_done_twice_or_invented_is_found() -> None:
    record = Record(
        operations=[Operation("r", 0, 1, "", "1"), Operation("r", 2, 3, None, "")],
        created=[("race-1", "a"), ("race-2", "b"), ("race-2", "c")],
        taken=["race-3"],
    )
    found = faults_found(record, [("race-2", "b"), ("race-2", "c"), ("race-4", "d")])
    for words in ("fit no order", "lost: network ('race-1'", "race-2 exists 2", "race-2 acknowledged to 2"):
        assert any(words in line for line in found), words
    assert any("race-3 is taken, by nobody" in line for line in found)
    assert "invented: network race-4" in found


def test_an_open_outcome_may_show_or_not() -> None:
    swap = Operation("r", 0, math.inf, "", "1")
    for seen in ("", "1"):
        record = Record(operations=[swap, Operation("r", 2, 3, None, seen)], undecided=["race-1"])
        for networks in ([], [("race-1", "a")]):
            assert not faults_found(record, networks)
