"""Names as applications in real containers see them (glibc's getent, busybox's nslookup) on a lab of two hosts: every
kind of name, no question that leaks, changes, and the deaths of agent and name server."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dnslib import RCODE, RR, A, DNSRecord

from swarm.lab import hosts, lab
from tests.images import build_image, busybox_layer, layer
from tests.labs import Lab, keep_logs, lab_up, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

IMAGE = "pyswarm/getent:1"
BACK_WITHIN_S = 10.0
"""For a name server that was killed; it takes a fraction of a second, on a machine that has nothing else to do."""


def load_getent_image(directory: Path) -> None:
    """Busybox, and the machine's own getent with its libraries: the resolver that most images have."""
    getent = shutil.which("getent") or ""
    listed = subprocess.run(["ldd", getent], capture_output=True, text=True, check=True, timeout=10).stdout
    paths = [getent, *re.findall(r"(/\S+\.so\S*)", listed)]
    files = {path.lstrip("/"): (Path(path).read_bytes(), 0o755) for path in paths}
    files["etc/nsswitch.conf"] = (b"hosts: files dns\n", 0o644)
    archive = directory / "getent.tar"
    build_image(archive, IMAGE, [busybox_layer(), layer(files, {})], {"Cmd": ["/bin/sleep", "100000"]})
    lab.load_image(archive)


class Outside:
    """A resolver outside of the swarm that knows `outside.example` and remembers what it was asked."""

    def __init__(self, address: str) -> None:
        self.asked: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 53))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            packet, client = self._socket.recvfrom(4096)
            if not packet:
                return
            request = DNSRecord.parse(packet)
            name = str(request.q.qname).rstrip(".").lower()
            self.asked.append(name)
            reply = request.reply()
            if name != "outside.example":
                reply.header.rcode = RCODE.NXDOMAIN
            elif request.q.qtype == 1:
                reply.add_answer(RR(request.q.qname, rdata=A("192.0.2.7")))
            self._socket.sendto(reply.pack(), client)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stopper:
            stopper.sendto(b"", self._socket.getsockname())
        self._thread.join(10)
        self._socket.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Lab]:
    load_getent_image(tmp_path_factory.mktemp("image"))
    failed_before = request.session.testsfailed
    with lab_up("names", 1, 1) as made:
        made.pyswarm("m1", "network", "create", "front")
        made.pyswarm("m1", "network", "create", "--internal", "back")
        made.pyswarm(
            "m1", "service", "create", "--quiet", "--name", "web", "--replicas", "2", "--stop-signal", "KILL",
            "--network", "name=front,alias=blog", "--publish", "8000:80", IMAGE,
        )  # fmt: skip
        yield made
        if request.session.testsfailed > failed_before:
            print(f"logs of the hosts: {keep_logs(made)}")


@pytest.fixture(scope="module")
def outside(cluster: Lab) -> Iterator[Outside]:
    made = Outside(cluster.plan.gateway)
    yield made
    made.close()


@contextmanager
def service(cluster: Lab, name: str, *options: str) -> Iterator[None]:
    cluster.pyswarm("m1", "service", "create", "--quiet", "--name", name, "--stop-signal", "KILL", *options, IMAGE)
    try:
        yield
    finally:
        cluster.pyswarm("m1", "service", "rm", name)


def run(cluster: Lab, task: str, *argv: str) -> str:
    """The output of a command in a container, whether it fails or not."""
    return cluster.try_pyswarm("m1", "service", "exec", task, *argv).stdout


def addresses(cluster: Lab, task: str, *names: str) -> list[set[str]]:
    """What getent finds for each name, asked in one go in the task's container."""
    script = 'for name; do echo "= $name"; getent ahostsv4 "$name"; done'
    found = run(cluster, task, "sh", "-c", script, "sh", *names).split("= ")[1:]
    return [{line.split()[0] for line in part.splitlines()[1:]} for part in found]


def own_address(cluster: Lab, task: str) -> str:
    return run(cluster, task, "ip", "-4", "-o", "addr", "show", "eth0").split()[3].partition("/")[0]


def netns(cluster: Lab, row: dict[str, str]) -> str:
    return str(cluster.host(row["Node"]).run_dir / "netns" / f"task-{row['ID']}")


