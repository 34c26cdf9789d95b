"""The loss of a quorum, and of everything: a swarm that goes on from one manager, and from a backup."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.lab import hosts, lab
from tests.labs import Lab, keep_logs, lab_up, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster(web_image: str, request: pytest.FixtureRequest) -> Iterator[Lab]:
    failed_before = request.session.testsfailed
    with lab_up("recovery", 3, 0) as made:
        made.pyswarm("m1", "service", "create", "--quiet", "--name", "web", "--replicas", "2", web_image)
        yield made
        if request.session.testsfailed > failed_before:
            print(f"logs of the hosts: {keep_logs(made)}")


@pytest.fixture(scope="module")
def backup(cluster: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backup") / "swarm.backup"
    cluster.pyswarm("m1", "network", "create", "kept")
    assert "objects" in cluster.pyswarm("m2", "swarm", "backup", str(path))
    return path


def kill(cluster: Lab, name: str) -> None:
    hosts.kill(hosts.daemon_pids(cluster.host(name)), signal.SIGKILL)


def services(cluster: Lab, asked: str) -> list[str]:
    return [f"{row['Name']} {row['Replicas']}" for row in cluster.rows(asked, "service", "ls")]


def manager_status(cluster: Lab, asked: str) -> dict[str, str]:
    return {row["Hostname"]: row["ManagerStatus"] for row in cluster.rows(asked, "node", "ls")}


def test_a_backup_is_secret_whole_and_replaces_nothing_by_itself(cluster: Lab, backup: Path) -> None:
    assert backup.stat().st_mode & 0o777 == 0o600
    refused = cluster.try_pyswarm("m1", "swarm", "backup", str(backup))
    assert refused.returncode == 1
    assert "exists already" in refused.stderr
    cluster.pyswarm("m1", "swarm", "backup", "--force", str(backup))
    assert not list(backup.parent.glob("*.unfinished"))


def test_with_a_quorum_there_is_nothing_to_force(cluster: Lab, backup: Path) -> None:
    refused = cluster.try_pyswarm("m1", "swarm", "init", "--force-new-cluster")
    assert refused.returncode == 1
    assert "the swarm has a quorum" in refused.stderr
    refused = cluster.try_pyswarm("m1", "swarm", "restore", str(backup))
    assert "already part of a swarm" in refused.stderr


def test_one_manager_goes_on_without_the_others(cluster: Lab) -> None:
    wait_for(lambda: "web 2/2" in services(cluster, "m1"), 30, "the service runs")
    kill(cluster, "m2")
    kill(cluster, "m3")
    done = cluster.try_pyswarm("m1", "swarm", "init", "--force-new-cluster")
    assert done.returncode == 0, done.stderr
    assert "WARNING: this is the only manager now" in done.stderr
    assert "is now a manager" in done.stdout
    assert "kept" in {row["Name"] for row in cluster.rows("m1", "network", "ls")}
    cluster.pyswarm("m1", "network", "create", "afterwards")
    wait_for(lambda: manager_status(cluster, "m1") == {"m1": "Leader", "m2": "", "m3": ""}, 20, "one manager")
    cluster.pyswarm("m1", "service", "scale", "--detach", "web=3")
    wait_for(lambda: "web 3/3" in services(cluster, "m1"), 60, "tasks of the lost hosts run elsewhere")


def test_a_former_manager_that_comes_back_is_a_worker_and_can_be_promoted(cluster: Lab) -> None:
    lab.start(cluster.plan, cluster.host("m2"))
    ready = {"Hostname": "m2", "Status": "Ready", "ManagerStatus": ""}
    wait_for(
        lambda: any(ready.items() <= row.items() for row in cluster.rows("m1", "node", "ls")), 40, "m2 is a worker"
    )
    wait_for(lambda: "not a swarm manager" in cluster.try_pyswarm("m2", "node", "ls").stderr, 20, "and knows it")
    cluster.pyswarm("m1", "node", "promote", "m2")
    wait_for(lambda: manager_status(cluster, "m2") == {"m1": "Leader", "m2": "Reachable", "m3": ""}, 40, "promoted")


def test_a_backup_becomes_a_swarm_on_a_new_host(cluster: Lab, backup: Path, tmp_path: Path) -> None:
    lab.start(cluster.plan, cluster.host("m3"))
    wait_for(lambda: cluster.try_pyswarm("m3", "swarm", "leave", "--force").returncode == 0, 30, "m3 leaves")
    damaged = tmp_path / "damaged"
    data = bytearray(backup.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    refused = cluster.try_pyswarm("m3", "swarm", "restore", str(damaged))
    assert refused.returncode == 1
    assert "the backup cannot be used" in refused.stderr
    assert cluster.pyswarm("m3", "info", "--format", "{{.Swarm.LocalNodeState}}").strip() == "inactive"

    address = cluster.host("m3").address
    done = cluster.pyswarm("m3", "swarm", "restore", "--advertise-addr", address, str(backup))
    assert "is now its only manager" in done
    names = {row["Name"] for row in cluster.rows("m3", "network", "ls")}
    assert "kept" in names
    assert "afterwards" not in names, "that was after the backup"
    wait_for(lambda: "web 2/2" in services(cluster, "m3"), 60, "the service runs on the only node that there is")
    running = {row["Hostname"]: row["Status"] for row in cluster.rows("m3", "node", "ls") if row["ManagerStatus"]}
    assert running == {"m3": "Ready"}
    # The other swarm, whose state the backup was, goes on by itself.
    wait_for(lambda: "web 3/3" in services(cluster, "m1"), 30, "what ran on the host that left runs elsewhere")
