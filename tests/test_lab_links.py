"""What a task has of each kind of network, from the command line to packets: two hosts, real daemons."""

from __future__ import annotations

import ipaddress
import signal
from collections.abc import Iterator

import pytest

from swarm.lab import hosts, lab
from tests.labs import Lab, keep_logs, lab_up, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster(web_image: str, request: pytest.FixtureRequest) -> Iterator[Lab]:
    failed_before = request.session.testsfailed
    with lab_up("links", 1, 1) as made:
        yield made
        if request.session.testsfailed > failed_before:
            print(f"logs of the hosts: {keep_logs(made)}")


def create(cluster: Lab, name: str, *flags: str) -> None:
    cluster.pyswarm("m1", "service", "create", "--quiet", "--name", name, *flags, "pyswarm/web:1")


def on(cluster: Lab, host: str) -> tuple[str, ...]:
    return ("--constraint", f"node.hostname=={host}")


def execute(cluster: Lab, task: str, *argv: str) -> str:
    return cluster.pyswarm("m1", "service", "exec", task, *argv)


def remove(cluster: Lab, *names: str) -> None:
    cluster.pyswarm("m1", "service", "rm", *names)
    wait_for(lambda: not {row["Name"] for row in cluster.rows("m1", "service", "ls")} & {*names}, 60, "removed")


def test_tasks_on_the_hosts_network_are_the_host_and_clash_on_its_ports(cluster: Lab) -> None:
    create(cluster, "near", "--network", "host", "--env", "PORT=8123", *on(cluster, "w1"))
    assert cluster.get("w1", 8123).startswith("w1 on")  # the host's name as well
    assert cluster.host("w1").address in execute(cluster, "near.1", "ip", "addr")
    assert "127.0.0.11" not in execute(cluster, "near.1", "cat", "/etc/resolv.conf")
    flags = ("--detach", "--network", "host", "--env", "PORT=8123", "--restart-condition", "none")
    create(cluster, "clash", *flags, *on(cluster, "w1"))
    logs = ("service", "logs", "clash")
    wait_for(lambda: "Address already in use" in cluster.try_pyswarm("m1", *logs).stderr, 30, "its own error")
    assert cluster.get("w1", 8123)
    remove(cluster, "near", "clash")


def test_a_task_on_no_network_has_its_loopback_only(cluster: Lab) -> None:
    create(cluster, "alone", "--network", "none")
    assert execute(cluster, "alone.1", "ls", "/sys/class/net").split() == ["lo"]
    assert "127.0.0.1/8" in execute(cluster, "alone.1", "ip", "addr")
    remove(cluster, "alone")


def test_a_task_on_the_bridge_keeps_its_address_and_ports_when_agents_are_killed(cluster: Lab) -> None:
    port = "mode=host,target=80,published=8124"
    create(cluster, "bridged", "--network", "bridge", "--publish", port, *on(cluster, "w1"))
    body = wait_for(lambda: cluster.get("w1", 8124), 30, "the port answers")
    address = execute(cluster, "bridged.1", "ip", "-4", "addr", "show", "eth0")
    assert "172.17.0.2/16" in address
    assert "172.17.0.2" in execute(cluster, "bridged.1", "cat", "/etc/hosts")
    execute(cluster, "bridged.1", "ping", "-c", "1", "-W", "2", cluster.host("m1").address)
    for name in cluster.hosts:  # all: a manager would think that a host without an agent is dead
        hosts.kill(hosts.daemon_pids(cluster.host(name)), signal.SIGKILL)
    assert cluster.get("w1", 8124) == body
    for name in cluster.hosts:
        lab.start(cluster.plan, cluster.host(name))
    wait_for(lambda: execute(cluster, "bridged.1", "ip", "-4", "addr", "show", "eth0") == address, 30, "same address")
    assert cluster.get("w1", 8124) == body
    remove(cluster, "bridged")
    wait_for(lambda: "-0@" not in cluster.run("w1", "ip", "link"), 30, "the bridge is gone")


