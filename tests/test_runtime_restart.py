"""kill -9 of the process that runs containers, at every step: the next process adopts or clears, and loses nothing.

Each process moves into a mount namespace of its own where the host needs that, so this also shows that mounts
made in one are seen and unmounted by the next.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from node import cgroups
from node.mounts import mount_points, needs_private_namespace, own_mountinfo
from node.taskdir import command_lines, remains_of
from tests.containers import load_tool_image, scratch_directory
from tests.runtime_agent import CGROUP_PARENT, TASK_ID
from tests.waiting import wait_until

pytestmark = pytest.mark.root


class Scene:
    def __init__(self, directory: Path, layers: str) -> None:
        self.directory, self.layers = directory, layers

    def agent(self, *commands: str, die_after: str = "-") -> list[object]:
        """Run an agent process; what its commands answered, up to its death."""
        argv = [sys.executable, "-m", "tests.runtime_agent", str(self.directory), self.layers, die_after, *commands]
        done = subprocess.run(argv, capture_output=True, timeout=60, check=False)
        assert done.returncode == (0 if die_after == "-" else -signal.SIGKILL), done.stderr.decode()
        return [json.loads(line) for line in done.stdout.splitlines()]

    @property
    def bundle(self) -> Path:
        return self.directory / "state/tasks" / TASK_ID

    def leftovers(self) -> list[str]:
        found = [str(path) for name in ("state/tasks", "state/exits", "run/tasks", "run/crun")
                 for path in (self.directory / name).glob("*")]  # fmt: skip
        found += [point for point in mount_points(own_mountinfo()) if point.startswith(f"{self.directory}/run/")]
        found += [f"process {pid}" for pid in remains_of(self.bundle, command_lines())]
        relative = f"{CGROUP_PARENT.strip('/')}/{TASK_ID}"
        return found + [h for h in cgroups.read_layout().hierarchies if Path(h, relative).exists()]


@pytest.fixture
def scene() -> Iterator[Scene]:
    with scratch_directory() as directory:
        image = asyncio.run(load_tool_image(directory))
        scene = Scene(directory, ":".join(map(str, image.layers)))
        yield scene
        scene.agent("adopt", "remove")
        wait_until(lambda: not scene.leftovers(), what="a clean host")
        cgroups.remove(cgroups.read_layout(), CGROUP_PARENT.strip("/"))


@pytest.mark.parametrize(
    ("step", "adopted"),
    [
        ("preparing", []),
        ("creating", []),
        ("created", [[TASK_ID, "created"]]),
        ("starting", [[TASK_ID, "created"]]),
        ("started", [[TASK_ID, "running"]]),
    ],
)
def test_killed_while_starting(scene: Scene, step: str, adopted: list[list[str]]) -> None:
    scene.agent("create", "start", die_after=step)
    assert scene.agent("adopt", "create", "start", "stop") == [adopted, None, "running", 3]


def test_killed_before_the_monitor_answered(scene: Scene) -> None:
    """The monitor and the runtime under it may still be at work when the next agent clears their task."""
    argv = [sys.executable, "-m", "tests.runtime_agent", str(scene.directory), scene.layers, "-", "create", "start"]
    for _ in range(3):
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
            wait_until((scene.bundle / "conmon.err").exists, what="the start of the monitor")
            process.kill()
        assert scene.agent("adopt", "create", "start", "stop")[1:] == [None, "running", 3]
        scene.agent("remove")
        assert scene.leftovers() == []


@pytest.mark.parametrize("step", ["exited", "removing"])
def test_killed_while_stopping_or_removing(scene: Scene, step: str) -> None:
    scene.agent("create", "start", "stop", "remove", die_after=step)
    adopted = scene.agent("adopt")[0]
    assert adopted == ([[TASK_ID, "exited"]] if step == "exited" else [])
    if step == "exited":
        assert scene.agent("wait") == [3]
    else:
        assert scene.leftovers() == []


def test_an_exit_while_no_agent_ran_is_known_to_the_next(scene: Scene) -> None:
    scene.agent("create", "start", die_after="started")
    os.kill(int((scene.bundle / "pid").read_text()), signal.SIGTERM)
    wait_until((scene.directory / "state/exits" / TASK_ID).exists)
    assert scene.agent("adopt", "wait") == [[[TASK_ID, "exited"]], 3]


def test_mounts_are_seen_outside_and_go_with_the_next_agent(scene: Scene) -> None:
    scene.agent("create", "start")
    rootfs = str(scene.directory / "run/tasks" / TASK_ID / "rootfs")
    assert rootfs in mount_points(own_mountinfo())
    scene.agent("remove")
    assert rootfs not in mount_points(own_mountinfo())


def test_the_host_keeps_its_cgroups(scene: Scene) -> None:
    """The private namespace of an agent takes nothing away from the host."""
    before = cgroups.read_layout()
    scene.agent("create", "remove")
    assert cgroups.read_layout() == before
    if needs_private_namespace(before, "crun"):
        assert cgroups.UNIFIED in mount_points(own_mountinfo())


def test_a_restarted_host_fails_its_tasks(scene: Scene) -> None:
    """After a reboot neither process nor mount is left, only the directory."""
    scene.agent("create", "start")
    record = scene.bundle / "state.json"
    scene.agent("stop")
    raw = json.loads(record.read_text())
    raw |= {"step": "started", "boot_id": "another", "exit_code": None}
    record.write_text(json.dumps(raw))
    (scene.directory / "state/exits" / TASK_ID).unlink()
    assert scene.agent("adopt", "wait") == [[[TASK_ID, "exited"]], None]
    assert "host was restarted" in record.read_text()
