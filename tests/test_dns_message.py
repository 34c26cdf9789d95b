"""Questions and replies made by hand are those of dnslib; garbage is told from questions and breaks nothing."""

from __future__ import annotations

import random

import pytest
from dnslib import EDNS0, QTYPE, DNSLabel, DNSQuestion, DNSRecord, EDNSOption
from hypothesis import given
from hypothesis import strategies as st

from dns.message import A, NotAQuestion, Records, labels_of, pack, parse, record, to_wire

FUZZ_CASES = 5_000

labels = st.text("abcXYZ019-_", min_size=1, max_size=20)
names = st.lists(labels, min_size=1, max_size=6).map(".".join)
cookies = st.one_of(st.none(), st.binary(min_size=8, max_size=8), st.binary(min_size=16, max_size=40))


def question(name: str, qtype: int = 1, qclass: int = 1, **edns: object) -> DNSRecord:
    made = DNSRecord(q=DNSQuestion(DNSLabel(name), qtype, qclass))
    made.header.rd = 1
    if edns:
        cookie = edns.pop("cookie", None)
        options = [EDNSOption(10, cookie)] if cookie is not None else []
        made.add_ar(EDNS0(opts=options, **edns))
    return made


@given(
    name=names,
    qtype=st.integers(0, 65535),
    qclass=st.sampled_from([1, 3, 255]),
    size=st.integers(0, 65535),
    dnssec=st.booleans(),
    cookie=cookies,
)
def test_a_question_has_the_parts_that_dnslib_packed(
    *, name: str, qtype: int, qclass: int, size: int, dnssec: bool, cookie: bytes | None
) -> None:
    packet = bytes(question(name, qtype, qclass, udp_len=size, flags="do" if dnssec else "", cookie=cookie).pack())
    parsed = parse(packet)
    assert (parsed.qtype, parsed.qclass) == (qtype, qclass)
    assert parsed.name == to_wire(name)
    assert b".".join(labels_of(parsed.section[:-4])).decode() == name
    assert parsed.edns is not None
    assert (parsed.edns.udp_bytes, parsed.edns.version, parsed.edns.dnssec_ok) == (size, 0, dnssec)
    assert (parsed.edns.cookie, parsed.edns.plain) == (cookie or b"", cookie is None)


@given(st.binary(max_size=300), st.booleans())
def test_what_is_taken_as_a_question_dnslib_reads_the_same(tail: bytes, as_question: bool) -> None:
    packet = (b"\0\1\1\0\0\1\0\0\0\0\0\1" if as_question else b"") + tail
    try:
        parsed = parse(packet)
    except NotAQuestion:
        return
    read = DNSRecord.parse(packet)
    assert (read.q.qtype, read.q.qclass) == (parsed.qtype, parsed.qclass)
    assert [bytes(label).lower() for label in read.q.qname.label] == labels_of(parsed.name)


@given(names, st.lists(st.binary(min_size=4, max_size=4), max_size=20), st.booleans(), st.booleans())
def test_a_reply_reads_as_it_was_meant(name: str, addresses: list[bytes], edns: bool, dnssec: bool) -> None:
    asked = question(name)
    if edns:
        asked.add_ar(EDNS0(udp_len=1232, flags="do" if dnssec else ""))
    parsed = parse(bytes(asked.pack()))
    body = pack(parsed, Records(b"".join(record(A, address) for address in addresses), len(addresses)))
    read = DNSRecord.parse(b"\0\7" + body)
    assert (read.header.id, read.header.qr, read.header.aa, read.header.ra, read.header.rd) == (7, 1, 1, 1, 1)
    assert str(read.q.qname) == name + "."
    assert [bytes(rr.rdata.data) for rr in read.rr] == addresses
    assert {str(rr.rname) for rr in read.rr} <= {name + "."}
    assert [rr.edns_do for rr in read.ar if rr.rtype == QTYPE.OPT] == [int(dnssec)] * edns


VALID = bytes(question("tasks.web", 1, 1, udp_len=1232, cookie=b"01234567").pack())


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(VALID[:12], id="a header alone"),
        pytest.param(VALID[:-1], id="a cut option"),
        pytest.param(VALID + b"\0", id="something behind it"),
        pytest.param(VALID[:2] + b"\x81" + VALID[3:], id="a reply"),
        pytest.param(VALID[:2] + b"\x29" + VALID[3:], id="another operation: UPDATE"),
        pytest.param(VALID[:4] + b"\0\0" + VALID[6:], id="no question"),
        pytest.param(VALID[:4] + b"\0\2" + VALID[6:], id="two questions"),
        pytest.param(VALID[:12] + b"\xc0\x0c" + VALID[12:], id="a name that points to itself"),
        pytest.param(VALID[:12] + b"\x3fx" * 130 + VALID[12:], id="a name without an end"),
        pytest.param(VALID[:11] + b"\2" + VALID[12:] + VALID[27:], id="two OPT records"),
        pytest.param(bytes(question("a", udp_len=512, cookie=b"123").pack()), id="a cookie of three bytes"),
        pytest.param(VALID[:12] + b"\3abc" * 64 + VALID[12:], id="a name of more than 255 bytes"),
    ],
)
def test_what_is_no_question_is_said_to_be_none(packet: bytes) -> None:
    with pytest.raises(NotAQuestion):
        parse(packet)


def test_mutated_questions_are_questions_or_refused_and_replies_stay_small() -> None:
    chance = random.Random(1)
    everything = Records(record(A, b"\1\2\3\4") * 4000, 4000)
    for _ in range(FUZZ_CASES):
        packet = bytearray(VALID)
        for _ in range(chance.randint(1, 4)):
            where = chance.randrange(len(packet))
            if chance.random() < 0.2:
                del packet[where:]
                break
            packet[where] = chance.choice((0, 1, 12, 63, 64, 0xC0, 0xFF, chance.randrange(256)))
        try:
            parsed = parse(bytes(packet))
        except NotAQuestion:
            continue
        assert len(pack(parsed, everything)) + 2 <= 1232
        assert len(pack(parsed, everything, tcp=True)) + 2 <= 65535


@pytest.mark.parametrize("name", ["", ".", "a..b", "x" * 64, ".".join(["abcdefgh"] * 29)])
def test_names_that_nobody_can_ask_for_have_no_wire_form(name: str) -> None:
    assert to_wire(name) is None
