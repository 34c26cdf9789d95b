"""Names, answers, truncation, rotation and the caches: pure. dnslib asks and reads."""

from __future__ import annotations

import ipaddress
import random

import pytest
from dnslib import EDNS0, QTYPE, RCODE, DNSRecord, EDNSOption

from dns.answer import CacheBudget, NotAQuestion, Responder
from dns.interface import NetworkNames, ServiceNames, TaskNames
from dns.message import to_wire
from dns.names import NetworkView, TaskView

FUZZ_CASES = 5_000

WPNET = NetworkNames(
    network_id="n1",
    name="wpnet",
    internal=False,
    services=(
        ServiceNames(("wpinst", "blog"), "10.0.1.2", ("10.0.1.5", "10.0.1.6"), ports=(("http", "tcp", 80),)),
        ServiceNames(("db", "blog"), None, ("10.0.1.7",), ports=(("", "tcp", 5432), ("", "udp", 53))),
        ServiceNames(("idle",), None, (), ports=(("", "tcp", 1),)),
        ServiceNames(("both",), "10.0.1.3", ("10.0.1.8", "fd00:1::8"), "fd00:1::3"),
    ),
    tasks=(
        TaskNames(("wpinst.1.abc", "wpinst.1", "1.wpinst", "abc"), "10.0.1.5"),
        TaskNames(("db.1.def", "db.1", "1.db", "def"), "10.0.1.7"),
        TaskNames(("both.1.ghi", "both.1", "1.both", "ghi"), "10.0.1.8", "fd00:1::8"),
    ),
)
BACK = NetworkNames("n2", "back", True, (ServiceNames(("db",), "10.0.2.2", ("10.0.2.9",)),), ())


def view(*networks: NetworkNames, search: tuple[str, ...] = ()) -> TaskView:
    return TaskView([NetworkView(network) for network in networks], search)


def responder(*networks: NetworkNames, search: tuple[str, ...] = ()) -> Responder:
    return Responder(view(*networks, search=search), CacheBudget(), cookie_key=b"secret")


def ask(
    asked: Responder, name: str, qtype: str = "A", tcp: bool = False, edns: EDNS0 | None = None
) -> DNSRecord | None:
    question = DNSRecord.question(name, qtype)
    if edns is not None:
        question.add_ar(edns)
    packet = asked.answer(bytes(question.pack()), tcp)
    return None if packet is None else DNSRecord.parse(packet)


def answered(asked: Responder, name: str, qtype: str = "A", tcp: bool = False, edns: EDNS0 | None = None) -> DNSRecord:
    reply = ask(asked, name, qtype, tcp, edns)
    assert reply is not None
    return reply


def addresses(reply: DNSRecord) -> list[str]:
    return [str(rr.rdata) for rr in reply.rr]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("wpinst", {"10.0.1.2"}),
        ("tasks.wpinst", {"10.0.1.5", "10.0.1.6"}),
        ("wpinst.wpnet", {"10.0.1.2"}),
        ("tasks.wpinst.wpnet", {"10.0.1.5", "10.0.1.6"}),
        ("blog", {"10.0.1.2", "10.0.1.7"}),
        ("tasks.blog", {"10.0.1.5", "10.0.1.6", "10.0.1.7"}),
        ("wpinst.1", {"10.0.1.5"}),
        ("1.wpinst", {"10.0.1.5"}),
        ("abc", {"10.0.1.5"}),
        ("wpinst.1.abc", {"10.0.1.5"}),
        ("wpinst.1.abc.wpnet", {"10.0.1.5"}),
        ("db", {"10.0.1.7"}),
        ("db.back", {"10.0.2.2"}),
        ("DB.Back", {"10.0.2.2"}),
        ("both", {"10.0.1.3"}),
        ("tasks.both", {"10.0.1.8"}),
        ("idle", set()),
        ("example.com", None),
        ("wpinst.other", None),
        ("xwpinst", None),
    ],
)
def test_the_addresses_of_a_name(name: str, found: set[str] | None) -> None:
    reply = ask(responder(WPNET, BACK), name)
    assert (None if reply is None else set(addresses(reply))) == found


