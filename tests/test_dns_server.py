"""The server as a process: real namespaces, real sockets, UDP and TCP, forwarding, death and restart."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import pytest
from dnslib import RCODE, RR, A, DNSRecord

from dns.client import NameServerProcess
from dns.forward import Forwarder, split
from dns.interface import LISTEN_ADDRESS, LISTEN_PORT, DnsError, NetworkNames, Picture, Sandbox, ServiceNames

NETNS = "pydnst-1"


@pytest.fixture
def netns() -> Iterator[str]:
    subprocess.run(["ip", "netns", "del", NETNS], check=False, capture_output=True)
    subprocess.run(["ip", "netns", "add", NETNS], check=True)
    subprocess.run(["ip", "-n", NETNS, "link", "set", "lo", "up"], check=True)
    yield f"/run/netns/{NETNS}"
    subprocess.run(["ip", "netns", "del", NETNS], check=True)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[NameServerProcess]:
    made = NameServerProcess(tmp_path, tmp_path / "dns.log")
    yield made
    await made.stop()


def dig(name: str, *options: str) -> list[str]:
    argv = ["ip", "netns", "exec", NETNS, "dig", f"@{LISTEN_ADDRESS}", "-p", str(LISTEN_PORT), "+time=2", "+tries=1"]
    done = subprocess.run([*argv, "+short", *options, name], capture_output=True, text=True, check=False, timeout=20)
    return sorted(line for line in done.stdout.splitlines() if not line.startswith(";"))


async def asked(name: str, *options: str) -> list[str]:
    return await asyncio.to_thread(dig, name, *options)


def picture(netns: str, addresses: tuple[str, ...], upstreams: tuple[str, ...] = ()) -> Picture:
    network = NetworkNames("n1", "wpnet", False, (ServiceNames(("web",), "10.0.1.2", addresses),), ())
    return Picture((network,), (Sandbox("t1", netns, ("n1",)),), upstreams)


class Upstream(asyncio.DatagramProtocol):
    """A resolver that knows one name."""

    transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        reply = DNSRecord.parse(data).reply()
        if str(reply.q.qname) == "outside.example.":
            reply.add_answer(RR(reply.q.qname, rdata=A("192.0.2.7")))
        else:
            reply.header.rcode = RCODE.NXDOMAIN
        self.transport.sendto(reply.pack(), addr)


@contextlib.asynccontextmanager
async def upstream() -> AsyncIterator[str]:
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Upstream, local_addr=("127.0.0.1", 0))
    yield f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"
    transport.close()


@pytest.mark.root
async def test_answers_in_a_namespace_and_follows_the_picture(netns: str, server: NameServerProcess) -> None:
    many = tuple(f"10.0.1.{i}" for i in range(10, 60))
    await server.apply(picture(netns, ("10.0.1.5", "10.0.1.6")))
    assert await asked("web") == ["10.0.1.2"]
    assert await asked("tasks.web.wpnet") == ["10.0.1.5", "10.0.1.6"]
    await server.apply(picture(netns, many))
    assert await asked("tasks.web") == sorted(many), "dig falls back to TCP when the answer is truncated"
    await server.apply(Picture())
    assert await asked("web") == []


@pytest.mark.root
async def test_forwards_from_the_host_s_namespace(netns: str, server: NameServerProcess) -> None:
    async with upstream() as resolver:
        await server.apply(picture(netns, (), ("127.0.0.1:1", resolver)))
        assert await asked("outside.example") == ["192.0.2.7"], "the dead first resolver is skipped"
        assert await asked("nowhere.example") == []


@pytest.mark.root
async def test_outlives_its_agent_and_is_replaced_when_it_dies(netns: str, tmp_path: Path) -> None:
    first = NameServerProcess(tmp_path, tmp_path / "dns.log")
    await first.apply(picture(netns, ()))
    pid = first.pid
    second = NameServerProcess(tmp_path, tmp_path / "dns.log")
    try:
        assert await asked("web") == ["10.0.1.2"]
        await second.apply(picture(netns, ("10.0.1.9",)))
        assert second.pid == pid
        assert await asked("tasks.web") == ["10.0.1.9"]
        os.kill(pid, signal.SIGKILL)
        await second.apply(picture(netns, ("10.0.1.9",)))
        assert second.pid != pid
        assert await asked("web") == ["10.0.1.2"]
    finally:
        await second.stop()


@pytest.mark.root
async def test_a_vanished_namespace_is_an_error_and_the_rest_is_served(netns: str, server: NameServerProcess) -> None:
    good = picture(netns, ())
    bad = Picture(good.networks, (Sandbox("gone", "/run/netns/pydnst-no", ("n1",)), *good.sandboxes), ())
    with pytest.raises(DnsError, match="gone"):
        await server.apply(bad)
    assert await asked("web") == ["10.0.1.2"]


async def test_forwarder_gives_servfail_when_nobody_answers() -> None:
    question = bytes(DNSRecord.question("x.example").pack())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    reply = await Forwarder().ask(question, [f"127.0.0.1:{port}"])
    assert reply is not None
    assert DNSRecord.parse(reply).header.rcode == RCODE.SERVFAIL
    assert reply[:2] == question[:2]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("10.0.0.2", ("10.0.0.2", 53)),
        ("10.0.0.2:54", ("10.0.0.2", 54)),
        ("fd00::1", ("fd00::1", 53)),
        ("[fd00::1]:54", ("fd00::1", 54)),
    ],
)
def test_split(text: str, parts: tuple[str, int]) -> None:
    assert split(text) == parts
