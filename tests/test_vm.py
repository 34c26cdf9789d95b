"""What users have and the development machine has not: cgroup v2 only. `make test-vm` runs this inside the
virtual machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.labs import Lab, lab_up, wait_for

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(900),
    pytest.mark.skipif("PYSWARM_VM" not in os.environ, reason="runs inside the virtual machine: make test-vm"),
]


def test_limits_of_a_real_task_on_cgroup_v2(web_image: str) -> None:
    assert Path("/sys/fs/cgroup/cgroup.controllers").exists(), "the machine has pure cgroup v2"
    with lab_up("vm", 1, 0) as cluster:
        limits = ["--limit-memory", "64m", "--limit-cpu", "0.5", "--limit-pids", "50", "--reserve-memory", "32m"]
        cluster.pyswarm("m1", "network", "create", "net")
        command = ["--name", "web", "--replicas", "2", "--network", "net", "--publish", "8000:80", *limits, web_image]
        cluster.pyswarm("m1", "service", "create", "--detach", *command, timeout_s=300)
        wait_for(lambda: len(cluster.running("web")) == 2, 240, "two tasks run")
        for row in cluster.running("web"):
            group = Path("/sys/fs/cgroup") / cluster.host("m1").cgroup.lstrip("/") / row["ID"]
            assert (group / "memory.max").read_text().strip() == str(64 << 20)
            assert (group / "memory.low").read_text().strip() == str(32 << 20)
            assert (group / "cpu.max").read_text().split() == ["50000", "100000"]
            assert (group / "pids.max").read_text().strip() == "50"
            assert int((group / "memory.current").read_text()) > 0
        assert wait_for(lambda: len({cluster.get("m1", 8000, 20) for _ in range(6)}) == 2, 120, "both answer")
        _removes_cleanly(cluster)
    assert not list(Path("/sys/fs/cgroup").glob("pyswarm-lab/*"))


def _removes_cleanly(cluster: Lab) -> None:
    cluster.pyswarm("m1", "service", "rm", "web", timeout_s=300)
    wait_for(lambda: not cluster.rows("m1", "service", "ls"), 240, "service removed")
    root = Path("/sys/fs/cgroup") / cluster.host("m1").cgroup.lstrip("/")
    wait_for(lambda: not [path for path in root.iterdir() if path.is_dir()], 120, "no cgroup of a task is left")
