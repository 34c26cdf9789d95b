"""Forwarding to real sockets: failover, timeouts, bounds, whole answers, forged ones, loops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import cast

import pytest
from dnslib import EDNS0, QTYPE, RCODE, RR, TXT, A, DNSRecord

from dns.forward import CONCURRENT_MAX, CONCURRENT_PER_TASK_MAX, PORTS_MAX, Forwarder, split
from tests.waiting import until

Behave = Callable[[bytes], list[bytes]]


def known(packet: bytes) -> list[bytes]:
    """One address for every name."""
    reply = DNSRecord.parse(packet).reply()
    reply.add_answer(RR(reply.q.qname, rdata=A("192.0.2.7")))
    return [bytes(reply.pack())]


def with_code(code: int) -> Behave:
    def behave(packet: bytes) -> list[bytes]:
        reply = DNSRecord.parse(packet).reply()
        reply.header.rcode = code
        return [bytes(reply.pack())]

    return behave


def silent(packet: bytes) -> list[bytes]:
    return []


class Upstream(asyncio.DatagramProtocol):
    """A resolver on a real socket; keeps what it was asked and from where."""

    def __init__(self, behave: Behave) -> None:
        self.behave = behave
        self.asked: list[bytes] = []
        self.ports: set[int] = set()
        self.address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)
        self.address = f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.asked.append(data)
        self.ports.add(addr[1])
        for reply in self.behave(data):
            self.transport.sendto(reply, addr)


@contextlib.asynccontextmanager
async def upstream(behave: Behave) -> AsyncIterator[Upstream]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(lambda: Upstream(behave), local_addr=("127.0.0.1", 0))
    yield protocol
    transport.close()


@contextlib.asynccontextmanager
async def forwarding() -> AsyncIterator[Forwarder]:
    made = Forwarder()
    yield made
    made.close()


async def ask(forwarder: Forwarder, packet: bytes, *resolvers: str, tcp: bool = False, task: str = "t1") -> bytes:
    found: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    assert forwarder.ask(packet, resolvers, task, tcp, found.set_result)
    async with asyncio.timeout(20):
        return await found


def question(name: str = "outside.example", qtype: str = "A") -> bytes:
    return bytes(DNSRecord.question(name, qtype).pack())


def rcode(reply: bytes) -> int:
    return int(DNSRecord.parse(reply).header.rcode)


async def test_the_answer_comes_under_the_asker_s_id() -> None:
    async with upstream(known) as resolver, forwarding() as forwarder:
        packet = question()
        reply = await ask(forwarder, packet, resolver.address)
        assert reply[:2] == packet[:2]
        assert str(DNSRecord.parse(reply).rr[0].rdata) == "192.0.2.7"


async def test_without_any_resolver_it_is_servfail_at_once() -> None:
    async with forwarding() as forwarder:
        replies: list[bytes] = []
        for resolvers in ((), ("no-address",)):
            assert forwarder.ask(question(), resolvers, "t1", False, replies.append)
        assert [rcode(reply) for reply in replies] == [RCODE.SERVFAIL] * 2
        assert [str(DNSRecord.parse(reply).q.qname) for reply in replies] == ["outside.example."] * 2


async def test_resolvers_that_fail_are_followed_by_the_next_and_nxdomain_is_an_answer() -> None:
    async with (
        upstream(with_code(RCODE.REFUSED)) as refuses,
        upstream(with_code(RCODE.NXDOMAIN)) as says_no,
        upstream(known) as knows,
        forwarding() as forwarder,
    ):
        assert (
            rcode(await ask(forwarder, question(), "127.0.0.1:1", refuses.address, says_no.address)) == RCODE.NXDOMAIN
        )
        assert rcode(await ask(forwarder, question(), refuses.address, knows.address)) == RCODE.NOERROR
        assert rcode(await ask(forwarder, question(), "127.0.0.1:1", refuses.address)) == RCODE.REFUSED
        assert rcode(await ask(forwarder, question(), "127.0.0.1:1")) == RCODE.SERVFAIL


async def test_a_silent_resolver_is_waited_for_once_and_then_asked_last() -> None:
    async with upstream(silent) as dead, upstream(known) as alive, forwarding() as forwarder:
        for number in range(5):
            assert rcode(await ask(forwarder, question(f"{number}.example"), dead.address, alive.address)) == 0
        assert len(dead.asked) == 1
        dead.behave = known
        await ask(forwarder, question("6.example"), dead.address)
        await ask(forwarder, question("7.example"), dead.address, alive.address)
        assert len(dead.asked) == 3, "one that answers again is asked first again"


async def test_answers_are_relayed_whole() -> None:
    def large(packet: bytes) -> list[bytes]:
        request = DNSRecord.parse(packet)
        reply = request.reply()
        reply.header.ad = 1
        for number in range(20):
            reply.add_answer(RR(reply.q.qname, QTYPE.TXT, rdata=TXT(f"{number}" * 60)))
        reply.add_ar(EDNS0(udp_len=4096, flags="do"))
        sent.append(bytes(reply.pack()))
        return sent[-1:]

    sent: list[bytes] = []
    asked = DNSRecord.question("big.example", "TXT")
    asked.add_ar(EDNS0(udp_len=4096, flags="do"))
    async with upstream(large) as resolver, forwarding() as forwarder:
        reply = await ask(forwarder, bytes(asked.pack()), resolver.address)
        assert len(reply) > 1232
        assert reply[2:] == sent[0][2:]
        assert resolver.asked[0][2:] == bytes(asked.pack())[2:], "the question as well, EDNS and all"


async def test_over_tcp_when_the_asker_came_over_tcp() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        packet = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        (reply,) = known(packet)
        writer.write(len(reply).to_bytes(2, "big") + reply)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with forwarding() as forwarder:
        assert rcode(await ask(forwarder, question(), address, tcp=True)) == RCODE.NOERROR
        assert rcode(await ask(forwarder, question(), "127.0.0.1:1", tcp=True)) == RCODE.SERVFAIL
    server.close()


async def test_an_answer_to_another_question_or_id_is_not_believed() -> None:
    def forges(packet: bytes) -> list[bytes]:
        other = bytes([packet[0] ^ 1]) + packet[1:]
        echo = packet
        return [*known(other), *known(packet[:2] + question("evil.example")[2:]), echo, packet[:5], *known(packet)]

    async with upstream(forges) as resolver, forwarding() as forwarder:
        reply = DNSRecord.parse(await ask(forwarder, question(), resolver.address))
        assert str(reply.q.qname) == "outside.example."
        assert reply.header.qr == 1


async def test_the_same_question_under_way_is_sent_once_and_all_who_wait_get_the_answer() -> None:
    """A resolver that forwards to the task's own name server would else be asked for ever."""

    async with upstream(silent) as resolver, forwarding() as forwarder:
        replies: list[bytes] = []
        packets = [ident.to_bytes(2, "big") + question()[2:] for ident in range(5)]
        for packet in packets:
            assert forwarder.ask(packet, (resolver.address,), "t1", False, replies.append)
        await until(lambda: resolver.asked, what="asked")
        resolver.behave = known
        resolver.datagram_received(resolver.asked[0], ("127.0.0.1", next(iter(resolver.ports))))
        await until(lambda: len(replies) == 5, what="all answered")
        assert [reply[:2] for reply in replies] == [packet[:2] for packet in packets]