@pytest.mark.parametrize(
    ("name", "found"), [("both", ["fd00:1::3"]), ("tasks.both", ["fd00:1::8"]), ("1.both", ["fd00:1::8"]), ("db", [])]
)
def test_ipv6_addresses_answer_aaaa_and_a_name_without_them_is_nodata(name: str, found: list[str]) -> None:
    reply = answered(responder(WPNET), name, "AAAA")
    assert (reply.header.rcode, addresses(reply)) == (RCODE.NOERROR, found)


def test_any_has_both_families_and_other_types_are_nodata() -> None:
    assert set(addresses(answered(responder(WPNET), "both", "ANY"))) == {"10.0.1.3", "fd00:1::3"}
    for qtype in ("TXT", "MX", "SRV", "PTR", "SOA"):
        reply = answered(responder(WPNET), "both", qtype)
        assert (reply.header.rcode, reply.rr) == (RCODE.NOERROR, [])


def test_the_order_of_networks_decides_a_shared_name() -> None:
    assert addresses(answered(responder(BACK, WPNET), "db")) == ["10.0.2.2"]


def reverse(address: str) -> str:
    return ipaddress.ip_address(address).reverse_pointer


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.1.5", "wpinst.1.abc.wpnet."),
        ("10.0.1.2", "wpinst.wpnet."),
        ("fd00:1::8", "both.1.ghi.wpnet."),
        ("fd00:1::3", "both.wpnet."),
    ],
)
def test_reverse_names_the_task_and_the_service(address: str, name: str) -> None:
    assert addresses(answered(responder(WPNET), reverse(address), "PTR")) == [name]
    assert answered(responder(WPNET), reverse(address), "A").rr == []


@pytest.mark.parametrize("name", ["9.9.9.9.in-addr.arpa", "5.1.0.in-addr.arpa", "x.1.0.10.in-addr.arpa", "f.ip6.arpa"])
def test_a_reverse_name_that_is_not_ours_is_forwarded(name: str) -> None:
    assert ask(responder(WPNET), name, "PTR") is None


def services(reply: DNSRecord) -> set[tuple[int, str]]:
    return {(rr.rdata.port, str(rr.rdata.target)) for rr in reply.rr}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("_http._tcp.wpinst", {(80, "wpinst.wpnet.")}),
        ("_80._tcp.wpinst", {(80, "wpinst.wpnet.")}),
        ("_80._TCP.blog.wpnet", {(80, "wpinst.wpnet.")}),
        ("_http._tcp.tasks.wpinst", {(80, "wpinst.1.abc.wpnet.")}),
        ("_5432._tcp.db", {(5432, "db.1.def.wpnet.")}),
        ("_53._udp.db", {(53, "db.1.def.wpnet.")}),
        ("_53._tcp.db", set()),
        ("_1._tcp.idle", set()),
    ],
)
def test_srv_names_the_port_and_a_target_that_resolves(name: str, found: set[tuple[int, str]]) -> None:
    asked = responder(WPNET)
    reply = answered(asked, name, "SRV")
    assert (reply.header.rcode, services(reply)) == (RCODE.NOERROR, found)
    for _, target in found:
        glue = [str(rr.rdata) for rr in reply.ar if str(rr.rname) == target]
        assert glue
        assert glue == addresses(answered(asked, target.rstrip(".")))


def test_a_port_of_a_service_that_is_not_ours_is_forwarded() -> None:
    assert ask(responder(WPNET), "_ldap._tcp.example.com", "SRV") is None


def test_a_search_domain_after_a_name_of_ours_does_not_leak_it() -> None:
    asked = responder(WPNET, search=("corp.example", "example"))
    for name in ("wpinst", "wpinst.wpnet", "tasks.wpinst", "abc"):
        assert set(addresses(answered(asked, f"{name}.corp.example"))) == set(addresses(answered(asked, name)))
    assert services(answered(asked, "_http._tcp.wpinst.corp.example", "SRV")) == {(80, "wpinst.wpnet.")}
    assert ask(asked, "www.corp.example") is None
    assert ask(asked, "corp.example") is None
    assert ask(responder(WPNET), "wpinst.corp.example") is None


