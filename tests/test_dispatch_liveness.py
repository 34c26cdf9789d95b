"""Deadlines of nodes: who is down, and who is not although it looks so."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarm.dispatch.liveness import (
    CHECK_EVERY_S,
    MISSED_PERIODS,
    ORPHAN_AFTER_S,
    STEP_MAX_S,
    ListeningClock,
    Liveness,
)

PERIOD_S = 1.0
GRACE_S = MISSED_PERIODS * PERIOD_S


def watched(now: float = 0.0, grace_s: float = GRACE_S) -> Liveness:
    liveness = Liveness()
    liveness.watch("n1", now, grace_s)
    return liveness


def test_a_silent_node_is_found_the_grace_after_its_last_message() -> None:
    liveness = watched()
    liveness.beat("n1", 10.0, PERIOD_S)
    assert liveness.expired(10.0 + GRACE_S - 0.01) == []
    assert liveness.expired(10.0 + GRACE_S) == ["n1"]
    assert liveness.next_check(10.0 + GRACE_S - 0.05, at_most_s=0.5) == 10.0 + GRACE_S


def test_a_message_never_shortens_the_grace_after_an_election() -> None:
    liveness = watched(grace_s=9.0)
    liveness.beat("n1", 0.1, PERIOD_S)
    assert liveness.expired(8.9) == []


def test_a_node_that_is_down_has_to_register_again() -> None:
    liveness = watched()
    liveness.down("n1", 3.0)
    liveness.beat("n1", 4.0, PERIOD_S)
    assert liveness.expired(100.0) == []
    liveness.watch("n1", 101.0, GRACE_S)
    assert liveness.expired(104.0) == ["n1"]


def test_tasks_of_a_node_are_given_up_once_after_a_day_and_not_if_it_came_back() -> None:
    liveness = watched()
    liveness.down("n1", 3.0)
    liveness.down("n2", 3.0)
    liveness.watch("n2", 60.0, GRACE_S)
    assert liveness.lost(3.0 + ORPHAN_AFTER_S - 1) == []
    assert liveness.lost(3.0 + ORPHAN_AFTER_S) == ["n1"]
    assert liveness.lost(3.0 + 2 * ORPHAN_AFTER_S) == []


@given(st.lists(st.floats(0.0, GRACE_S - 0.01), max_size=50))
def test_a_node_that_speaks_within_each_grace_is_never_down(gaps: list[float]) -> None:
    liveness, now = watched(), 0.0
    for gap in gaps:
        now += gap
        assert liveness.expired(now) == []
        liveness.beat("n1", now, PERIOD_S)


def looked(clock: ListeningClock, now: float, until: float) -> float:
    """A leader at leisure looks at its deadlines until then; returns the time."""
    while now < until:
        now += CHECK_EVERY_S
        clock.look(now)
    return now


@given(st.lists(st.floats(0.0, 60.0), max_size=20))
def test_a_starved_leader_never_downs_a_node_that_speaks(stalls: list[float]) -> None:
    """However long the leader stands still, and how often: what the node said meanwhile is read a few turns of the
    loop later, and each look in between counts for little."""
    clock, liveness, now = ListeningClock(0.0), Liveness(), 0.0
    liveness.watch("n1", 0.0, GRACE_S)
    for stall in stalls:
        for _ in range(5):
            now += stall
            assert liveness.expired(clock.look(now)) == []
        liveness.beat("n1", clock.read(now), PERIOD_S)


@given(st.lists(st.floats(0.0, STEP_MAX_S), min_size=1, max_size=200))
def test_ordinary_lateness_of_a_look_delays_nothing(steps: list[float]) -> None:
    clock, now = ListeningClock(100.0), 100.0
    for step in steps:
        now += step
        clock.look(now)
    assert abs(clock.read(now) - (now - 100.0)) < 1e-6


def test_a_dead_node_is_found_in_two_seconds_and_a_quarter() -> None:
    clock, liveness = ListeningClock(0.0), Liveness()
    liveness.watch("n1", 0.0, GRACE_S)
    now = looked(clock, 0.0, 5.0)
    liveness.beat("n1", clock.read(now), PERIOD_S)
    died_at = now
    while not liveness.expired(clock.look(now)):
        now += CHECK_EVERY_S
    assert now - died_at <= 2.25 + CHECK_EVERY_S


@given(before=st.floats(0.0, 0.55), pause=st.floats(0.0, 1.2), after=st.floats(0.0, 0.45))
def test_a_node_paused_for_over_a_second_is_not_down(before: float, pause: float, after: float) -> None:
    """It spoke up to one tick (0.5 s and 10 % jitter) before, and needs a moment to speak again."""
    clock, liveness = ListeningClock(0.0), Liveness()
    liveness.watch("n1", 0.0, GRACE_S)
    looked(clock, 0.0, before + pause + after)
    assert liveness.expired(clock.read(before + pause + after)) == []
