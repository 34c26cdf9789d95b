"""Health checks: what counts, what Docker's defaults fill in, and a task's life under a check."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.containers_storage import parse_config
from node.health import (
    HEALTHY,
    STARTING,
    UNHEALTHY,
    Check,
    Health,
    Probe,
    check_of,
    complaint,
    judged,
    merged,
    pause_s,
)
from node.interface import ImageConfig, Phase, RuntimeFault
from proto.objects_pb2 import TASK_FAILED, TASK_RUNNING, TASK_SHUTDOWN, TASK_STARTING, HealthConfig
from tests.fakes_dispatcher import Host, Manager, host_on, serving, standing, task
from tests.waiting import until

QUICK = HealthConfig(test=["CMD", "ask"], interval_s=0.001, retries=2)


def test_the_image_fills_in_what_the_service_leaves_open() -> None:
    image = HealthConfig(test=["CMD", "img"], interval_s=7, retries=9)
    assert check_of(merged(HealthConfig(), image)) == Check(("img",), 7.0, retries=9)
    assert check_of(merged(HealthConfig(test=["CMD-SHELL", "x | y"], retries=2), image)) == Check(
        ("/bin/sh", "-c", "x | y"), 7.0, retries=2
    )
    assert check_of(merged(HealthConfig(test=["NONE"]), image)) is None
    assert check_of(HealthConfig(interval_s=3)) is None
    assert check_of(HealthConfig(test=["CMD", "a"])) == Check(("a",), 30.0, 30.0, 0.0, 5.0, 3)


def test_the_images_own_check_is_read() -> None:
    text = '{"config": {"Healthcheck": {"Test": ["CMD", "a", "b"], "Interval": 1500000000, "Retries": 4}}}'
    assert parse_config(text).health == HealthConfig(test=["CMD", "a", "b"], interval_s=1.5, retries=4)
    assert parse_config("{}").health == HealthConfig()


def test_what_counts_while_it_starts() -> None:
    check, health = Check(("a",), interval_s=10, start_period_s=25, retries=2), Health()
    judgements = []
    for now in (0, 5, 24, 26, 30, 36):
        health = judged(check, health, Probe(False, "no"), 0.0, now)
        judgements.append((now, health.failures, health.status))
    assert judgements == [
        (0, 0, STARTING),
        (5, 0, STARTING),
        (24, 0, STARTING),
        (26, 1, STARTING),
        (30, 1, STARTING),
        (36, 2, UNHEALTHY),
    ]
    assert "failed 2 times: no" in complaint(check, health)


def test_pauses_grow_to_the_start_interval_and_then_are_the_interval() -> None:
    check = Check(("a",), interval_s=30, start_interval_s=1)
    assert [pause_s(check, Health(probes=n)) for n in range(6)] == [0, 0.1, 0.2, 0.4, 0.8, 1]
    assert pause_s(check, Health(HEALTHY)) == 30


@given(
    interval_s=st.floats(0.01, 60),
    start_period_s=st.floats(0, 120),
    retries=st.integers(1, 5),
    answers=st.lists(st.booleans(), max_size=300),
)
def test_never_stricter_than_dockers(
    interval_s: float, start_period_s: float, retries: int, answers: list[bool]
) -> None:
    """A container becomes unhealthy no sooner than by `retries` failures, an interval apart, after its start period."""
    check = Check(("a",), interval_s, 1.0, start_period_s, min(5.0, interval_s), retries)
    health, now = Health(), 0.0
    healthy_at: float | None = None
    for passed in answers:
        now += pause_s(check, health)
        health = judged(check, health, Probe(passed), 0.0, now)
        if passed:
            assert health.status == HEALTHY
            healthy_at = now
        if health.status == UNHEALTHY:
            least = max(start_period_s, interval_s) if healthy_at is None else healthy_at + interval_s
            assert now >= least + (retries - 1) * interval_s - 1e-6
            return


@pytest.fixture
async def manager() -> AsyncIterator[Manager]:
    made = Manager()
    made.items |= standing()
    async with serving(made):
        yield made


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with host_on(tmp_path) as made:
        yield made


async def test_a_task_runs_once_it_is_healthy(host: Host, manager: Manager) -> None:
    host.images.config = ImageConfig(health=HealthConfig(test=["CMD", "ask"], interval_s=1000, start_interval_s=0.001))
    host.runtime.answers = [(1, b"not yet"), (1, b"not yet")]
    host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.put(task())
    status = await manager.reported("t1", TASK_RUNNING)
    assert status.health == HEALTHY
    assert not host.runtime.answers
    assert [s.health for s in manager.statuses["t1"] if s.state == TASK_STARTING][:1] in (["starting"], [""], [])


async def test_a_task_that_never_becomes_healthy_fails_and_says_why(host: Host, manager: Manager) -> None:
    host.images.config = ImageConfig(health=QUICK)
    host.runtime.answers = [(1, b"connection refused\n")] * 50
    host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.put(task())
    status = await manager.reported("t1", TASK_FAILED)
    assert status.err == "task: unhealthy: its health check failed 2 times: connection refused"
    assert status.health == UNHEALTHY
    assert TASK_RUNNING not in manager.states("t1")
    assert host.runtime.phase_of("t1") is Phase.EXITED
    assert not host.network.spaces


async def test_a_running_task_that_turns_unhealthy_is_stopped_and_failed(host: Host, manager: Manager) -> None:
    asked = task()
    asked.spec.container.health.CopyFrom(QUICK)
    host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.put(asked)
    await manager.reported("t1", TASK_RUNNING)
    host.runtime.faults["exec"] = [RuntimeFault("hangs", permanent=False)] * 2
    assert "failed 2 times: hangs" in (await manager.reported("t1", TASK_FAILED)).err
    assert host.runtime.made["t1"].signals == ["TERM"]


async def test_a_container_that_exits_before_it_is_healthy_is_judged_by_its_exit(host: Host, manager: Manager) -> None:
    asked = task()
    asked.spec.container.health.CopyFrom(QUICK)
    asked.spec.container.health.start_period_s = 1000
    host.runtime.answers = [(1, b"")] * 10_000
    host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.put(asked)
    await until(lambda: host.runtime.phase_of("t1") is Phase.RUNNING)
    host.runtime.exit("t1", 4)
    assert (await manager.reported("t1", TASK_FAILED)).err == "task: non-zero exit (4)"
    assert TASK_RUNNING not in manager.states("t1")


async def test_a_task_can_be_stopped_while_it_starts(host: Host, manager: Manager) -> None:
    asked = task()
    asked.spec.container.health.CopyFrom(HealthConfig(test=["CMD", "ask"], interval_s=1000))
    host.runtime.answers = [(1, b"")] * 10_000
    host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.put(asked)
    await until(lambda: len(host.runtime.answers) < 10_000)
    manager.want("t1", TASK_SHUTDOWN)
    await manager.reported("t1", TASK_SHUTDOWN)


async def test_the_next_agent_goes_on_with_the_check_of_the_image(host: Host, manager: Manager) -> None:
    host.images.config = ImageConfig(health=QUICK)
    host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.put(task())
    await manager.reported("t1", TASK_RUNNING)
    await host.abandon()
    host.images.config = ImageConfig()
    host.runtime.answers = [(1, b"ill")] * 50
    host.run(manager.addr)
    assert "ill" in (await manager.reported("t1", TASK_FAILED)).err
