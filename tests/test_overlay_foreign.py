"""Foreign firewall rules, evaluated: which would drop packets of ours. The listings are nft's own, made here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.foreign import Drop, Packet, drops, packets_of, rule_texts

PEER, LEG = "192.0.2.2", "pysx-1"
PACKETS = packets_of(4789, "eth0", LEG, [PEER], [("tcp", 8000)])


def chain(hook: str, *rules: dict[str, Any], policy: str = "accept") -> list[dict[str, Any]]:
    where = {"family": "inet", "table": "guard"}
    made: list[dict[str, Any]] = [{"chain": {**where, "name": "c", "hook": hook, "policy": policy}}]
    for number, each in enumerate(rules, 1):
        made.append({"rule": {**where, "chain": "c", "handle": number, "expr": each["expr"]}})
    return made


def match(left: dict[str, Any], right: object, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def rule(*expressions: dict[str, Any]) -> dict[str, Any]:
    return {"expr": list(expressions)}


def payload(protocol: str, field: str) -> dict[str, Any]:
    return {"payload": {"protocol": protocol, "field": field}}


DROP, ACCEPT = {"drop": None}, {"accept": None}
VXLAN_PORT = match(payload("udp", "dport"), 4789)


def found(*items: dict[str, Any]) -> list[tuple[str, int, bool]]:
    return [(drop.packet.traffic, drop.handle, drop.certain) for drop in drops({"nftables": list(items)}, PACKETS)]


@pytest.mark.parametrize(
    "right",
    [4789, {"set": [53, 4789]}, {"range": [4000, 5000]}, {"set": [{"range": [4000, 5000]}]}],
)
def test_a_port_is_matched_as_a_number_a_set_or_a_range(right: object) -> None:
    assert found(*chain("input", rule(match(payload("udp", "dport"), right), DROP))) == [("vxlan", 1, True)]


def test_rules_of_other_protocols_addresses_and_states_do_not_concern_us() -> None:
    rules = [
        rule(match(payload("tcp", "dport"), 4789), DROP),
        rule(match(payload("ip", "saddr"), "198.51.100.1"), DROP),
        rule(match(payload("ip6", "saddr"), "fd00::1"), DROP),
        rule(match({"ct": {"key": "state"}}, ["established", "related"], "in"), DROP),
        rule(match({"meta": {"key": "iifname"}}, "lo"), DROP),
        rule(match({"meta": {"key": "iifname"}}, "eth*", "!="), DROP),
    ]
    assert found(*chain("input", *rules)) == []


def test_a_policy_drops_what_nothing_accepts() -> None:
    assert found(*chain("input", rule(VXLAN_PORT, ACCEPT), policy="drop")) == [("icmp", 0, True)]
    prefix = {"prefix": {"addr": "192.0.2.0", "len": 24}}
    assert found(*chain("input", rule(match(payload("ip", "saddr"), prefix), ACCEPT), policy="drop")) == []


def test_what_is_not_known_makes_a_drop_possible_only() -> None:
    mark = match({"meta": {"key": "mark"}}, 7)
    named = match(payload("ip", "saddr"), "@bad")
    assert found(*chain("input", rule(VXLAN_PORT, mark, DROP))) == [("vxlan", 1, False)]
    assert found(*chain("input", rule(VXLAN_PORT, named, DROP))) == [("vxlan", 1, False)]
    assert found(*chain("input", rule(VXLAN_PORT, mark, ACCEPT), rule(VXLAN_PORT, DROP))) == [("vxlan", 2, False)]
    assert found(*chain("input", rule(VXLAN_PORT, {"limit": {"rate": 5}}, DROP))) == [("vxlan", 1, False)]


def test_jumps_are_followed_and_return() -> None:
    inner = {"chain": {"family": "inet", "table": "guard", "name": "inner"}}
    where = {"family": "inet", "table": "guard", "chain": "inner"}
    verdict = {"rule": {**where, "handle": 9, "expr": [VXLAN_PORT, DROP]}}
    early = {"rule": {**where, "handle": 8, "expr": [VXLAN_PORT, {"return": None}]}}
    jump = rule({"jump": {"target": "inner"}})
    assert found(*chain("input", jump), inner, verdict) == [("vxlan", 9, True)]
    assert found(*chain("input", jump), inner, early, verdict) == []
    loop = {"rule": {**where, "handle": 7, "expr": [{"jump": {"target": "inner"}}]}}
    assert found(*chain("input", jump), inner, loop) == []


def test_our_own_tables_and_other_hooks_are_left_out() -> None:
    ours = json.loads(json.dumps(chain("input", rule(VXLAN_PORT, DROP))).replace("guard", "pyswarm_ab"))
    assert found(*ours) == []
    assert found(*chain("forward", policy="drop")) == [("forward", 0, True)]
    assert found(*chain("prerouting", rule(match(payload("tcp", "dport"), 8000), DROP))) == [("tcp 8000", 1, True)]


LEFTS = st.sampled_from([payload("udp", "dport"), payload("ip", "saddr"), {"meta": {"key": "mark"}}, {"numgen": {}}, 5])
RIGHTS = st.sampled_from([4789, "@set", {"set": [1, "x"]}, {"range": [1, 9]}, {"&": [1, 2]}, [1, 2], "10.0.0.1", None])
RULES = st.builds(
    lambda left, right, op, end: rule(match(left, right, op), end),
    LEFTS,
    RIGHTS,
    st.sampled_from(["==", "!=", "in", "<"]),
    st.sampled_from([DROP, ACCEPT, {"counter": None}, {"jump": {"target": "c"}}, {"goto": {"target": "nowhere"}}]),
)


@given(st.lists(RULES, max_size=6), st.sampled_from(["accept", "drop"]))
def test_no_listing_makes_it_fail(rules: list[dict[str, Any]], policy: str) -> None:
    for drop in drops({"nftables": chain("input", *rules, policy=policy)}, PACKETS):
        assert drop.chain == "c"


@pytest.fixture
def namespace() -> Iterator[str]:
    name = "pyswarm-test-foreign"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


RULESET = f"""
table inet guard {{
  set bad {{ type ipv4_addr; elements = {{ 198.51.100.1 }} }}
  chain input {{
    type filter hook input priority 0; policy drop;
    ct state established,related accept
    iifname "lo" accept
    ip saddr {{ 10.0.0.0/8, {PEER} }} udp dport 4700-4800 counter drop
    ip saddr @bad drop
    jump pings
  }}
  chain pings {{
    meta l4proto {{ icmp, ipv6-icmp }} accept
  }}
}}
"""


@pytest.mark.root
def test_what_nft_itself_lists_is_understood(namespace: str) -> None:
    def nft(*arguments: str, text: str | None = None) -> str:
        argv = ["ip", "netns", "exec", namespace, "nft", *arguments]
        return subprocess.run(argv, input=text, capture_output=True, text=True, check=True).stdout

    nft("-f", "-", text=RULESET)
    listing = json.loads(nft("-j", "-t", "list", "ruleset"))
    texts = rule_texts(nft("-a", "-t", "list", "ruleset"))
    certain = [drop for drop in drops(listing, PACKETS) if drop.certain]
    assert [shown(drop, texts) for drop in certain] == [
        ("vxlan", "inet guard", "ip saddr { 10.0.0.0/8, 192.0.2.2 } udp dport 4700-4800 counter packets 0 bytes 0 drop")
    ]


def shown(drop: Drop, texts: dict[tuple[str, str, int], str]) -> tuple[str, str, str]:
    return drop.packet.traffic, drop.table, texts[drop.table, drop.chain, drop.handle]


def test_packets_name_the_hooks_that_they_meet() -> None:
    by_traffic: dict[str, set[str]] = {}
    for packet in PACKETS:
        assert isinstance(packet, Packet)
        by_traffic.setdefault(packet.traffic, set()).update(packet.hooks)
    ends = {"prerouting", "input", "output", "postrouting"}
    assert by_traffic == {"vxlan": ends, "icmp": ends, "forward": {"forward"}, "tcp 8000": {"prerouting"}}
