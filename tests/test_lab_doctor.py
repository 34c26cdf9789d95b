"""`network doctor` on three real hosts: healthy as they are; broken in one way at a time, it names that one and how to
mend it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overlay import nfnl, rtnl
from overlay.addressing import host_table, network_namespace
from overlay.diff import VXLAN_NAME
from overlay.namespaces import NamespaceThread
from overlay.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Netlink, acknowledged
from swarm.daemon import TAG_CHARS
from swarm.lab import hosts, lab
from tests.labs import Lab, keep_logs, lab_up, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

BREAK_EVERY_S = 0.002
"""The daemon repairs what is broken for good within seconds: these are broken anew at once."""


@pytest.fixture(scope="module")
def cluster(web_image: str, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A manager and two workers, with `web`: four tasks on `net`, published at 8000."""
    failed_before = request.session.testsfailed
    with lab_up("doctor", 1, 2) as made:
        made.pyswarm("m1", "network", "create", "--ipv6", "--opt", "com.docker.network.driver.mtu=1450", "net")
        create = ["service", "create", "--name", "web", "--network", "net", "--restart-delay", "200ms"]
        made.pyswarm("m1", *create, "--replicas", "4", "--publish", "8000:80", web_image)
        yield made
        if request.session.testsfailed > failed_before:
            print(f"logs of the hosts: {keep_logs(made)}")


@pytest.fixture(autouse=True)
def whole(cluster: Lab) -> Iterator[None]:
    """What a test breaks, it mends: the next begins with healthy networks."""
    yield
    wait_for(lambda: not broken(examined(cluster)), 60, "healthy")


def examined(cluster: Lab, *service: str) -> dict[str, Any]:
    done = cluster.try_pyswarm("m1", "network", "doctor", "--format", "json", *service)
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == bool(broken(found)), done.stdout
    return found


def broken(report: dict[str, Any]) -> list[dict[str, str]]:
    return [each for each in report["diagnoses"] if each["severity"] == "BROKEN"]


def the_one(report: dict[str, Any]) -> dict[str, str]:
    """The only thing broken: consequences are not told beside their cause."""
    assert len(broken(report)) == 1, json.dumps(report, indent=1)
    return broken(report)[0]


def nft(cluster: Lab, host: str, text: str) -> None:
    done = cluster.try_run(host, "nft", "-f", "-", text=text)
    assert not done.returncode, done.stderr


@contextlib.contextmanager
def guard(cluster: Lab, host: str, chain: str) -> Iterator[None]:
    """A firewall that somebody else put on the host."""
    nft(cluster, host, f"table inet guard {{\n{chain}\n}}\n")
    try:
        yield
    finally:
        nft(cluster, host, "table inet guard\ndelete table inet guard\n")


