"""Whole swarms in the simulator: nothing wrong is found in ours, and what is broken on purpose is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from proto.objects_pb2 import TASK_REMOVE, TASK_SHUTDOWN, Service, Task
from swarm import allocate, orchestrate, schedule
from swarm.leader import Stage
from swarm.store.changes import Change, Decision, Remove, Update
from swarm.store.dirty import Dirty
from swarm.store.store import Store
from tests.sim.fleet import failures, prepare
from tests.sim.scenarios import SWARMS
from tests.sim.swarm import Swarm, Trouble

ORCHESTRATE = partial(orchestrate.decide, fits=schedule.fits, surplus=schedule.surplus)


def found(**broken: Stage) -> str:
    """What the first of a few runs that fails says, where one stage is broken."""
    prepare()
    stages: list[tuple[str, Stage]] = [("allocate", allocate.decide), ("orchestrate", ORCHESTRATE)]
    stages += [("allocate", allocate.decide), ("schedule", schedule.decide)]
    size = replace(SWARMS["swarm-small"][0], faults_s=8.0)
    mixed = [(name, broken.get(name, stage)) for name, stage in stages]
    for seed in range(1, 6):
        try:
            Swarm(seed, size, Trouble(), lambda _: None, mixed).run()
        except AssertionError as error:
            return str(error)
    return "nothing found"


def altered(stage: Stage, change: Callable[[Change], Change | None]) -> Stage:
    """The stage, with each change that it wants replaced, or left out."""

    def decide(store: Store, now: float, new_id: Callable[[], str], dirty: Dirty) -> Decision:
        decision = stage(store, now, new_id, dirty)
        kept = (tuple(new for each in group if (new := change(each)) is not None) for group in decision.groups)
        return replace(decision, groups=tuple(group for group in kept if group))

    return decide


def test_a_small_swarm_holds_whatever_goes_wrong() -> None:
    assert [result.summary + result.violation for result in failures(range(1, 9), "swarm-small")] == []


@pytest.mark.sim
def test_larger_swarms_hold() -> None:
    assert [result.summary + result.violation for result in failures(range(1, 7), "swarm")] == []


def test_services_that_are_never_forgotten_are_noticed() -> None:
    def keep(change: Change) -> Change | None:
        return None if isinstance(change, Remove) and isinstance(change.record, Service) else change

    assert "removed, but still there" in found(orchestrate=altered(ORCHESTRATE, keep))


def test_tasks_that_are_never_stopped_are_noticed() -> None:
    def keep(change: Change) -> Change | None:
        record = change.record
        stops = isinstance(record, Task) and record.desired_state in (TASK_SHUTDOWN, TASK_REMOVE)
        return None if isinstance(change, Update) and stops else change

    assert "nothing found" not in found(orchestrate=altered(ORCHESTRATE, keep))


def test_an_address_that_is_given_twice_is_noticed() -> None:
    def same(change: Change) -> Change | None:
        if isinstance(change, Update) and isinstance(change.record, Task):
            for leg in change.record.networks:
                leg.address = "10.255.0.9/16"
        return change

    assert "used twice" in found(allocate=altered(allocate.decide, same))


def test_tasks_that_no_node_gets_are_noticed() -> None:
    def nothing(store: Store, now: float, new_id: Callable[[], str], dirty: Dirty) -> Decision:
        return Decision()

    assert "nothing found" not in found(schedule=nothing)


def test_a_card_that_is_given_twice_is_noticed() -> None:
    def same(change: Change) -> Change | None:
        if isinstance(change, Update) and isinstance(change.record, Task):
            for resource in change.record.assigned_generic:
                resource.id = "A"
        return change

    assert "gpu A of" in found(schedule=altered(schedule.decide, same))
