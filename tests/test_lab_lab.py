"""The lab itself: idempotent, several side by side, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.lab import hosts, lab
from swarm.lab.plan import free_subnet, partition_rules, wanted_hosts
from tests.labs import Lab, wait_for
from tests.waiting import INTERRUPTIBLE

UP = [sys.executable, "-m", "swarm.cli.main", "lab", "up"]


def traces(name: str) -> list[str]:
    """Everything on this machine that belongs to the lab."""
    found = [line for line in _out("ip", "netns").splitlines() if f"pyl-{name}-" in line]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"/lab/{name}/" in line]
    found += [
        str(path) for root in ("/var/lib/pyswarm/lab", "/run/pyswarm/lab") for path in Path(root).glob(f"{name}*")
    ]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/pyswarm-lab/{name}")]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"/lab/{name}/" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(f"process {pid}")
        except OSError:
            continue
    return found


def _out(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


@pytest.mark.lab
@pytest.mark.timeout(240)
def test_two_labs_side_by_side_and_nothing_is_left(web_image: str) -> None:
    plans = []
    try:
        for name in ("left", "right"):
            lab.up(name, 1, 1, say=lambda line: None)
            plans.append(lab.load(name))
        left, right = Lab(lab.load("left")), Lab(lab.load("right"))
        left.pyswarm("m1", "service", "create", "--name", "web", "--replicas", "4", "-p", "8000:80", web_image)
        assert right.rows("m1", "service", "ls") == []
        assert left.get("w1", 8000)
        nodes = left.pyswarm("m1", "node", "ls", "-q")
        pids = hosts.daemon_pids(left.host("m1"))
        lab.up("left", 1, 1, say=lambda line: None)
        assert left.pyswarm("m1", "node", "ls", "-q") == nodes, "run again = no change"
        assert hosts.daemon_pids(left.host("m1")) == pids
        assert left.run("w1", "hostname").strip() == "w1"
    finally:
        _remove("left")
        _remove("right")
    assert traces("left") + traces("right") == []
    links, tables = _out("ip", "-o", "link"), _out("nft", "list", "tables")
    for plan in plans:
        assert not [name for name in (plan.bridge, *(host.link for host in plan.hosts)) if f" {name}" in links]
        assert plan.nft_table not in tables


@pytest.fixture
def broken() -> Iterator[str]:
    """The name of a lab that does not exist, before and after."""
    _remove("broken")
    yield "broken"
    _remove("broken")


def _remove(name: str) -> None:
    if name in lab.names():
        lab.down(name)


@pytest.mark.lab
def test_ctrl_c_in_up_leaves_nothing(broken: str) -> None:
    command = [*INTERRUPTIBLE, *UP, broken, "--managers", "3", "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len([line for line in traces(broken) if "process" in line]) >= 2, 30, "daemons start")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert traces(broken) == []


@pytest.mark.root
@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["up", "Bad_Name"], "Bad_Name"),
        (["up", "x", "--managers", "0"], "manager"),
        (["down", "nosuch"], "nosuch"),
        (["exec", "m1", "--", "true"], "no such lab"),
        (["kill", "m1"], "no such lab"),
    ],
)
def test_bad_input(argv: list[str], word: str) -> None:
    done = subprocess.run([*UP[:-1], *argv], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_free_subnet_overlaps_nothing() -> None:
    assert free_subnet(["192.168.200.0/23", "10.0.0.0/8"]) == "192.168.202.0/24"
    assert free_subnet(["192.168.0.0/16"]) is None


def test_a_growing_lab_keeps_the_addresses_of_its_hosts() -> None:
    small = wanted_hosts("lab", "192.168.200.0/24", 1, 1)
    large = wanted_hosts("lab", "192.168.200.0/24", 3, 2)
    assert set(small) <= set(large)
    assert len({host.address for host in large}) == 5
    assert all(len(host.link) <= 15 for host in large)


def test_partition_rules_name_the_other_side() -> None:
    one, two, three = wanted_hosts("lab", "192.168.200.0/24", 3, 0)
    rules = partition_rules(one, [two, three])
    assert "192.168.200.12, 192.168.200.13" in rules
    assert one.address not in rules
