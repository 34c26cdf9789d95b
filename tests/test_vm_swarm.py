"""A real swarm of two hosts, balancing by IPVS, on an encrypted network, in the virtual machine: `make test-vm`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest

from swarm.lab import hosts, lab
from tests.labs import Lab, keep_logs, lab_up, wait_for
from tests.test_vm_esp import SECRET, Capture, here

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(900),
    pytest.mark.skipif("PYSWARM_VM" not in os.environ, reason="runs inside the virtual machine: make test-vm"),
]


@pytest.fixture(scope="module")
def cluster(web_image: str, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """`web` on the encrypted network, one task on each of two hosts, published at 8000."""
    failed_before = request.session.testsfailed
    with lab_up("vm", 1, 1) as made:
        # In an emulated machine an agent takes half a minute to start: longer than it may by default before its tasks
        # are moved.
        made.pyswarm("m1", "swarm", "update", "--dispatcher-heartbeat", "60s")
        made.pyswarm("m1", "network", "create", "--opt", "encrypted", "--subnet", SECRET.subnet, "secret")
        command = ["--detach", "--replicas", "2", "--network", "secret", "--publish", "8000:80"]
        made.pyswarm("m1", "service", "create", *command, "--name", "web", web_image, timeout_s=300)
        wait_for(lambda: len({row["Node"] for row in made.running("web")}) == 2, 240, "a task on each host")
        yield made
        if request.session.testsfailed > failed_before:
            for path in keep_logs(made).iterdir():
                print(path.name, path.read_text()[-4000:])


def netns(cluster: Lab, host: str) -> str:
    (task,) = (row["ID"] for row in cluster.running("web") if row["Node"] == host)
    return str(cluster.host(host).run_dir / "netns" / f"task-{task}")


def address(namespace: str) -> str:
    argv = ("nsenter", f"--net={namespace}", "ip", "-4", "-o", "addr", "show", "eth0")
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout.split()[3].split("/")[0]


def test_ipvs_spreads_what_a_published_port_and_a_vip_receive(cluster: Lab) -> None:
    for host in cluster.hosts:
        assert "FWM" in cluster.run(host, "cat", "/proc/net/ip_vs")
        assert len({cluster.get(host, 8000, 30) for _ in range(4)}) == 2
    one = netns(cluster, "m1")
    (vip,) = json.loads(cluster.pyswarm("m1", "service", "inspect", "web"))[0]["Endpoint"]["VirtualIPs"]
    argv = ("nsenter", f"--net={one}", "curl", "-sS", "-m", "30", f"http://{vip['Addr'].partition('/')[0]}/")
    answers = {subprocess.run(argv, capture_output=True, check=True, timeout=60).stdout for _ in range(4)}
    assert len(answers) == 2


def test_keys_are_rotated_and_an_agent_is_killed_and_no_packet_is_lost_or_in_clear(cluster: Lab) -> None:
    one, other = netns(cluster, "m1"), netns(cluster, "w1")
    wait_for(lambda: ping(one, address(other)), 30, "the peers know each other's epoch")
    with Capture(here).running() as capture:
        argv = ["nsenter", f"--net={one}", "ping", "-i", "0.05", "-W", "5", address(other)]
        pings = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        for serial in (4, 5, 6, 7):
            said = cluster.pyswarm("m1", "network", "rotate-keys", timeout_s=300)
            assert f"Key {serial} was distributed" in said
        worker = cluster.host("w1")
        hosts.kill(hosts.daemon_pids(worker), signal.SIGKILL)
        lab.start(cluster.plan, worker)
        wait_for(lambda: "8 was distributed" in cluster.pyswarm("m1", "network", "rotate-keys"), 120, "a session again")
        pings.send_signal(signal.SIGINT)
        said, _ = pings.communicate(timeout=60)
    sent, received = map(int, re.findall(r"(\d+) packets transmitted, (\d+) received", said)[0])
    assert sent > 100
    assert received == sent
    assert sum(protocol == 50 for protocol, _ in capture.seen) > 2 * received
    assert not {vni for _, vni in capture.seen if vni}


def ping(namespace: str, target: str) -> bool:
    argv = ("nsenter", f"--net={namespace}", "ping", "-c", "1", "-W", "2", target)
    return subprocess.run(argv, capture_output=True, check=False, timeout=30).returncode == 0


def test_hosts_without_a_task_on_it_hold_no_key_any_more(cluster: Lab) -> None:
    def left(host: str) -> str:
        return cluster.run(host, "ip", "xfrm", "state") + cluster.run(host, "ip", "xfrm", "policy")

    assert left("w1")
    cluster.pyswarm("m1", "service", "rm", "web", timeout_s=300)
    for host in cluster.hosts:
        wait_for(lambda host=host: not left(host), 240, f"{host} has forgotten its keys")  # type: ignore[misc]