def test_every_kind_of_name_resolves_in_a_container(cluster: Lab) -> None:
    one, two = (own_address(cluster, f"web.{slot}") for slot in (1, 2))
    with service(cluster, "rr", "--endpoint-mode", "dnsrr", "--replicas", "2", "--network", "front"):
        every = {own_address(cluster, f"rr.{slot}") for slot in (1, 2)}
        (row,) = [each for each in cluster.running("web") if each["Name"].endswith(".1")]
        (vip,) = addresses(cluster, "rr.1", "web")[0]
        assert vip not in {one, two}
        wanted = {
            "WEB": {vip},
            "blog": {vip},
            "web.front": {vip},
            "tasks.web": {one, two},
            "tasks.web.front": {one, two},
            "web.1": {one},
            "2.web": {two},
            f"web.1.{row['ID']}": {one},
            row["ID"][:12]: {one},
            "rr": every,
            "tasks.rr": every,
            "web.back": set(),
        }
        assert dict(zip(wanted, addresses(cluster, "rr.2", *wanted), strict=True)) == wanted
        pointers = run(cluster, "rr.1", "sh", "-c", f"getent hosts {one}; nslookup {vip}")
        assert f"web.1.{row['ID']}.front" in pointers
        assert "web.front" in pointers
        argv = ["nsenter", f"--net={netns(cluster, row)}", "dig", "+short", "@127.0.0.11", "SRV", "_80._tcp.web"]
        assert (
            subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout == "0 1 80 web.front.\n"
        )


def test_only_what_is_not_ours_leaves_and_nothing_from_internal_networks(cluster: Lab, outside: Outside) -> None:
    resolver = ("--dns", cluster.plan.gateway)
    searching = (*resolver, "--dns-search", "corp.example", "--dns-option", "ndots:3")
    with (
        service(cluster, "open", "--network", "front", *searching),
        service(cluster, "inner", "--network", "back", *resolver),
        service(cluster, "both", "--network", "front", "--network", "back", *resolver),
    ):
        assert run(cluster, "open", "cat", "/etc/resolv.conf").splitlines() == [
            "search corp.example",
            "nameserver 127.0.0.11",
            "options ndots:3",
        ]
        for task in ("open", "both"):
            assert all(addresses(cluster, task, "web", "tasks.web", "web.front", "web.1")), task
        assert all(addresses(cluster, "both", "inner", "inner.back"))
        assert not any(addresses(cluster, "inner", "outside.example", "nobody", "web"))
        assert outside.asked == []
        assert addresses(cluster, "open", "outside.example") == [{"192.0.2.7"}]
        assert set(outside.asked) == {"outside.example", "outside.example.corp.example"}
        assert addresses(cluster, "both", "outside.example") == [{"192.0.2.7"}]


def test_names_follow_the_tasks(cluster: Lab) -> None:
    cluster.pyswarm("m1", "service", "scale", "web=3")
    assert len(addresses(cluster, "web.1", "tasks.web")[0]) == 3, "when the command returns, every host knows"
    cluster.pyswarm("m1", "service", "scale", "web=2")
    wait_for(lambda: len(addresses(cluster, "web.1", "tasks.web")[0]) == 2, 20, "the third is gone")


def name_server_pids(cluster: Lab, host: str) -> list[int]:
    pids = hosts.host_pids(cluster.host(host))
    return [pid for pid in pids if b"dns.server" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_names_are_back_after_the_name_server_s_death_and_go_on_without_the_agent(cluster: Lab) -> None:
    row = next(each for each in cluster.running("web") if each["Node"] == "w1")
    argv = ["nsenter", f"--net={netns(cluster, row)}", "dig", "+short", "+tries=1", "+time=1", "@127.0.0.11", "web"]

    def answer() -> str:
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30).stdout

    before = answer()
    assert re.fullmatch(r"[\d.]+\n", before)
    killed = name_server_pids(cluster, "w1")
    hosts.kill(killed, signal.SIGKILL)
    wait_for(lambda: answer() == before, BACK_WITHIN_S, "names are back")
    (server,) = name_server_pids(cluster, "w1")
    assert [server] != killed
    hosts.kill(hosts.daemon_pids(cluster.host("w1")), signal.SIGKILL)
    assert answer() == before
    lab.start(cluster.plan, cluster.host("w1"))
    wait_for(lambda: "Ready" in cluster.pyswarm("m1", "node", "ls"), 60, "the agent is back")
    assert name_server_pids(cluster, "w1") == [server]
