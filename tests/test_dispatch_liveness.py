"""Deadlines of nodes: who is down, and who is not although it looks so."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarm.dispatch.liveness import MISSED_PERIODS, ORPHAN_AFTER_S, OVERSLEPT_S, Liveness

PERIOD_S = 1.0
GRACE_S = MISSED_PERIODS * PERIOD_S


def watched(now: float = 0.0, grace_s: float = GRACE_S) -> Liveness:
    liveness = Liveness()
    liveness.watch("n1", now, grace_s)
    return liveness


def test_a_silent_node_is_found_three_periods_after_its_last_message() -> None:
    liveness = watched()
    liveness.beat("n1", 10.0, PERIOD_S)
    assert liveness.expired(12.99) == []
    assert liveness.expired(13.0) == ["n1"]
    assert liveness.next_check(12.8, at_most_s=0.5) == 13.0


def test_a_message_never_shortens_the_grace_after_an_election() -> None:
    liveness = watched(grace_s=9.0)
    liveness.beat("n1", 0.1, PERIOD_S)
    assert liveness.expired(8.9) == []


def test_a_leader_that_overslept_blames_itself() -> None:
    liveness = watched()
    liveness.overslept(20.0)
    assert liveness.expired(22.9) == []
    assert liveness.expired(23.0) == ["n1"]


def test_ordinary_lateness_of_a_timer_delays_nothing() -> None:
    liveness = watched()
    for _ in range(100):
        liveness.overslept(OVERSLEPT_S / 2)
    assert liveness.expired(3.0) == ["n1"]


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


@given(st.lists(st.floats(0.0, 2.9), max_size=50))
def test_a_node_that_speaks_within_each_three_periods_is_never_down(gaps: list[float]) -> None:
    liveness, now = watched(), 0.0
    for gap in gaps:
        now += gap
        assert liveness.expired(now) == []
        liveness.beat("n1", now, PERIOD_S)
