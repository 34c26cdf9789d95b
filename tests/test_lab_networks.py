"""Networks from the command line to the state that survives: two hosts, real daemons."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm.consensus.interface import Member
from swarm.consensus.recover import meta_of, read_backup
from swarm.consensus.snapshot import encode
from swarm.lab import hosts
from swarm.store.changes import copy_of
from swarm.store.store import Store
from tests.labs import Lab, keep_logs, lab_up, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster(web_image: str, request: pytest.FixtureRequest) -> Iterator[Lab]:
    failed_before = request.session.testsfailed
    with lab_up("networks", 1, 1) as made:
        yield made
        if request.session.testsfailed > failed_before:
            print(f"logs of the hosts: {keep_logs(made)}")


@pytest.fixture(autouse=True)
def no_services_left(cluster: Lab) -> Iterator[None]:
    yield
    if names := [row["Name"] for row in cluster.rows("m1", "service", "ls")]:
        remove(cluster, *names)


def create(cluster: Lab, name: str, *flags: str) -> None:
    flags = (*flags, "--restart-delay", "200ms") if "--restart-delay" not in flags else flags
    cluster.pyswarm("m1", "service", "create", "--quiet", "--name", name, *flags, "pyswarm/web:1")


def remove(cluster: Lab, *names: str) -> None:
    cluster.pyswarm("m1", "service", "rm", *names)
    wait_for(lambda: not {row["Name"] for row in cluster.rows("m1", "service", "ls")} & {*names}, 60, "removed")


def inspect(cluster: Lab, kind: str, ref: str, *flags: str, host: str = "m1") -> dict[str, Any]:
    (found,) = json.loads(cluster.pyswarm(host, kind, "inspect", *flags, ref))
    assert isinstance(found, dict)
    return found


def refusal(cluster: Lab, *argv: str) -> str:
    done = cluster.try_pyswarm("m1", *argv)
    assert done.returncode == 1, done.stdout
    assert done.stderr.count("Error: ") == 1, done.stderr
    return done.stderr


def leases(cluster: Lab, network: str) -> dict[str, str]:
    """Task -> address on the network, of tasks that run."""
    services = inspect(cluster, "network", network, "--verbose").get("Services", {})
    return {task["Name"]: task["EndpointIP"] for each in services.values() for task in each["Tasks"]}


def inside(cluster: Lab, row: dict[str, Any], *argv: str) -> str:
    """Run a command in the network namespace of a task."""
    netns = cluster.host(row["Node"]).run_dir / "netns" / f"task-{row['ID']}"
    argv = ("timeout", "5", "nsenter", f"--net={netns}", *argv)
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30).stdout


def six_of(network: dict[str, Any]) -> list[str]:
    """The IPv6 addresses of the tasks on a network that was inspected with --verbose."""
    return [task["EndpointIPv6"] for each in network["Services"].values() for task in each["Tasks"]]


def vip_of(cluster: Lab, service: str, host: str = "m1") -> str:
    (vip,) = inspect(cluster, "service", service, host=host)["Endpoint"]["VirtualIPs"]
    return str(vip["Addr"]).partition("/")[0]


def test_the_nodes_own_networks_are_there_and_stay(cluster: Lab) -> None:
    rows = cluster.rows("m1", "network", "ls")
    shown = [(row["Name"], row["Driver"], row["Scope"]) for row in rows]
    assert shown == [
        ("bridge", "bridge", "local"),
        ("host", "host", "local"),
        ("ingress", "overlay", "swarm"),
        ("none", "null", "local"),
    ]
    for name in ("bridge", "host", "none"):
        assert "predefined" in refusal(cluster, "network", "rm", name)
        assert "predefined" in refusal(cluster, "network", "create", name)
    ingress = refusal(cluster, "service", "create", "--network", "host", "-p", "8000:80", "pyswarm/web:1")
    assert "publish it with mode=host" in ingress
    assert "excludes every other" in refusal(
        cluster, "service", "create", "--network", "none", "--network", "bridge", "pyswarm/web:1"
    )


def test_a_dual_stack_network_and_what_is_on_it(cluster: Lab) -> None:
    made = cluster.try_pyswarm("m1", "network", "create", "--ipv6", "--attachable", "--subnet", "10.5.0.0/24", "dual")
    assert "--attachable has no effect" in made.stderr
    network = inspect(cluster, "network", "dual")
    four, six = network["IPAM"]["Config"]
    assert four == {"Subnet": "10.5.0.0/24", "Gateway": "10.5.0.1"}
    assert six["Subnet"].startswith("fd")
    assert six["Gateway"] == six["Subnet"].replace("::/64", "::1")
    assert (network["EnableIPv6"], network["Attachable"]) == (True, True)
    create(
        cluster, "web", "--replicas", "2", "--network", "name=dual,alias=www", "-p", "8000:80", "--balance", "source"
    )
    service = inspect(cluster, "service", "web")
    (vip,) = service["Endpoint"]["VirtualIPs"]
    vip6 = vip["Addr6"].partition("/")[0]
    assert vip6 == six["Gateway"].replace("::1", "::2")
    assert service["Spec"]["EndpointSpec"]["Balance"] == "source"
    assert service["Endpoint"]["ClientAddresses"] == "kept" or "masqueraded" in service["Endpoint"]["ClientAddresses"]
    wait_for(lambda: len(leases(cluster, "dual")) == 2, 30, "both tasks are on the network")
    shown = inspect(cluster, "network", "dual", "-v")
    assert {peer["Name"] for peer in shown["Peers"]} == {"m1", "w1"}
    assert {task["EndpointIPv6"] for task in shown["Services"]["web"]["Tasks"]} == {
        six["Gateway"].replace("::1", f"::{number}") for number in (3, 4)
    }
    for row in cluster.running("web"):
        answers = {inside(cluster, row, "curl", "-sg", f"http://[{task}]/") for task in six_of(shown)}
        assert len(answers) == 2, answers
        assert inside(cluster, row, "curl", "-sg", f"http://[{vip['Addr6'].partition('/')[0]}]/") in answers
    assert "in use by service web" in refusal(cluster, "network", "rm", "dual")
    assert "overlaps 10.5.0.0/24 of network dual" in refusal(
        cluster, "network", "create", "--subnet", "10.5.0.128/25", "other"
    )


def test_services_run_on_the_nodes_own_networks(cluster: Lab) -> None:
    create(cluster, "host", "--mode", "global", "--network", "host")
    create(cluster, "none", "--network", "none")
    create(cluster, "nat", "--network", "bridge", "-p", "published=8200,target=80,mode=host")
    for name in ("host", "none", "nat"):
        wait_for(lambda name=name: cluster.running(name), 30, f"{name} runs")  # type: ignore[misc]
    for host in cluster.hosts:
        wait_for(lambda host=host: cluster.get(host, 80), 30, f"port 80 of {host} itself answers")  # type: ignore[misc]
    (row,) = cluster.running("nat")
    wait_for(lambda: cluster.get(row["Node"], 8200), 30, "the port of the bridge's task answers")
    (row,) = cluster.running("none")
    assert {line.split()[1] for line in inside(cluster, row, "ip", "-o", "addr").splitlines()} <= {"lo"}


def test_a_full_network_says_so_on_the_task_and_in_explain(cluster: Lab) -> None:
    cluster.pyswarm("m1", "network", "create", "--subnet", "10.6.0.0/29", "--aux-address", "r=10.6.0.6", "tiny")
    create(cluster, "many", "--detach", "--replicas", "5", "--network", "tiny")
    why = "no free address in 10.6.0.0/29 of network tiny (4 in use): scale down or remove services on it"

    def said() -> bool:
        rows = cluster.rows("m1", "service", "ps", "--no-trunc", "many")
        return sum(why in row["Error"] for row in rows) == 2

    wait_for(said, 30, "two tasks have no address")
    assert why in cluster.pyswarm("m1", "explain", "many")
    assert "10.6.0.6" not in leases(cluster, "tiny").values()


def test_ports_on_different_addresses_of_the_hosts_do_not_meet(cluster: Lab) -> None:
    address = cluster.host("w1").address
    create(cluster, "one", "--detach", "-p", f"{address}:8100:80")
    assert "port '8100' is already in use by service 'one'" in refusal(
        cluster, "service", "create", "-p", "8100:80", "pyswarm/web:1"
    )
    made = cluster.try_pyswarm(
        "m1", "service", "create", "--detach", "--name", "two", "-p", "192.0.2.77:8100:80", "pyswarm/web:1"
    )
    assert "no node has the address 192.0.2.77" in made.stderr
    ports = {row["Name"]: row["Ports"] for row in cluster.rows("m1", "service", "ls")}
    assert ports == {"one": f"{address}:8100->80/tcp", "two": "192.0.2.77:8100->80/tcp"}


def test_addresses_and_vnis_that_were_given_back_come_last_also_after_a_manager_was_killed(cluster: Lab) -> None:
    cluster.pyswarm("m1", "network", "create", "--subnet", "10.7.0.0/27", "turns")
    create(cluster, "old", "--replicas", "3", "--network", "turns")
    wait_for(lambda: len(leases(cluster, "turns")) == 3, 30, "three tasks run")
    before = {
        *leases(cluster, "turns").values(),
        inspect(cluster, "service", "old")["Endpoint"]["VirtualIPs"][0]["Addr"],
    }
    cluster.pyswarm("m1", "network", "create", "gone")
    option = "com.docker.network.driver.overlay.vxlanid_list"
    vni = int(inspect(cluster, "network", "gone")["Options"][option])
    cluster.pyswarm("m1", "network", "rm", "gone")
    remove(cluster, "old")
    pid = int(cluster.pyswarm("m1", "info", "--format", "{{.Processes.Manager}}"))
    hosts.kill([pid], signal.SIGKILL)
    wait_for(lambda: cluster.rows("m1", "node", "ls"), 30, "the manager is back")
    cluster.pyswarm("m1", "network", "create", "new")
    assert int(inspect(cluster, "network", "new")["Options"][option]) == vni + 1
    create(cluster, "young", "--replicas", "3", "--network", "turns")
    wait_for(lambda: len(leases(cluster, "turns")) == 3, 30, "three tasks run")
    after = {
        *leases(cluster, "turns").values(),
        inspect(cluster, "service", "young")["Endpoint"]["VirtualIPs"][0]["Addr"],
    }
    assert before.isdisjoint(after)


def test_the_ingress_network_is_made_anew_with_another_subnet(cluster: Lab) -> None:
    create(cluster, "web", "-p", "8000:80")
    assert "by service web, which publishes ports" in refusal(cluster, "network", "rm", "--force", "ingress")
    remove(cluster, "web")
    cluster.pyswarm("m1", "network", "rm", "--force", "ingress")
    assert "network create --ingress" in refusal(cluster, "service", "create", "-p", "8000:80", "pyswarm/web:1")
    cluster.pyswarm("m1", "network", "create", "--ingress", "--subnet", "10.20.0.0/20", "edge")
    create(cluster, "web", "--replicas", "2", "-p", "8000:80")
    for host in cluster.hosts:
        wait_for(lambda host=host: cluster.get(host, 8000), 30, f"{host} answers")  # type: ignore[misc]
    assert {peer["Name"] for peer in inspect(cluster, "network", "edge")["Peers"]} == {"m1", "w1"}


def test_prune_leaves_what_services_use(cluster: Lab) -> None:
    cluster.pyswarm("m1", "network", "create", "used")
    create(cluster, "web", "--detach", "--network", "used")
    dangling = {row["Name"] for row in cluster.rows("m1", "network", "ls", "--filter", "dangling=true")}
    pruned = cluster.pyswarm("m1", "network", "prune", "--force").splitlines()
    assert (pruned[0], {*pruned[1:]}) == ("Deleted Networks:", dangling)
    assert "used" not in dangling
    left = [row["Name"] for row in cluster.rows("m1", "network", "ls")]
    assert left == ["bridge", "edge", "host", "none", "used"]


def test_a_restored_state_gains_what_it_lacks_and_loses_what_is_there_twice(cluster: Lab, tmp_path: Path) -> None:
    for name in ("first", "second"):
        create(cluster, name, "--detach", "--replicas", "0", "--network", "used")
    good, bad = tmp_path / "good", tmp_path / "bad"
    cluster.pyswarm("m1", "swarm", "backup", str(good))
    store = Store()
    store.load(read_backup(good))
    first, second = (store.services.by_name(name) for name in ("first", "second"))
    assert first is not None
    assert second is not None
    twice = copy_of(second)
    twice.endpoint.virtual_ips[0].address = first.endpoint.virtual_ips[0].address
    store.services.put(twice)
    for name in ("bridge", "host", "none"):  # as a state of an older version
        network = store.networks.by_name(name)
        assert network is not None
        store.networks.discard(network.id)
    members = [Member("m1", f"{cluster.host('m1').address}:2378")]
    bad.write_bytes(b"".join(encode(meta_of(100, 5, members), store.dump())))

    cluster.pyswarm("w1", "swarm", "leave")
    wait_for(
        lambda: cluster.pyswarm("w1", "info", "--format", "{{.Swarm.LocalNodeState}}").strip() == "inactive", 30, "left"
    )
    cluster.pyswarm("w1", "swarm", "restore", "--advertise-addr", cluster.host("w1").address, str(bad))

    kept = first.endpoint.virtual_ips[0].address
    wait_for(lambda: vip_of(cluster, "second", "w1") not in kept, 30, "each has a virtual IP of its own")
    assert vip_of(cluster, "first", "w1") == kept.partition("/")[0]
    assert {"bridge", "host", "none"} <= {row["Name"] for row in cluster.rows("w1", "network", "ls")}
    log = (cluster.host("w1").state_dir / "manager.log").read_text()
    assert f"service second: address {kept} is also service first's: given another" in log
