"""Issue section 1 on a real lab: kill -9, partitions, membership, tokens. Nothing acknowledged is lost."""

from __future__ import annotations

import signal

import pytest

from swarm.lab import hosts, lab
from tests.labs import Lab, lab_up, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def service(cluster: Lab, web_image: str) -> str:
    command = ["--name", "web", "--replicas", "10", "--publish", "8000:80", "--restart-delay", "200ms", web_image]
    cluster.pyswarm("m1", "service", "create", *command)
    return "web"


def ids(cluster: Lab, service: str, asked: str) -> set[str]:
    return {row["ID"] for row in cluster.running(service, asked)}


def all_ready(cluster: Lab, asked: str) -> bool:
    return all(row["Status"] == "Ready" for row in cluster.rows(asked, "node", "ls"))


def test_killing_the_leader_pauses_writes_and_restarts_nothing(cluster: Lab, service: str) -> None:
    leader = cluster.leader()
    other = next(name for name in ("m1", "m2", "m3") if name != leader)
    before = ids(cluster, service, other)
    hosts.kill(hosts.daemon_pids(cluster.host(leader)), signal.SIGKILL)
    cluster.pyswarm(other, "network", "create", "after-the-leader")
    assert "after-the-leader" in {row["Name"] for row in cluster.rows(other, "network", "ls")}
    lab.start(cluster.plan, cluster.host(leader))
    wait_for(lambda: all_ready(cluster, other), 30, "all nodes ready")
    assert ids(cluster, service, other) == before
    cluster.pyswarm(other, "network", "rm", "after-the-leader")


def test_all_managers_killed_at_once_lose_nothing(cluster: Lab, service: str) -> None:
    for number in range(5):
        cluster.pyswarm("m1", "network", "create", f"kept-{number}")
    before = ids(cluster, service, "m1")
    pids = [pid for name in ("m1", "m2", "m3") for pid in hosts.daemon_pids(cluster.host(name))]
    hosts.kill(pids, signal.SIGKILL)
    for name in ("m1", "m2", "m3"):
        lab.start(cluster.plan, cluster.host(name))
    wait_for(lambda: all_ready(cluster, "m2"), 40, "all nodes ready")
    assert {f"kept-{number}" for number in range(5)} <= {row["Name"] for row in cluster.rows("m3", "network", "ls")}
    assert ids(cluster, service, "m2") == before, "no task was touched"
    for number in range(5):
        cluster.pyswarm("m1", "network", "rm", f"kept-{number}")


def test_an_agent_s_restart_touches_no_container_and_adopts_all(cluster: Lab, service: str) -> None:
    before = ids(cluster, service, "m1")
    pids = hosts.daemon_pids(cluster.host("w1"))
    hosts.kill(pids, signal.SIGKILL)
    assert cluster.get("w1", 8000), "the published port works without the agent"
    lab.start(cluster.plan, cluster.host("w1"))
    wait_for(lambda: all_ready(cluster, "m1"), 30, "all nodes ready")
    assert ids(cluster, service, "m1") == before
    assert set(hosts.daemon_pids(cluster.host("w1"))).isdisjoint(pids)


def test_a_dead_host_s_tasks_move_and_it_comes_back_empty(cluster: Lab, service: str) -> None:
    hosts.pull_plug(cluster.host("w2"))
    wait_for(
        lambda: len(cluster.running(service)) == 10 and "w2" not in {row["Node"] for row in cluster.running(service)},
        30,
        "moved",
    )
    lab.start(cluster.plan, cluster.host("w2"))
    wait_for(lambda: all_ready(cluster, "m1"), 30, "w2 is back")
    assert len(cluster.running(service)) == 10
    wait_for(lambda: _containers(cluster, "w2") == "0", 30, "no stale container on w2")
    assert cluster.get("w2", 8000)


def _containers(cluster: Lab, host: str) -> str:
    row = cluster.rows(host, "info")[0]
    return str(row["ContainersRunning"])


def test_a_minority_cannot_write_and_catches_up(cluster: Lab, service: str) -> None:
    leader = cluster.leader()
    others = [name for name in ("m1", "m2", "m3") if name != leader]
    rest = [cluster.host(name) for name in (*others, "w1", "w2")]
    lab.partition(cluster.plan, [[cluster.host(leader)], rest])
    try:
        cluster.pyswarm(others[0], "network", "create", "majority")
        done = cluster.try_pyswarm(leader, "network", "create", "minority", timeout_s=60)
        assert done.returncode == 1
        assert "minority" not in {row["Name"] for row in cluster.rows(others[1], "network", "ls")}
    finally:
        lab.heal(cluster.plan)
    wait_for(lambda: all_ready(cluster, leader), 40, "healed")
    assert "majority" in {row["Name"] for row in cluster.rows(leader, "network", "ls")}
    cluster.pyswarm(leader, "network", "rm", "majority")


