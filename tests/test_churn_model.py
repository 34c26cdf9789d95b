"""The churn's walk and its measure of staleness: pure, checked on their own."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from proto.control_pb2 import Event
from tests.churn.model import Cut, Heal, KillAgent, Pause, StartAgent, after, disturbed, start, walk
from tests.endpoints import Change, changes, delay_s
from tests.serving import Sight

HOSTS = ("m1", "m2", "m3", "w1", "w2")
START = start(2, 10)


@given(st.integers())
def test_one_seed_gives_one_walk(seed: int) -> None:
    first, second = (list(walk(random.Random(seed), START, HOSTS, 10, 60)) for _ in range(2))
    assert first == second


@given(st.integers(), st.integers(1, 100))
def test_every_pause_finds_the_hosts_in_order(seed: int, steps: int) -> None:
    state = START
    counted = 0
    for number, step, told in walk(random.Random(seed), START, HOSTS, 10, steps):
        if isinstance(step, KillAgent | Cut):
            assert step.host not in disturbed(state)
        if isinstance(step, StartAgent):
            assert step.host in state.dead - state.cut
        if isinstance(step, Heal):
            assert step.host in state.cut
        state = after(state, step)
        assert state == told
        assert len(state.cut) <= 1
        assert all(0 <= replicas <= 15 for replicas in state.replicas.values())
        assert number in {counted, counted + 1}
        counted = number
        if isinstance(step, Pause):
            assert not disturbed(state)
    assert isinstance(step, Pause)
    assert counted == steps


def event(at: float, kind: str, name: str, action: str, **attributes: str) -> Event:
    return Event(at=at, type=kind, id=name, name=name, action=action, attributes=attributes)


def test_a_task_serves_from_running_until_it_is_told_to_stop() -> None:
    told = [
        event(1, "task", "t", "create", service="web"),
        event(2, "task", "t", "running", service="web", node="w1"),
        event(3, "task", "t", "update", service="web", node="w1", **{"desired.new": "shutdown"}),
        event(4, "task", "t", "shutdown", service="web", node="w1"),
    ]
    assert changes(told) == [Change(2, "web", "t", True), Change(3, "web", "t", False)]


def test_what_runs_on_a_node_that_is_down_does_not_serve_until_it_is_back() -> None:
    told = [
        event(1, "task", "t", "running", service="web", node="w1"),
        event(2, "node", "w1", "update", **{"state.new": "down", "state.old": "ready"}),
        event(3, "node", "w1", "update", **{"state.new": "ready", "state.old": "down"}),
    ]
    assert [(each.at, each.serves) for each in changes(told)] == [(1, True), (2, False), (3, True)]


def seen(*sights: tuple[float, str]) -> list[Sight]:
    return [Sight(at, frozenset(addresses.split())) for at, addresses in sights]


def test_a_delay_ends_with_the_first_sight_that_agrees() -> None:
    begins, ends = Change(10, "web", "t", True), Change(10, "web", "t", False)
    assert delay_s(seen((1, ""), (10.5, "a"), (11, "a b")), "b", begins) == 1
    assert delay_s(seen((1, "a b"), (12, "a")), "b", ends) == 2
    assert delay_s(seen((1, "a"), (12, "")), "b", ends) == 0, "it was not served before"
    assert delay_s(seen((1, "a b")), "b", begins) == 0, "it was served already"


def test_what_was_never_seen_is_late_up_to_the_change_that_took_its_place() -> None:
    begins = Change(10, "web", "t", True)
    assert delay_s(seen((1, ""), (12, "a")), "b", begins) is None
    assert delay_s(seen((1, ""), (12, "a")), "b", begins, until=13) == 3
    assert delay_s(seen((1, ""), (12, "b")), "b", begins, until=11) == 1