def test_names_have_no_case_and_keep_the_asker_s_spelling() -> None:
    asked = responder(WPNET)
    for name in ("wpinst", "WpInst", "WPINST", "wPinst"):
        reply = answered(asked, name)
        assert addresses(reply) == ["10.0.1.2"]
        assert (str(reply.q.qname), str(reply.rr[0].rname)) == (f"{name}.", f"{name}.")


def test_unknown_names_are_forwarded_but_not_from_an_internal_network() -> None:
    assert ask(responder(WPNET), "example.com") is None
    assert ask(responder(WPNET, BACK), "example.com") is None
    assert ask(responder(), "example.com") is None
    assert answered(responder(BACK), "example.com").header.rcode == RCODE.NXDOMAIN


def test_another_class_is_refused_and_not_forwarded() -> None:
    packet = bytearray(DNSRecord.question("version.bind", "TXT").pack())
    packet[-1] = 3
    reply = responder(WPNET).answer(bytes(packet))
    assert reply is not None
    assert DNSRecord.parse(reply).header.rcode == RCODE.REFUSED


# ---------------------------------------------------------------- many addresses


def crowd(size: int) -> NetworkNames:
    every = tuple(f"10.0.{i // 250}.{i % 250 + 1}" for i in range(size))
    return NetworkNames("n", "net", False, (ServiceNames(("web",), None, every),), ())


@pytest.mark.parametrize("size", [2, 8, 30])
def test_each_address_comes_first_in_turn(size: int) -> None:
    asked = responder(crowd(size))
    key = bytes(DNSRecord.question("web").pack())
    firsts = []
    for _ in range(3 * size):
        known = asked.replies.get(key[2:], iter(()))
        assert not isinstance(known, bytes)
        body = next(known, None)
        packet = asked.answer(key) if body is None else key[:2] + body
        assert packet is not None
        firsts.append(addresses(DNSRecord.parse(packet))[0])
    assert {firsts.count(address) for address in set(firsts)} <= {2, 3, 4}
    assert len(set(firsts)) == size


def test_an_answer_too_long_for_udp_is_truncated_and_whole_over_tcp() -> None:
    asked = responder(crowd(100))
    short = answered(asked, "web")
    assert (short.header.tc, short.rr) == (1, [])
    whole = answered(asked, "web", tcp=True)
    assert (whole.header.tc, len(whole.rr)) == (0, 100)


def test_more_tasks_than_a_tcp_answer_holds_are_cut_to_what_fits() -> None:
    reply = answered(responder(crowd(10_000)), "web", tcp=True)
    assert reply.header.tc == 0
    assert len(reply.rr) > 1000


def test_edns_lets_a_longer_answer_through_udp_but_never_more_than_1232_bytes() -> None:
    asked = responder(crowd(40))
    assert answered(asked, "web").header.tc == 1
    reply = answered(asked, "web", edns=EDNS0(udp_len=4096))
    assert len(reply.rr) == 40
    assert [rr.edns_len for rr in reply.ar if rr.rtype == QTYPE.OPT] == [1232]
    assert answered(asked, "web", edns=EDNS0(udp_len=100)).header.tc == 1
    assert answered(responder(crowd(90)), "web", edns=EDNS0(udp_len=4096)).header.tc == 1


# ---------------------------------------------------------------- EDNS


def test_a_newer_edns_version_is_told_that_we_speak_version_0() -> None:
    reply = answered(responder(WPNET), "wpinst", edns=EDNS0(udp_len=1232, version=1))
    (opt,) = reply.ar
    assert (reply.rr, opt.edns_ver, opt.edns_rcode << 4 | reply.header.rcode) == ([], 0, 16)


def test_a_cookie_comes_back_with_one_of_ours_that_stays_the_same() -> None:
    asked = responder(WPNET)

    def cookie(sent: bytes) -> bytes:
        reply = answered(asked, "wpinst", edns=EDNS0(udp_len=1232, opts=[EDNSOption(10, sent)]))
        (option,) = reply.ar[0].rdata
        assert addresses(reply) == ["10.0.1.2"]
        return bytes(option.data)

    first = cookie(b"client01")
    assert (first[:8], len(first)) == (b"client01", 16)
    assert cookie(first) == first
    assert cookie(b"client02")[8:] != first[8:]