def test_promotion_and_demotion(cluster: Lab) -> None:
    cluster.pyswarm("m1", "node", "promote", "w1")
    wait_for(lambda: _manager_status(cluster, "m1")["w1"] == "Reachable", 30, "w1 is a manager")
    assert wait_for(lambda: cluster.rows("w1", "node", "ls"), 20, "w1 answers")
    cluster.pyswarm("m2", "node", "demote", "w1")
    wait_for(lambda: _manager_status(cluster, "m1")["w1"] == "", 30, "w1 is a worker")
    wait_for(lambda: cluster.try_pyswarm("w1", "node", "ls").returncode == 1, 20, "w1 manages no more")
    assert "not a swarm manager" in cluster.try_pyswarm("w1", "node", "ls").stderr


def _manager_status(cluster: Lab, asked: str) -> dict[str, str]:
    return {row["Hostname"]: row["ManagerStatus"] for row in cluster.rows(asked, "node", "ls")}


def test_the_leader_can_be_demoted_and_promoted_again(cluster: Lab) -> None:
    leader = cluster.leader()
    other = next(name for name in ("m1", "m2", "m3") if name != leader)
    cluster.pyswarm(other, "node", "demote", leader)
    wait_for(lambda: _manager_status(cluster, other)[leader] == "", 30, "demoted")
    cluster.pyswarm(other, "node", "promote", leader)
    wait_for(lambda: _manager_status(cluster, other)[leader] == "Reachable", 30, "promoted")


def test_losing_quorum_by_demotion_is_refused(cluster: Lab) -> None:
    hosts.kill(hosts.daemon_pids(cluster.host("m3")), signal.SIGKILL)
    try:
        wait_for(lambda: _manager_status(cluster, "m1").get("m3") == "Unreachable", 30, "m3 seen as lost")
        done = cluster.try_pyswarm("m1", "node", "demote", "m2")
        assert done.returncode == 1
        assert "quorum" in done.stderr
    finally:
        lab.start(cluster.plan, cluster.host("m3"))
    wait_for(lambda: all_ready(cluster, "m1"), 30, "all nodes ready")


def test_tokens_that_do_not_fit_are_refused_clearly(cluster: Lab) -> None:
    """Another lab's host tries to get in."""
    address = f"{cluster.host('m1').address}:2377"
    token = cluster.pyswarm("m1", "swarm", "join-token", "-q", "worker").strip()
    with lab_up("test2", 1, 1) as stranger:
        foreign = stranger.pyswarm("m1", "swarm", "join-token", "-q", "worker").strip()
        stranger.pyswarm("w1", "swarm", "leave")

        def refusal(token: str, remote: str = address) -> str:
            done = stranger.try_pyswarm("w1", "swarm", "join", "--token", token, remote, timeout_s=60)
            assert done.returncode == 1, done.stdout
            assert len(done.stderr.strip().splitlines()) == 1, done.stderr
            return done.stderr

        assert "another" in refusal(foreign)
        assert "token" in refusal(token[:-5])
        rotated = cluster.pyswarm("m1", "swarm", "join-token", "--rotate", "-q", "worker").strip()
        assert "token" in refusal(token)
        assert "192.168.249.9:2377" in refusal(rotated, "192.168.249.9:2377")
        assert stranger.rows("w1", "info")[0]["Swarm"]["LocalNodeState"] == "inactive"
        stranger.pyswarm("w1", "swarm", "join", "--token", rotated, address)
        wait_for(lambda: len(cluster.rows("m1", "node", "ls")) == 6, 20, "the stranger is a node now")
        stranger.pyswarm("w1", "swarm", "leave")
    wait_for(lambda: "Down" in {row["Status"] for row in cluster.rows("m1", "node", "ls")}, 20, "left")
    gone = next(row["ID"] for row in cluster.rows("m1", "node", "ls") if row["Status"] == "Down")
    cluster.pyswarm("m1", "node", "rm", gone)
    assert len(cluster.rows("m1", "node", "ls")) == 5
