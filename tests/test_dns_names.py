"""Names, answers, truncation, rotation and the cache: pure."""

from __future__ import annotations

import random

import pytest
from dnslib import QTYPE, RCODE, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from dns.answer import NotAQuestion, Responder
from dns.interface import NetworkNames, Picture, Sandbox, ServiceNames, TaskNames
from dns.names import NetworkView, TaskView
from dns.wire import decode, encode

WPNET = NetworkNames(
    network_id="n1",
    name="wpnet",
    internal=False,
    services=(
        ServiceNames(("wpinst", "blog"), "10.0.1.2", ("10.0.1.5", "10.0.1.6")),
        ServiceNames(("db", "blog"), None, ("10.0.1.7",)),
        ServiceNames(("idle",), None, ()),
    ),
    tasks=(TaskNames(("wpinst.1.abc", "wpinst.1"), "10.0.1.5"),),
)
BACK = NetworkNames("n2", "back", True, (ServiceNames(("db",), "10.0.2.2", ("10.0.2.9",)),), ())


def view(*networks: NetworkNames) -> TaskView:
    return TaskView([NetworkView(network) for network in networks])


@pytest.mark.parametrize(
    ("name", "addresses"),
    [
        ("wpinst", ("10.0.1.2",)),
        ("tasks.wpinst", ("10.0.1.5", "10.0.1.6")),
        ("wpinst.wpnet", ("10.0.1.2",)),
        ("tasks.wpinst.wpnet", ("10.0.1.5", "10.0.1.6")),
        ("blog", ("10.0.1.2", "10.0.1.7")),
        ("wpinst.1", ("10.0.1.5",)),
        ("wpinst.1.abc.wpnet", ("10.0.1.5",)),
        ("db", ("10.0.1.7",)),
        ("db.back", ("10.0.2.2",)),
        ("idle", ()),
        ("example.com", None),
        ("wpinst.other", None),
    ],
)
def test_lookup(name: str, addresses: tuple[str, ...] | None) -> None:
    assert view(WPNET, BACK).lookup(name) == addresses


def test_the_order_of_networks_decides_a_shared_name() -> None:
    assert view(BACK, WPNET).lookup("db") == ("10.0.2.2",)


def test_reverse_names_the_task_and_the_service() -> None:
    assert view(WPNET).reverse("5.1.0.10.in-addr.arpa") == "wpinst.1.abc.wpnet"
    assert view(WPNET).reverse("2.1.0.10.in-addr.arpa") == "wpinst.wpnet"
    assert view(WPNET).reverse("9.9.9.9.in-addr.arpa") is None


def ask(responder: Responder, name: str, qtype: str = "A", tcp: bool = False) -> DNSRecord | None:
    packet = responder.answer(bytes(DNSRecord.question(name, qtype).pack()), tcp)
    return None if packet is None else DNSRecord.parse(packet)


def addresses(reply: DNSRecord | None) -> list[str]:
    assert reply is not None
    return [str(rr.rdata) for rr in reply.rr]


def test_names_have_no_case_and_keep_the_asker_s_spelling() -> None:
    reply = ask(Responder(view(WPNET)), "WpInst")
    assert addresses(reply) == ["10.0.1.2"]
    assert reply is not None
    assert str(reply.rr[0].rname) == "WpInst."


def test_a_known_name_without_the_type_is_nodata_not_nxdomain() -> None:
    reply = ask(Responder(view(WPNET)), "wpinst", "AAAA")
    assert reply is not None
    assert (reply.header.rcode, reply.rr) == (RCODE.NOERROR, [])


def test_unknown_names_are_forwarded_but_not_from_an_internal_network() -> None:
    assert ask(Responder(view(WPNET)), "example.com") is None
    reply = ask(Responder(view(BACK)), "example.com")
    assert reply is not None
    assert reply.header.rcode == RCODE.NXDOMAIN


def test_each_address_comes_first_in_turn() -> None:
    responder = Responder(view(WPNET))
    firsts = {addresses(ask(responder, "tasks.wpinst"))[0] for _ in range(8)}
    assert firsts == {"10.0.1.5", "10.0.1.6"}


def crowd(size: int) -> NetworkNames:
    every = tuple(f"10.0.{i // 250}.{i % 250 + 1}" for i in range(size))
    return NetworkNames("n", "net", False, (ServiceNames(("web",), None, every),), ())


def test_an_answer_too_long_for_udp_is_truncated_and_whole_over_tcp() -> None:
    responder = Responder(view(crowd(100)))
    short = ask(responder, "web")
    assert short is not None
    assert short.header.tc == 1
    assert short.rr == []
    whole = ask(responder, "web", tcp=True)
    assert whole is not None
    assert len(whole.rr) == 100
    assert whole.header.tc == 0


def test_edns_lets_a_longer_answer_through_udp() -> None:
    responder = Responder(view(crowd(40)))
    question = DNSRecord.question("web")
    assert DNSRecord.parse(responder.answer(bytes(question.pack())) or b"").header.tc == 1
    from dnslib import EDNS0

    question.add_ar(EDNS0(udp_len=4096))
    reply = DNSRecord.parse(responder.answer(bytes(question.pack())) or b"")
    assert len(reply.rr) == 40
    assert [rr for rr in reply.ar if rr.rtype == QTYPE.OPT]


def test_the_id_is_the_asker_s_even_from_the_cache() -> None:
    responder = Responder(view(WPNET))
    for ident in (1, 777, 65535):
        question = DNSRecord.question("wpinst")
        question.header.id = ident
        assert DNSRecord.parse(responder.answer(bytes(question.pack())) or b"").header.id == ident


@given(st.binary(max_size=80))
def test_no_packet_breaks_the_responder(packet: bytes) -> None:
    try:
        reply = Responder(view(WPNET)).answer(packet)
    except NotAQuestion:
        return
    assert reply is None or DNSRecord.parse(reply).header.qr == 1


def test_mutated_questions_never_break_the_responder() -> None:
    chance = random.Random(1)
    responder = Responder(view(WPNET))
    for _ in range(2000):
        packet = bytearray(DNSRecord.question("tasks.wpinst").pack())
        for _ in range(chance.randint(1, 4)):
            packet[chance.randrange(len(packet))] = chance.randrange(256)
        try:
            responder.answer(bytes(packet))
        except NotAQuestion:
            continue


def test_a_picture_survives_the_wire() -> None:
    picture = Picture((WPNET, BACK), (Sandbox("t1", "/run/x", ("n1", "n2"), ("1.1.1.1",)),), ("10.0.0.2:53",))
    assert decode(encode(picture)) == picture