async def test_one_task_that_floods_leaves_room_for_the_others_and_all_is_bounded() -> None:
    async with upstream(silent) as resolver, forwarding() as forwarder:

        def taken(task: str, count: int) -> int:
            packets = [question(f"{number}.{task}.example") for number in range(count)]
            return sum(forwarder.ask(each, (resolver.address,), task, False, lambda reply: None) for each in packets)

        assert taken("flood", 2 * CONCURRENT_PER_TASK_MAX) == CONCURRENT_PER_TASK_MAX
        assert taken("calm", 1) == 1
        assert sum(taken(f"t{number}", CONCURRENT_PER_TASK_MAX) for number in range(9)) < CONCURRENT_MAX
        await until(lambda: len(resolver.asked) > CONCURRENT_PER_TASK_MAX // 2, what="asked")
        assert len(resolver.ports) <= PORTS_MAX


async def test_questions_leave_from_changing_ports_and_with_changing_ids() -> None:
    async with upstream(known) as resolver, forwarding() as forwarder:
        for number in range(100):
            await ask(forwarder, question(f"{number}.example"), resolver.address)
        assert len(resolver.ports) > 3
        assert len({packet[:2] for packet in resolver.asked}) > 90


async def test_room_is_given_back_after_answers_and_failures() -> None:
    async with upstream(known) as resolver, forwarding() as forwarder:
        for number in range(2 * CONCURRENT_PER_TASK_MAX):
            await ask(forwarder, question(f"{number}.example"), *([resolver.address] if number % 2 else []))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("10.0.0.2", ("10.0.0.2", 53)),
        ("10.0.0.2:54", ("10.0.0.2", 54)),
        ("fd00::1", ("fd00::1", 53)),
        ("[fd00::1]:54", ("fd00::1", 54)),
        ("[fd00::1]", ("fd00::1", 53)),
        ("fe80::1%eth0", ("fe80::1%eth0", 53)),
    ],
)
def test_the_parts_of_a_resolver_s_address(text: str, parts: tuple[str, int]) -> None:
    assert split(text) == parts


@pytest.mark.parametrize("text", ["", "dns.example", "10.0.0.2:x", "10.0.0"])
def test_what_is_no_address_is_refused_without_a_look_up(text: str) -> None:
    with pytest.raises(ValueError):
        split(text)