# ---------------------------------------------------------------- caches


def test_the_id_is_the_asker_s_even_from_the_cache() -> None:
    asked = responder(WPNET)
    for ident in (1, 777, 65535):
        question = DNSRecord.question("wpinst")
        question.header.id = ident
        assert DNSRecord.parse(asked.answer(bytes(question.pack())) or b"").header.id == ident


def test_only_plain_questions_are_kept_by_their_bytes_and_spellings_and_cookies_use_the_same_records() -> None:
    budget = CacheBudget()
    asked = Responder(view(WPNET), budget, cookie_key=b"secret")
    for _ in range(2):
        ask(asked, "wpinst")
    assert len(asked.replies) == 1
    used = budget.used_bytes
    chance = random.Random(1)
    for _ in range(1000):
        spelled = "".join(chance.choice((letter, letter.upper())) for letter in "wpinst")
        ask(asked, spelled, edns=EDNS0(udp_len=1232, opts=[EDNSOption(10, chance.randbytes(8))]))
    assert budget.used_bytes == used


def test_the_caches_stay_within_their_bytes_and_answers_go_on() -> None:
    budget = CacheBudget(20_000)
    some, other = (Responder(view(crowd(20)), budget) for _ in range(2))
    for size in range(512, 1512):
        for asked in (some, other):
            assert len(answered(asked, "web", edns=EDNS0(udp_len=size)).rr) == 20
            assert budget.used_bytes <= 20_000
    some.close()
    other.close()
    assert budget.used_bytes == 0


def test_a_changed_name_is_answered_anew_at_once() -> None:
    network = NetworkView(WPNET)
    asked = Responder(TaskView([network]), CacheBudget())
    for _ in range(3):
        assert addresses(answered(asked, "wpinst")) == ["10.0.1.2"]
    network.put_service(ServiceNames(("wpinst",), "10.0.1.9", ()))
    asked.forget()
    assert addresses(answered(asked, "wpinst")) == ["10.0.1.9"]
    assert addresses(answered(asked, "blog")) == ["10.0.1.7"], "the alias is only the other service's now"
    assert addresses(answered(asked, reverse("10.0.1.9"), "PTR")) == ["wpinst.wpnet."]
    assert ask(asked, reverse("10.0.1.2"), "PTR") is None


# ---------------------------------------------------------------- garbage


def test_mutated_questions_never_break_the_responder_nor_make_it_say_much() -> None:
    chance = random.Random(1)
    asked = responder(WPNET, BACK)
    question = DNSRecord.question("_http._tcp.tasks.wpinst", "SRV")
    question.add_ar(EDNS0(udp_len=4096, opts=[EDNSOption(10, b"client01")]))
    seeds = [bytes(question.pack()), bytes(DNSRecord.question("5.1.0.10.in-addr.arpa", "PTR").pack())]
    for _ in range(FUZZ_CASES):
        packet = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            packet[chance.randrange(len(packet))] = chance.randrange(256)
        try:
            reply = asked.answer(bytes(packet))
        except NotAQuestion:
            continue
        assert not packet[2] & 0x80, "a reply is never answered"
        if reply is not None:
            assert len(reply) <= 1232
            assert reply[:2] == packet[:2]
            assert reply[2] & 0x80


def test_an_alias_that_cannot_be_asked_for_harms_no_other_name() -> None:
    odd = NetworkNames("n", "net", False, (ServiceNames(("web", "a..b", "x" * 64, ""), "10.0.0.2", ()),), ())
    assert addresses(answered(responder(odd), "web")) == ["10.0.0.2"]


def test_a_label_that_contains_a_suffix_is_not_taken_for_one() -> None:
    one_label = b"\x0cwpinst" + (to_wire("wpnet") or b"")
    assert responder(WPNET).answer(b"\0\1\1\0\0\1\0\0\0\0\0\0" + one_label + b"\0\1\0\1") is None
