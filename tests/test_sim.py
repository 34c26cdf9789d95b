"""The simulator: its checker, its disk, that it repeats itself; and that it finds nothing wrong."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.consensus.disk import Directory, Disk, write_whole
from tests.sim.disk import MemoryDisk, PowerFailure
from tests.sim.fleet import failures
from tests.sim.linearizable import Operation, contradiction
from tests.sim.scenarios import SCENARIOS, run

OPEN = math.inf


def read(called: float, returned: float, value: str) -> Operation:
    return Operation("k", called, returned, None, value)


def swap(called: float, returned: float, expected: str, value: str, succeeded: bool = True) -> Operation:
    return Operation("k", called, returned, expected, value, succeeded)


# ---- the checker


@pytest.mark.parametrize(
    "history",
    [
        [],
        [read(0, 1, "")],
        [swap(0, 10, "", "a"), read(1, 2, ""), read(3, 4, "a")],  # takes effect between the reads
        [swap(0, 1, "", "a"), swap(2, 3, "", "b", succeeded=False), read(4, 5, "a")],
        [swap(0, OPEN, "", "a"), read(1, 2, ""), read(50, 51, "a")],  # open: late
        [swap(0, OPEN, "", "a"), read(1, 2, ""), read(50, 51, "")],  # open: never
        [swap(0, 9, "b", "c"), swap(0, 9, "a", "b"), swap(0, 9, "", "a"), read(10, 11, "c")],
        [swap(0, 1, "", "a"), Operation("other", 2, 3, None, "")],
    ],
)
def test_histories_of_a_register_are_accepted(history: list[Operation]) -> None:
    assert contradiction(history) == ""


@pytest.mark.parametrize(
    "history",
    [
        [read(0, 1, "never written")],
        [swap(0, 1, "", "a"), read(2, 3, "")],  # a stale read, or a lost write
        [swap(0, 10, "", "a"), read(1, 2, "a"), read(3, 4, "")],  # back in time
        [swap(0, 1, "", "a"), swap(2, 3, "", "b")],  # both took place
        [swap(0, 1, "", "a", succeeded=False)],  # refused without a reason
        [swap(0, 1, "", "a", succeeded=False), read(2, 3, "a")],  # refused, and done all the same
        [swap(0, OPEN, "x", "a"), read(1, 2, "a")],  # open, but it could not have happened
        [swap(5, OPEN, "", "a"), read(1, 2, "a")],  # seen before it was asked for
    ],
)
def test_histories_that_no_register_has_are_refused(history: list[Operation]) -> None:
    assert "fit no order" in contradiction(history)


@given(st.integers(0, 2**32))
def test_what_a_register_did_is_accepted_and_a_stale_read_is_not(seed: int) -> None:
    chance = random.Random(seed)
    state, now, history = "", 0.0, []
    for number in range(12):
        expected = chance.choice([state, "wrong"])
        before, after = chance.uniform(0, 3), chance.uniform(0, 3)  # operations overlap by up to this much
        if chance.random() < 0.5:
            history.append(read(now - before, now + after, state))
        else:
            history.append(swap(now - before, now + after, expected, f"v{number}", expected == state))
            state = f"v{number}" if expected == state else state
        now += 1
    assert contradiction(history) == ""
    if state:
        assert contradiction([*history, read(now + 10, now + 11, "")])


# ---- the disk

_NAMES = st.sampled_from(["a", "b"])
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("create"), _NAMES, st.binary(max_size=3)),
        st.tuples(st.just("append"), _NAMES, st.integers(0, 4)),
        st.tuples(st.just("rename"), _NAMES, _NAMES),
        st.tuples(st.just("remove"), _NAMES, st.none()),
        st.tuples(st.just("whole"), _NAMES, st.binary(max_size=3)),
    ),
    max_size=12,
)


def _perform(disk: Disk, action: str, name: str, argument: object) -> None:
    if action == "create":
        file = disk.create(name)
        file.write(bytes(argument))  # type: ignore[call-overload]
        file.close()
    elif action == "append":
        size = min(int(str(argument)), len(disk.read(name)))
        file = disk.append(name, size)
        file.write(b"+")
        file.sync()
        file.close()
    elif action == "rename":
        disk.rename(name, str(argument))
    elif action == "remove":
        disk.remove(name)
    else:
        write_whole(disk, name, bytes(argument))  # type: ignore[call-overload]


@given(_STEPS)
def test_the_simulated_disk_does_what_the_real_one_does(
    tmp_path_factory: pytest.TempPathFactory, steps: Iterable[tuple[str, str, object]]
) -> None:
    real, simulated = Directory(tmp_path_factory.mktemp("disk")), MemoryDisk("X", random.Random(0))
    for action, name, argument in steps:
        outcomes = []
        for disk in (real, simulated):
            try:
                _perform(disk, action, name, argument)
                outcomes.append("done")
            except OSError as error:
                outcomes.append(type(error).__name__)
        assert outcomes[0] == outcomes[1]
        assert {each: real.read(each) for each in real.names()} == {
            each: simulated.read(each) for each in simulated.names()
        }


def test_a_power_failure_keeps_what_was_synced_and_nothing_that_was_not_written() -> None:
    kept, torn, gone = set(), set(), 0
    for seed in range(200):
        disk = MemoryDisk("X", random.Random(seed))
        write_whole(disk, "a", b"safe")
        file = disk.append("a", 4)
        file.write(b"unsynced")
        disk.create("b").write(b"named by nobody durable")
        disk.fails_in = 0
        with pytest.raises(PowerFailure):
            file.sync()
        disk.power_off()
        assert disk.read("a").startswith(b"safe")
        kept.add(len(disk.read("a")))
        if disk.read("a") != b"safeunsynced"[: len(disk.read("a"))]:
            torn.add(disk.read("a"))
        gone += "b" not in disk.names()
    assert kept == set(range(4, 13))
    assert torn, "sectors that were never written"
    assert 0 < gone < 200


def test_whole_files_are_there_whole_or_not_at_all() -> None:
    for seed in range(300):
        disk = MemoryDisk("X", random.Random(seed))
        write_whole(disk, "a", b"old")
        disk.fails_in = seed % 6
        with suppress(PowerFailure):
            write_whole(disk, "a", b"newer")
        disk.power_off()
        assert disk.read("a") in (b"old", b"newer")


# ---- the runs


def test_the_same_seed_prints_the_same_bytes() -> None:
    """Whatever the order of sets, which differs from process to process."""
    outputs = {
        subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", "7", "--scenario", "mixed"],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for hash_seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
    assert b"seed 7 mixed: ok;" in outputs.pop()


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_nothing_is_lost_and_nothing_stale_is_read(scenario: str) -> None:
    for seed in range(1, 6):
        result = run(seed, scenario)
        assert not result.violation, f"python -m tests.sim --seed {seed} --scenario {scenario}: {result.violation}"


def test_a_member_that_goes_off_while_its_addition_is_under_way_comes_back() -> None:
    """The night's one failure in 8,218 seeds: the simulator itself forgot such a member, which then never caught up."""
    assert not run(8218, "mixed").violation


@pytest.mark.sim
@pytest.mark.parametrize(("scenario", "count"), [("mixed", 300), ("elections", 100), ("disks", 100), ("members", 100)])
def test_many_seeds(scenario: str, count: int) -> None:
    assert [result.summary + result.violation for result in failures(range(1, count + 1), scenario)] == []