def test_a_macvlan_task_stands_in_the_lan_and_needs_its_parent(cluster: Lab) -> None:
    lan = ipaddress.ip_network(cluster.plan.subnet)
    flags = ("--driver", "macvlan", "--subnet", str(lan), "--gateway", cluster.plan.gateway)
    reserved = ("--ip-range", f"{lan[-32]}/28")
    cluster.pyswarm("m1", "network", "create", *flags, *reserved, "--opt", "parent=eth0", "lan")
    create(cluster, "inlan", "--network", "lan", *on(cluster, "w1"))
    words = execute(cluster, "inlan.1", "ip", "-4", "-o", "addr", "show", "eth0").split()
    address = words[words.index("inet") + 1].partition("/")[0]
    assert ipaddress.ip_address(address) in ipaddress.ip_network(reserved[1])
    # Another host of the LAN reaches it; the parent's own host does not (that is how macvlan is).
    assert cluster.run("m1", "busybox", "wget", "-q", "-O", "-", f"http://{address}/")
    remove(cluster, "inlan")

    cluster.pyswarm("m1", "network", "rm", "lan")
    cluster.pyswarm("m1", "network", "create", *flags, *reserved, "--opt", "parent=eth7", "nolan")
    create(cluster, "lost", "--detach", "--network", "nolan", *on(cluster, "w1"))

    def reason() -> bool:
        rows = cluster.rows("m1", "service", "ps", "--no-trunc", "lost")
        return any(
            row["CurrentState"].startswith("Rejected") and "this host has no link eth7" in row["Error"] for row in rows
        )

    wait_for(reason, 30, "the task is rejected with the reason")
    remove(cluster, "lost")
    cluster.pyswarm("m1", "network", "rm", "nolan")


def test_tasks_of_two_hosts_reach_each_other_by_ipv6(cluster: Lab) -> None:
    cluster.pyswarm("m1", "network", "create", "--ipv6", "dual")
    create(cluster, "six", "--mode", "global", "--network", "dual")
    tasks = {row["Node"]: row["ID"] for row in cluster.running("six")}
    addresses = {}
    for node, task in tasks.items():
        words = execute(cluster, task, "ip", "-6", "-o", "addr", "show", "eth0").split()
        addresses[node] = next(word.partition("/")[0] for word in words if word.startswith("fd"))
        assert addresses[node] in execute(cluster, task, "cat", "/etc/hosts")
    execute(cluster, tasks["m1"], "ping", "-6", "-c", "1", "-W", "2", addresses["w1"])
    execute(cluster, tasks["w1"], "ping", "-6", "-c", "1", "-W", "2", addresses["m1"])
    body = execute(cluster, tasks["m1"], "wget", "-q", "-O", "-", f"http://[{addresses['w1']}]/")
    assert body == execute(cluster, tasks["w1"], "cat", "/dev/shm/www/index.html")
    remove(cluster, "six")
    cluster.pyswarm("m1", "network", "rm", "dual")


def test_what_was_deleted_by_hand_is_back_within_five_seconds_and_said_so(cluster: Lab) -> None:
    create(cluster, "web", "--mode", "global", "--publish", "8125:80")
    wait_for(lambda: cluster.get("w1", 8125), 30, "the port answers")
    legs = [line.split()[1].partition("@")[0] for line in cluster.run("w1", "ip", "-o", "link").splitlines()]
    (leg,) = (name for name in legs if name.startswith("pys"))
    for command in (("ip", "link", "del", leg), ("nft", "flush", "ruleset")):
        cluster.run("w1", *command)
        wait_for(lambda: leg in cluster.run("w1", "ip", "link") and cluster.get("w1", 8125, 1), 15, "repaired")
    logs = "".join(path.read_text() for path in cluster.host("w1").state_dir.rglob("*.log"))
    assert logs.count("overlay_repaired") >= 2
    remove(cluster, "web")


def test_leaving_takes_every_link_namespace_and_rule_away(cluster: Lab) -> None:
    create(cluster, "web", "--mode", "global", "--network", "bridge")
    where = cluster.host("w1")
    assert "pys" in cluster.run("w1", "ip", "link")
    cluster.pyswarm("w1", "swarm", "leave")
    state = "{{.Swarm.LocalNodeState}}"
    wait_for(lambda: cluster.pyswarm("w1", "info", "--format", state).strip() == "inactive", 60, "left")
    assert "pys" not in cluster.run("w1", "ip", "link")
    assert "pyswarm" not in cluster.run("w1", "nft", "list", "tables")
    assert not list(where.run_dir.glob("netns/*"))