@contextlib.contextmanager
def again_and_again(action: Callable[[], object]) -> Iterator[None]:
    """Another hand on the host that does it whenever pyswarm has undone it."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(BREAK_EVERY_S):
            action()

    action()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def inside(path: Path, protocol: int) -> Iterator[Netlink]:
    """A netlink socket in that namespace."""
    thread = NamespaceThread(path)
    try:
        with asyncio.run(thread.run(lambda: Netlink(protocol))) as netlink:
            yield netlink
    finally:
        thread.close()


def node_id(cluster: Lab, host: str) -> str:
    return str(json.loads(cluster.pyswarm("m1", "node", "inspect", host))[0]["ID"])


def test_healthy_networks_pass_every_kind_of_check(cluster: Lab) -> None:
    report = examined(cluster)
    assert not broken(report)
    assert {each["name"]: each["failed"] for each in report["checks"]} == dict.fromkeys(
        (
            "host",
            "underlay",
            "path MTU",
            "overlay",
            "full packets",
            "TCP on overlay",
            "way out",
            "names",
            "tasks listen",
            "virtual IP",
            "published port",
        ),
        0,
    )
    assert all(each["passed"] and not each["unknown"] for each in report["checks"])
    assert cluster.pyswarm("m1", "network", "doctor", "web").splitlines()[-1] == "healthy"


def test_a_service_that_does_not_exist_is_one_clear_error(cluster: Lab) -> None:
    done = cluster.try_pyswarm("m1", "network", "doctor", "nobody")
    assert done.returncode == 1
    assert "nobody" in done.stderr
    assert done.stdout == ""


def test_a_rule_that_drops_vxlan_is_named_and_its_remedy_mends(cluster: Lab) -> None:
    match = f"ip saddr {cluster.host('w1').address} udp dport 4789"
    rule = f"chain input {{ type filter hook input priority 0; {match} drop; }}"
    with guard(cluster, "w2", rule):
        found = the_one(examined(cluster))
        assert found["subject"] == "w1 - w2"
        assert "VXLAN" in found["what"]
        assert "on w2, chain input of table inet guard drops them: ip saddr" in found["why"]
        remedy = found["remedy"].removeprefix("on w2: ").partition(",")[0]
        assert remedy.startswith("nft delete rule inet guard input handle ")
        cluster.run("w2", *remedy.split())
        assert not broken(examined(cluster))


def test_a_smaller_mtu_on_one_host_is_measured(cluster: Lab) -> None:
    cluster.run("w1", "ip", "link", "set", "eth0", "mtu", "1400")
    try:
        # The connection to the manager may have been made for larger packets: it breaks first, and is made anew.
        found = wait_for(lambda: while_all_answer(examined(cluster, "web")), 60, "all nodes answer")
        assert {each["subject"] for each in found} == {"m1 - w1", "w1 - w2"}, found
        for each in found:
            assert each["what"] == "packets of more than 1400 bytes do not pass; a full one of the overlays has 1500"
            assert each["why"] == "eth0 of w1 has an MTU of 1400"
            assert "com.docker.network.driver.mtu=1350" in each["remedy"]
    finally:
        cluster.run("w1", "ip", "link", "set", "eth0", "mtu", "1500")


def while_all_answer(report: dict[str, Any]) -> list[dict[str, str]]:
    found = broken(report)
    return [] if any(each["what"] == "the node does not answer" for each in found) else found


def test_a_forwarding_entry_that_somebody_deletes_is_named(cluster: Lab) -> None:
    network = json.loads(cluster.pyswarm("m1", "network", "inspect", "net"))[0]["Id"]
    namespace = cluster.host("w1").run_dir / "netns" / network_namespace(network)
    vtep = cluster.host("w2").address
    with inside(namespace, NETLINK_ROUTE) as netlink:
        index = rtnl.link_index(netlink, VXLAN_NAME)
        mac = next(entry.mac for entry in rtnl.forwardings(netlink) if entry.vtep == vtep)
        with again_and_again(lambda: netlink.batch(acknowledged(rtnl.delete_forwarding(index, mac)))):
            found = the_one(examined(cluster, "web"))
    assert found["subject"] == "w1"
    assert f"missing: forwarding entry {mac} to {vtep}" in found["why"]
    assert "network net" in found["what"]


def test_a_flushed_nftables_table_is_named(cluster: Lab) -> None:
    table = host_table(node_id(cluster, "w1")[:TAG_CHARS])
    with (
        inside(cluster.host("w1").netns_path, NETLINK_NETFILTER) as netlink,
        again_and_again(lambda: netlink.transaction(nfnl.transaction([nfnl.delete_table(socket.AF_INET, table)]))),
    ):
        found = the_one(examined(cluster))
    assert found["subject"] == "w1"
    assert "nftables tables of pyswarm of the host are missing" in found["what"]
    assert "nft flush ruleset" in found["remedy"]


def test_forwarding_that_is_off_is_named(cluster: Lab) -> None:
    thread = NamespaceThread(cluster.host("w2").netns_path)
    setting = asyncio.run(thread.run(lambda: os.open("/proc/sys/net/ipv4/ip_forward", os.O_WRONLY)))
    try:
        with again_and_again(lambda: os.pwrite(setting, b"0", 0)):
            found = the_one(examined(cluster))
    finally:
        os.close(setting)
        thread.close()
    assert (found["subject"], found["what"]) == ("w2", "forwarding is off (net.ipv4.ip_forward=0)")
    assert "sysctl -w net.ipv4.ip_forward=1" in found["remedy"]


def test_a_foreign_policy_of_dropping_what_is_forwarded_is_named(cluster: Lab) -> None:
    with guard(cluster, "w1", "chain through { type filter hook forward priority 0; policy drop; }"):
        report = examined(cluster)
    way_out = next(each for each in broken(report) if each["what"] == "its tasks do not get out of the host")
    assert way_out["subject"] == "w1"
    assert "on w1, chain through of table inet guard drops them: policy drop" in way_out["why"]
    assert {each["subject"] for each in broken(report)} <= {"w1", "web"}


def test_a_frozen_name_server_is_named_and_its_remedy_mends(cluster: Lab) -> None:
    pid = json.loads(cluster.pyswarm("w1", "info", "--format", "json"))["Processes"]["NameServer"]
    hosts.kill([pid], signal.SIGSTOP)
    try:
        found = the_one(examined(cluster, "web"))
    finally:
        hosts.kill([pid], signal.SIGKILL)
    assert found["subject"] == "w1"
    assert found["what"] == f"its name server (process {pid}) does not answer"
    assert found["remedy"].startswith(f"on w1: kill -9 {pid};")


def test_tasks_that_do_not_listen_are_named(cluster: Lab, web_image: str) -> None:
    cluster.pyswarm("m1", "service", "create", "--name", "deaf", "--replicas", "2", "--publish", "9000:81", web_image)
    try:
        found = the_one(examined(cluster, "deaf"))
    finally:
        cluster.pyswarm("m1", "service", "rm", "deaf")
    assert found["subject"] == "deaf"
    assert found["what"] == "deaf.1, deaf.2: nothing listens at tcp 81"
    assert "listen on 0.0.0.0:81" in found["remedy"]


def test_a_program_on_a_published_port_is_a_warning(cluster: Lab) -> None:
    program_text = "import socket, sys; s = socket.create_server(('', 8000)); sys.stdin.read()"
    argv = [*hosts.entering(cluster.host("w2")), "python3", "-c", program_text]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as program:
        try:
            found = wait_for(lambda: shadowed(examined(cluster)), 20, "the program is seen")
        finally:
            program.communicate(b"", timeout=10)
    assert found["subject"] == "w2"
    assert f"python3 (process {program.pid}) listens at 0.0.0.0, tcp 8000" in found["what"]


def shadowed(report: dict[str, Any]) -> dict[str, str] | None:
    return next((each for each in report["diagnoses"] if "listens at" in each["what"]), None)


def test_a_node_that_is_cut_off_is_one_finding_and_no_hang(cluster: Lab) -> None:
    rest = [cluster.host("m1"), cluster.host("w1")]
    lab.partition(cluster.plan, [[cluster.host("w2")], rest])
    try:
        wait_for(lambda: "Down" in {row["Status"] for row in cluster.rows("m1", "node", "ls")}, 20, "w2 is down")
        wait_for(lambda: len(cluster.running("web")) == 4, 30, "its tasks run elsewhere")
        found = the_one(examined(cluster))
    finally:
        lab.heal(cluster.plan)
    assert (found["subject"], found["what"]) == ("w2", "the node does not answer")
    assert "it is not connected to the leader" in found["why"]
    assert "does not answer m1 and w1 either" in found["why"]
    assert "table ip pyl_partition" in found["why"]
    wait_for(lambda: all(row["Status"] == "Ready" for row in cluster.rows("m1", "node", "ls")), 30, "all ready")
