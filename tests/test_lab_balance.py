"""Load balancing on a real lab of three hosts: what tasks see of their clients, whatever fails."""

from __future__ import annotations

import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.lab import hosts, lab
from tests.images import build_image, busybox_layer
from tests.labs import Lab, lab_up, wait_for
from tests.overlay_lab import Sockets

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

IMAGE = "pyswarm/who:1"
WHO = '#!/bin/sh\nprintf "Content-Type: text/plain\\r\\n\\r\\n"\necho "$(hostname) $REMOTE_ADDR"\n'


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One task of `who` on each of three hosts, published at 8000 (it tells its client's address, by HTTP) and 8081 (it
    repeats what it hears)."""
    archive = tmp_path_factory.mktemp("image") / "who.tar"
    serve = ["sh", "-c", "nc -ll -p 81 -e cat & exec httpd -f -p 80 -h /var/www"]
    build_image(archive, IMAGE, [busybox_layer({"var/www/cgi-bin/who": WHO})], {"Entrypoint": serve})
    lab.load_image(archive)
    with lab_up("balance", 1, 2) as made:
        ports = ["--publish", "8000:80", "--publish", "8081:81", "--publish", "8053:53/udp"]
        made.pyswarm("m1", "service", "create", "--name", "who", "--mode", "global", *ports, IMAGE)
        yield made


def ask(cluster: Lab, host: str, port: int = 8000) -> tuple[str, str]:
    """(task, address of this client as the task saw it)"""
    with socket.create_connection((cluster.host(host).address, port), timeout=5) as client:
        client.sendall(b"GET /cgi-bin/who HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    task, seen = answer.decode().split("\r\n\r\n", 1)[1].split()
    # busybox writes IPv4 addresses as those of an IPv6 socket.
    return task, seen.strip("[]").removeprefix("::ffff:")


def keeps_source(cluster: Lab, host: str, tasks: int) -> bool:
    """Whether that many tasks, on as many hosts, see this machine's own address through that host."""
    answers = {ask(cluster, host) for _ in range(2 * tasks)}
    assert {seen for _, seen in answers} == {cluster.plan.gateway}, answers
    return len(answers) == tasks


@pytest.mark.parametrize("host", ["m1", "w1", "w2"])
def test_tasks_see_the_clients_address_through_any_host(cluster: Lab, host: str) -> None:
    assert keeps_source(cluster, host, 3)


def test_tasks_see_the_address_of_clients_that_send_datagrams(cluster: Lab) -> None:
    """The servers are this test's own, in the tasks' namespaces."""
    sockets = Sockets()
    try:
        for row in cluster.running("who"):
            netns = cluster.host(row["Node"]).run_dir / "netns" / f"task-{row['ID']}"
            sockets.serve(netns, "0.0.0.0", 53, row["Node"], "udp")
        for host in cluster.hosts:
            answers = set()
            for _ in cluster.hosts:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                    client.settimeout(5)
                    client.sendto(b"?", (cluster.host(host).address, 8053))
                    answers.add(tuple(client.recv(4096).decode().split()))
            assert answers == {(name, cluster.plan.gateway) for name in cluster.hosts}
    finally:
        sockets.close()


def wait_for_shares(cluster: Lab, shares: list[int]) -> None:
    """Until, through every host, that many of as many requests meet each task, the busiest first."""

    def shared_out() -> bool:
        return all(
            sorted(Counter(ask(cluster, host)[0] for _ in range(sum(shares))).values(), reverse=True) == shares
            for host in cluster.hosts
        )

    wait_for(shared_out, 30, f"shares are {shares} through every host")


def test_weights_follow_a_label_of_the_nodes_and_sources_stay_with_one_task(cluster: Lab) -> None:
    cluster.pyswarm("m1", "node", "update", "--label-add", "capacity=3", "w1")
    cluster.pyswarm("m1", "service", "update", "--balance-weight", "node.labels.capacity", "who")
    wait_for_shares(cluster, [6, 2, 2])
    cluster.pyswarm("m1", "service", "update", "--balance", "source", "who")
    wait_for_shares(cluster, [6])
    assert len({ask(cluster, host)[0] for host in cluster.hosts}) == 1, "the same through every host"
    cluster.pyswarm("m1", "service", "update", "--balance", "round-robin", "--balance-weight", "", "who")
    wait_for_shares(cluster, [2, 2, 2])


def test_a_port_at_one_address_answers_there_only(cluster: Lab) -> None:
    address = cluster.host("w1").address
    cluster.pyswarm("m1", "service", "update", "--publish-add", f"{address}:8100:80", "who")
    wait_for(lambda: ask(cluster, "w1", 8100), 30, "it answers")
    with pytest.raises(ConnectionRefusedError):
        ask(cluster, "m1", 8100)
    cluster.pyswarm("m1", "service", "update", "--publish-rm", f"{address}:8100:80", "who")


def test_node_inspect_tells_how_the_node_balances(cluster: Lab) -> None:
    words = "{{.Description.Balancer}} {{.Description.AnswersThroughIngress}}"
    assert cluster.pyswarm("m1", "node", "inspect", "w1", "--format", words).strip() == "nftables true"
    assert "nftables" in cluster.pyswarm("m1", "node", "inspect", "--pretty", "w1")


def test_a_daemon_asked_for_a_balancer_that_the_kernel_lacks_ends_with_the_reason(cluster: Lab, tmp_path: Path) -> None:
    directories = ["--state-dir", str(tmp_path / "state"), "--run-dir", str(tmp_path / "run")]
    done = cluster.try_pyswarm("m1", "daemon", "--lb", "ipvs", *directories)
    assert done.returncode != 0
    assert "--lb ipvs: this kernel has no IPVS" in done.stderr


def test_connections_and_addresses_outlive_a_restart_of_every_daemon(cluster: Lab) -> None:
    client = socket.create_connection((cluster.host("w1").address, 8081), timeout=5)
    for name in cluster.hosts:
        hosts.kill(hosts.daemon_pids(cluster.host(name)), signal.SIGKILL)
    assert keeps_source(cluster, "w2", 3), "while no daemon runs"
    for name in cluster.hosts:
        lab.start(cluster.plan, cluster.host(name))
    wait_for(lambda: len(cluster.running("who")) == 3, 60, "all is adopted")
    client.sendall(b"still there?")
    assert client.recv(4096) == b"still there?"
    client.close()
    assert keeps_source(cluster, "m1", 3)


def test_a_host_that_dies_takes_only_its_own_task_along(cluster: Lab) -> None:
    hosts.pull_plug(cluster.host("w2"))
    wait_for(lambda: keeps_source(cluster, "w1", 2), 30, "the other two answer")
    lab.start(cluster.plan, cluster.host("w2"))
    wait_for(lambda: keeps_source(cluster, "w2", 3), 60, "and the third again")
