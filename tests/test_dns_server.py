"""The server as a process: real namespaces, real sockets, dig, UDP and TCP, forwarding, death and restart."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from dnslib import DNSRecord

from dns.client import NameServerProcess
from dns.interface import (
    LISTEN_ADDRESS,
    LISTEN_PORT,
    DnsError,
    NetworkNames,
    Picture,
    Sandbox,
    ServiceNames,
    TaskNames,
)
from tests.overlay_lab import NET, OverlayLab
from tests.test_dns_forward import known, upstream
from tests.waiting import until

pytestmark = pytest.mark.root

NETNS = f"pydnst-{os.getpid()}"
PATH = f"/run/netns/{NETNS}"


def make_netns() -> None:
    subprocess.run(["ip", "netns", "add", NETNS], check=True)
    subprocess.run(["ip", "-n", NETNS, "link", "set", "lo", "up"], check=True)


def drop_netns() -> None:
    subprocess.run(["ip", "netns", "del", NETNS], check=True)


@pytest.fixture
def netns() -> Iterator[str]:
    make_netns()
    yield PATH
    drop_netns()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[NameServerProcess]:
    made = NameServerProcess(tmp_path, tmp_path / "dns.log")
    yield made
    await made.stop()
    assert "Traceback" not in (tmp_path / "dns.log").read_text(), "no exception got as far as the log"


async def dig(*options: str, port: int = LISTEN_PORT, netns: str = PATH) -> str:
    argv = ["nsenter", f"--net={netns}", "dig", f"@{LISTEN_ADDRESS}", "-p", str(port), "+time=2", "+tries=1", *options]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, check=False, timeout=20)
    return str(done.stdout)


async def asked(*options: str, port: int = LISTEN_PORT, netns: str = PATH) -> list[str]:
    out = await dig("+short", *options, port=port, netns=netns)
    return sorted(line for line in out.splitlines() if not line.startswith(";"))


def names(addresses: tuple[str, ...] = (), internal: bool = False) -> NetworkNames:
    web = ServiceNames(("web",), "10.0.1.2", addresses, "fd00::2", (("http", "tcp", 80),))
    return NetworkNames("n1", "wpnet", internal, (web,), (TaskNames(("web.1.abc",), "10.0.1.5"),))


def picture(addresses: tuple[str, ...] = (), upstreams: tuple[str, ...] = (), internal: bool = False) -> Picture:
    return Picture((names(addresses, internal),), (Sandbox("t1", PATH, ("n1",), search=("corp",)),), upstreams)


async def test_answers_in_a_namespace_and_follows_the_picture(netns: str, server: NameServerProcess) -> None:
    many = tuple(f"10.0.1.{i}" for i in range(10, 110))
    await server.apply(picture(("10.0.1.5", "10.0.1.6")))
    assert await asked("web") == ["10.0.1.2"]
    assert await asked("tasks.web.wpnet") == ["10.0.1.5", "10.0.1.6"]
    await server.apply(picture(many))
    assert await asked("tasks.web") == sorted(many), "dig falls back to TCP when the answer is truncated"
    assert "status: NOERROR" in await dig("+tcp", "+keepopen", "web", "tasks.web")
    await server.apply(Picture())
    assert await asked("web") == []


async def test_what_dig_can_ask_for(netns: str, server: NameServerProcess) -> None:
    await server.apply(picture(("10.0.1.5",)))
    assert await asked("AAAA", "web") == ["fd00::2"]
    assert await asked("AAAA", "tasks.web") == []
    assert await asked("ANY", "web") == ["10.0.1.2", "fd00::2"]
    assert await asked("-x", "10.0.1.5") == ["web.1.abc.wpnet."]
    assert await asked("-x", "fd00::2") == ["web.wpnet."]
    assert await asked("SRV", "_http._tcp.web") == ["0 1 80 web.wpnet."]
    assert await asked("+search", "+domain=corp", "web") == ["10.0.1.2"]
    whole = await dig("+cookie", "+dnssec", "+bufsize=4096", "wEb")
    assert "status: NOERROR" in whole
    assert "(good)" in whole, "the cookie"
    assert "flags: do; udp: 1232" in whole
    assert "\nwEb.\t" in whole
    assert "WARNING" not in whole.replace("WARNING: recursion", "")
    assert "status: BADVERS" in await dig("+edns=1", "+noednsneg", "web")


async def test_forwards_from_the_host_s_namespace_and_only_what_is_not_ours(
    netns: str, server: NameServerProcess
) -> None:
    async with upstream(known) as resolver:
        await server.apply(picture(("10.0.1.5",), ("127.0.0.1:1", resolver.address)))
        for ours in ("web", "tasks.web", "web.wpnet", "web.corp", "1.web.corp", "_9._tcp.web"):
            await asked(ours)
        await asked("-x", "10.0.1.5")
        assert len(resolver.asked) == 1, "1.web.corp only: no task has that name"
        assert await asked("outside.example") == ["192.0.2.7"], "the dead first resolver is skipped"


async def test_a_task_on_internal_networks_only_leaks_no_question(netns: str, server: NameServerProcess) -> None:
    async with upstream(known) as resolver:
        await server.apply(picture((), (resolver.address,), internal=True))
        for name in ("outside.example", "web.", "tasks.web", "nobody", "x.web.corp"):
            for options in (("A",), ("AAAA",), ("+tcp",), ("TXT",), ("SRV",)):
                await asked(*options, name)
        await asked("-x", "192.0.2.1")
        assert "status: NXDOMAIN" in await dig("outside.example")
        assert resolver.asked == []


async def test_a_resolver_of_the_task_comes_instead_of_the_host_s(netns: str, server: NameServerProcess) -> None:
    async with upstream(known) as of_host, upstream(known) as of_task:
        base = picture((), (of_host.address,))
        await server.apply(replace(base, sandboxes=(replace(base.sandboxes[0], upstreams=(of_task.address,)),)))
        assert await asked("outside.example") == ["192.0.2.7"]
        assert (len(of_host.asked), len(of_task.asked)) == (0, 1)


async def test_outlives_its_agent_and_is_back_by_itself_within_a_second_when_it_dies(
    netns: str, tmp_path: Path
) -> None:
    first = NameServerProcess(tmp_path, tmp_path / "dns.log")
    await first.apply(picture())
    pid = first.pid
    second = NameServerProcess(tmp_path, tmp_path / "dns.log")
    try:
        assert await asked("web") == ["10.0.1.2"]
        await second.apply(picture(("10.0.1.9",)))
        assert second.pid == pid
        assert await asked("tasks.web") == ["10.0.1.9"]
        os.kill(pid, signal.SIGKILL)
        await until(lambda: pid not in (first.pid, second.pid), 10, "another server")
        assert second.pid != pid
        await second.apply(picture(("10.0.1.9",)))
        assert await asked("tasks.web") == ["10.0.1.9"]
    finally:
        first._wanted = None  # as a process that has ended: it revives nothing any more
        await second.stop()
        await first.stop()
    await until(lambda: not servers_of(tmp_path), what="no server of these agents runs")


async def test_a_stop_while_a_dead_server_is_being_replaced_leaves_none(netns: str, tmp_path: Path) -> None:
    agent = NameServerProcess(tmp_path, tmp_path / "dns.log")
    await agent.apply(picture())
    os.kill(agent.pid, signal.SIGKILL)
    await until(lambda: agent._reviving is not None, what="its death is noticed")
    await agent.stop()
    await until(lambda: not servers_of(tmp_path), what="no server of this agent runs")


OLD_SERVER = """
import json, os, socket, sys
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
while True:
    asked, _ = listening.accept()
    with asked, asked.makefile("rb") as lines:
        for line in lines:
            asked.sendall(json.dumps({"ok": True, "pid": os.getpid()}).encode() + b"\\n")
