"""Examinations on a node: what is asked is tried, within limits, and everything ends. Sockets are real, on loopback."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from dnslib import RR, A, DNSRecord

from dns.ask import NoAnswer, ask
from node import doctor
from node.doctor import EXAMS_MAX, PROBES_MAX, Examiner
from node.hostfacts import listeners, listening_sockets
from overlay.interface import Inspection, NetworkDrift, NetworkError
from proto.dispatch_pb2 import Connect, Examination, Examined, Probe, ProbeResult
from proto.objects_pb2 import TCP, UDP
from tests.fakes import FakeNetwork
from tests.waiting import until

T = TypeVar("T")


class OwnNetwork(FakeNetwork):
    """Task "here" lives in this process's own network namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.fault = ""
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def inside(self, task_id: str, function: Callable[[], T]) -> T:
        if task_id not in ("", "here"):
            raise NetworkError(f"task {task_id} has no network namespace on this host")
        return function()

    async def inspect(self) -> Inspection:
        self.asked.set()
        await self.may_answer.wait()
        if self.fault:
            raise NetworkError(self.fault)
        return Inspection(networks=(NetworkDrift("net", 1450, 1500, missing=("the bridge",)),), underlay_link="eth0")


class World:
    """A host that no manager has told anything yet."""

    class mirror:
        @staticmethod
        def endpoints() -> tuple[()]:
            return ()

    @staticmethod
    def host_state() -> None:
        return None


class Shell:
    class networks:
        error = "nftables refused"

    class names:
        error = ""


class Node:
    def __init__(self) -> None:
        self.network = OwnNetwork()
        self.said: list[Examined] = []
        self.examiner = Examiner(self.network, World(), Shell(), lambda: 77, self.said.append)  # type: ignore[arg-type]

    def examine(self, *probes: Probe, exam_id: str = "e1") -> None:
        self.examiner.handle(Examination(exam_id=exam_id, probes=probes))

    async def last(self) -> Examined:
        await until(lambda: self.said and self.said[-1].done, what="the last word")
        return self.said[-1]


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    made = Node()
    yield made
    await made.examiner.close()


def to(port: int, number: int = 1, task_id: str = "") -> Probe:
    return Probe(number=number, task_id=task_id, connect=Connect(address="127.0.0.1", port=port))


async def test_probes_are_tried_and_facts_told(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as closed:
        port, refused = server.getsockname()[1], closed.getsockname()[1]
        closed.close()
        node.examine(to(port, 1), to(refused, 2), to(port, 3, "here"), to(port, 4, "gone"))
        last = await node.last()
    outcomes = {result.number: result.outcome for said in node.said for result in said.results}
    assert outcomes == {1: ProbeResult.OK, 2: ProbeResult.REFUSED, 3: ProbeResult.OK, 4: ProbeResult.FAILED}
    assert (last.error, last.facts.names_pid, last.facts.networks_error) == ("", 77, "nftables refused")
    assert [(network.network_id, network.mtu_bytes, list(network.missing)) for network in last.facts.networks] == [
        ("net", 1450, ["the bridge"])
    ]


async def test_more_than_it_may_carry_out_is_refused_in_words(node: Node) -> None:
    node.examine(*(to(1, number) for number in range(PROBES_MAX + 1)))
    assert "are more than" in (await node.last()).error
    node.network.may_answer.clear()
    for number in range(EXAMS_MAX):
        node.examine(exam_id=f"e{number}")
    node.examine(exam_id="one too many")
    assert node.said[-1].exam_id == "one too many"
    assert "try again" in node.said[-1].error


async def test_a_host_that_cannot_be_read_says_so(node: Node) -> None:
    node.network.fault = "this host's networking cannot be read"
    node.examine()
    assert (await node.last()).error == "this host's networking cannot be read"


async def test_cancelled_examinations_and_lost_sessions_leave_nothing_running(node: Node) -> None:
    node.network.may_answer.clear()
    node.examine()
    await node.network.asked.wait()
    node.examiner.handle(Examination(exam_id="e1", cancel=True))
    await until(lambda: not node.examiner._running, what="its end")
    assert doctor.EXAM_S < 25, "managers wait for 25 s (swarm/dispatch/doctor.py)"


# ---------------------------------------------------------------- facts of the host


def test_listening_sockets_are_read_from_the_kernel_s_tables() -> None:
    table = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1\n"
        "   1: 0100007F:1F41 0200007F:0050 01 00000000:00000000 00:00000000 00000000     0        0 4712 1\n"
    )
    assert list(listening_sockets(table, "0A")) == [("127.0.0.1", 8000, "4711")]
    six = table.replace("0100007F:1F40", "00000000000000000000000001000000:1F40")
    assert list(listening_sockets(six, "0A")) == [("::1", 8000, "4711")]


def test_programs_on_ports_are_found_with_their_process() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind(("127.0.0.1", 0))
        tcp, udp = server.getsockname()[1], datagrams.getsockname()[1]
        found = {(each.protocol, each.port): each for each in listeners([(TCP, tcp), (UDP, udp), (TCP, 1)])}
    assert found.keys() == {(TCP, tcp), (UDP, udp)}
    assert {each.pid for each in found.values()} == {os.getpid()}
    assert found[TCP, tcp].address == "127.0.0.1"
    assert found[TCP, tcp].command == Path("/proc/self/comm").read_text().strip()


# ---------------------------------------------------------------- names


ADDRESSES = [f"10.0.1.{number}" for number in range(1, 61)]


class FakeServer:
    """Answers with ADDRESSES, over UDP truncated."""

    def __init__(self) -> None:
        self.mute = False

    def answer(self, data: bytes, tcp: bool) -> bytes:
        reply = DNSRecord.parse(data).reply()
        for address in ADDRESSES:
            reply.add_answer(RR("web", rdata=A(address), ttl=1))
        return bytes((reply if tcp else reply.truncate()).pack())

    async def over_udp(self, opened: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            data, client = await loop.sock_recvfrom(opened, 4096)
            if not self.mute:
                opened.sendto(b"not an answer", client)
                opened.sendto(self.answer(data, tcp=False), client)

    async def over_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(2), "big")
        answer = self.answer(await reader.readexactly(size), tcp=True)
        writer.write(len(answer).to_bytes(2, "big") + answer)
        await writer.drain()
        writer.close()


async def opened_here(make: Callable[[], socket.socket]) -> socket.socket:
    return make()


async def test_a_long_answer_is_read_whole_over_tcp_and_a_mute_server_is_no_answer() -> None:
    fake = FakeServer()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as opened:
        opened.bind(("127.0.0.1", 0))
        server = opened.getsockname()
        streams = await asyncio.start_server(fake.over_tcp, *server)
        datagrams = asyncio.create_task(fake.over_udp(opened))
        try:
            assert await ask("web", opened_here, server=server) == tuple(sorted(ADDRESSES))
            fake.mute = True
            with pytest.raises(NoAnswer, match="no answer within 2 s"):
                await ask("web", opened_here, server=server)
        finally:
            datagrams.cancel()
            streams.close()
            await asyncio.gather(datagrams, streams.wait_closed(), return_exceptions=True)
