"""A child that outlives its supervisor is adopted, not doubled; one that dies is started again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from swarm.supervise import Supervisor, holder, keep_running
from tests.waiting import until

CHILD = """
import sys, signal
from pathlib import Path
from swarm.supervise import hold_lock
lock = hold_lock(Path(sys.argv[1]))
if lock is None: sys.exit(3)
Path(sys.argv[1] + ".input").write_bytes(sys.stdin.buffer.read())
signal.pause()
"""


def supervisor(directory: Path) -> Supervisor:
    lock = directory / "child.lock"
    return Supervisor("child", [sys.executable, "-c", CHILD, str(lock)], lock, directory / "child.log")


async def test_a_dead_child_is_replaced_and_the_first_input_is_given_once(tmp_path: Path) -> None:
    kept = supervisor(tmp_path)
    given = tmp_path / "child.lock.input"
    kept.start(b"secret")
    await until(lambda: given.exists() and given.read_bytes() == b"secret")
    first = kept.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: kept.pid not in (0, first) and given.read_bytes() == b"")
    await kept.stop(5)
    assert kept.pid == 0


async def test_what_cannot_be_started_yet_waits_for_its_input(tmp_path: Path) -> None:
    lock = tmp_path / "child.lock"
    keys: list[bytes] = []
    asked = 0

    def each() -> bytes | None:
        nonlocal asked
        asked += 1
        return keys[0] if keys else None

    kept = Supervisor("child", [sys.executable, "-c", CHILD, str(lock)], lock, tmp_path / "child.log", each)
    given = tmp_path / "child.lock.input"
    kept.start(b"once ")
    await until(lambda: asked == 1)
    kept.wake()
    await until(lambda: asked == 2)
    assert kept.pid == 0
    keys.append(b"key")
    kept.wake()
    await until(lambda: given.exists() and given.read_bytes() == b"once key")
    first = kept.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: kept.pid not in (0, first) and given.read_bytes() == b"key")
    await kept.stop(5)


async def test_a_new_supervisor_adopts_the_running_child(tmp_path: Path) -> None:
    before = supervisor(tmp_path)
    before.start()
    await until(lambda: before.pid != 0)
    pid = before.pid
    assert before._task is not None
    before._task.cancel()  # the supervisor's process is gone, the child stays
    after = supervisor(tmp_path)
    after.start()
    await asyncio.sleep(0)
    assert after.pid == pid
    os.kill(pid, signal.SIGKILL)
    await until(lambda: after.pid not in (0, pid))
    await after.stop(5)
    assert holder(tmp_path / "child.lock") == 0


async def test_a_child_that_has_only_just_been_started_is_stopped_too(tmp_path: Path) -> None:
    """It does not hold the lock yet; left alone it would go on without anybody knowing."""
    lock, started = tmp_path / "child.lock", tmp_path / "started"
    slow = f"import time, pathlib; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    kept = Supervisor("child", [sys.executable, "-c", slow], lock, tmp_path / "child.log")
    kept.start()
    await until(started.exists)
    child = kept._child
    await kept.stop(5)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


class Failing:
    def __init__(self, fault: Exception | None) -> None:
        self._fault = fault

    async def run(self) -> None:
        if self._fault is not None:
            raise self._fault


async def test_what_failed_is_followed_by_another_until_one_ends_by_itself() -> None:
    faults: list[Exception | None] = [KeyError("digest"), OSError(28, "disk"), None, ValueError("never made")]
    left = iter(map(Failing, faults))
    async with asyncio.timeout(10):
        await keep_running(lambda: next(left), 0.0)
    assert isinstance(next(left)._fault, ValueError)


async def test_cancelling_ends_it_between_two() -> None:
    running = asyncio.create_task(keep_running(lambda: Failing(ValueError()), 3600.0))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