"""


async def test_a_server_of_another_version_is_replaced(netns: str, server: NameServerProcess, tmp_path: Path) -> None:
    """As an upgrade of the agent meets it: it answers without a digest."""
    socket_path = tmp_path / "dns.sock"
    old = await asyncio.create_subprocess_exec(sys.executable, "-c", OLD_SERVER, str(socket_path))
    await until(socket_path.exists, what="the old server listens")
    await server.apply(picture(("10.0.1.5",)))
    assert await old.wait() == -signal.SIGTERM
    assert await asked("tasks.web") == ["10.0.1.5"]


def servers_of(run_dir: Path) -> list[str]:
    """Process IDs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(run_dir / "dns.sock").encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


async def test_what_another_agent_told_is_noticed_and_put_right(netns: str, tmp_path: Path) -> None:
    one, other = (NameServerProcess(tmp_path, tmp_path / "dns.log") for _ in range(2))
    try:
        await one.apply(picture(("10.0.1.5",)))
        await other.apply(picture(("10.0.1.6",)))
        assert await asked("tasks.web") == ["10.0.1.6"]
        await one.apply(picture(("10.0.1.5",)))
        assert await asked("tasks.web") == ["10.0.1.5"]
        await one.apply(picture(("10.0.1.5", "10.0.1.7")))
        assert await asked("tasks.web") == ["10.0.1.5", "10.0.1.7"]
    finally:
        await other.stop()
        await one.stop()


async def test_a_vanished_namespace_is_an_error_and_the_rest_is_served(netns: str, server: NameServerProcess) -> None:
    good = picture()
    bad = replace(good, sandboxes=(Sandbox("gone", "/run/netns/pydnst-no", ("n1",)), *good.sandboxes))
    for _ in range(2):
        with pytest.raises(DnsError, match="gone"):
            await server.apply(bad)
    assert await asked("web") == ["10.0.1.2"]
    await server.apply(good)


async def test_a_namespace_that_was_made_anew_is_listened_in_at_the_next_audit(
    netns: str, server: NameServerProcess
) -> None:
    await server.apply(picture())
    drop_netns()
    make_netns()
    assert await asked("web") == []
    await server.apply(picture())
    assert await asked("web") == ["10.0.1.2"]


async def test_garbage_is_dropped_and_answers_go_on(netns: str, server: NameServerProcess) -> None:
    await server.apply(picture())
    script = f"""
import random, socket
chance = random.Random(1)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
question = bytes.fromhex("{bytes(DNSRecord.question("web").pack()).hex()}")
for number in range(2000):
    packet = bytearray(question) if number % 2 else bytearray(chance.randbytes(chance.randrange(1500)))
    for _ in range(3 if packet else 0):
        packet[chance.randrange(len(packet))] = chance.randrange(256)
    udp.sendto(packet, ("{LISTEN_ADDRESS}", {LISTEN_PORT}))
for number in range(50):
    with socket.create_connection(("{LISTEN_ADDRESS}", {LISTEN_PORT}), 5) as tcp:
        tcp.sendall(chance.randbytes(chance.randrange(1, 300)))
"""
    argv = ["nsenter", f"--net={PATH}", "python3", "-c", script]
    await asyncio.to_thread(subprocess.run, argv, check=True, timeout=60)
    assert await asked("web") == ["10.0.1.2"]
    assert await asked("+tcp", "web") == ["10.0.1.2"]


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")])
async def test_an_application_that_listens_on_port_53_and_the_names_do_not_meet(
    server: NameServerProcess, family: socket.AddressFamily, address: str
) -> None:
    lab = OverlayLab()
    try:
        await lab.apply()
        path = await lab.task(lab.hosts[0], f"t{random.randrange(1 << 30)}", (NET, "10.77.1.5"))
        await server.apply(Picture((names(("10.0.1.5",)),), (Sandbox("t1", str(path), ("n1",)),)))
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            application = lab.sockets.inside(path, lambda kind=kind: socket.socket(family, kind))  # type: ignore[misc]
            with application:
                application.bind((address, 53))
                if kind == socket.SOCK_STREAM:
                    application.listen()
                assert await asked("tasks.web", port=53, netns=str(path)) == ["10.0.1.5"]
                assert await asked("+tcp", "tasks.web", port=53, netns=str(path)) == ["10.0.1.5"]
                application.settimeout(5)
                with lab.sockets.open(path, kind) as client:
                    client.connect(("127.0.0.1", 53))
                    client.send(b"for the application")
                    if kind == socket.SOCK_STREAM:
                        accepted, _ = application.accept()
                        with accepted:
                            assert accepted.recv(100) == b"for the application"
                    else:
                        assert application.recv(100) == b"for the application"
    finally:
        await lab.close()
