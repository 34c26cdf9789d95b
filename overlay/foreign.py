"""Which rules on a host that are not ours would drop packets of ours: nft's JSON listing, evaluated (pure).

What a rule looks at and we do not know (marks, named sets, limits) makes its verdict possible, not certain.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = "pyswarm"
"""What the names of our own tables begin with."""
JUMPS_MAX = 16
"""As the kernel allows (NFT_JUMP_STACK_SIZE)."""
STEPS_MAX = 5_000
"""Rules looked at for one packet and hook: chains that call each other could make it millions."""
FAMILIES = ("ip", "inet")
_DROPS = ("drop", "reject")
_HEADERS = frozenset({"tcp", "udp", "udplite", "sctp", "icmp", "icmpv6", "igmp", "esp", "ah", "ip6", "arp", "vlan"})
_JUMPS = ("jump", "goto")
_CONDITIONS = ("xt", "limit", "vmap", "connlimit", "ct count")
"""Statements that decide about the verdict in ways that are not followed here."""
_NEW_STATES = frozenset({"new", "untracked"})
Rule = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of some traffic of ours, on its way through one hook."""

    traffic: str
    """vxlan | icmp | forward | "tcp 8000" """
    hooks: tuple[str, ...]
    address: str = ""
    """The other host's; "" = any."""
    fields: Mapping[str, object] = field(default_factory=dict)
    """As nft's JSON names them: "udp dport" -> 4789, "meta iifname" -> "eth0". What is left out is not known."""


@dataclass(frozen=True, slots=True)
class Drop:
    table: str
    """ "inet guard" """
    chain: str
    handle: int
    """0: the chain's policy."""
    packet: Packet
    certain: bool


@dataclass(slots=True)
class _Chain:
    hook: str = ""
    policy: str = "accept"
    rules: list[Rule] = field(default_factory=list)


def drops(listing: Mapping[str, Any], packets: Sequence[Packet]) -> Iterator[Drop]:
    """`listing`: what `nft -j list ruleset` prints. For each packet and chain with a hook, the first sure drop and
    the possible ones before it."""
    tables: dict[str, dict[str, _Chain]] = {}
    for item in listing.get("nftables", ()):
        kind, value = next(iter(item.items()))
        if kind in ("chain", "rule") and value["family"] in FAMILIES and not value["table"].startswith(OURS):
            chains = tables.setdefault(f"{value['family']} {value['table']}", {})
            chain = chains.setdefault(value["name"] if kind == "chain" else value["chain"], _Chain())
            if kind == "chain":
                chain.hook, chain.policy = value.get("hook", ""), value.get("policy", "accept")
            else:
                chain.rules.append(value)
    for table, chains in tables.items():
        for name, chain in chains.items():
            for packet in packets if chain.hook else ():
                if chain.hook in packet.hooks:
                    yield from _through(table, chains, name, packet)


def _through(table: str, chains: Mapping[str, _Chain], name: str, packet: Packet) -> Iterator[Drop]:
    walk = _Walk(table, chains, packet)
    verdict = walk.chain(name)
    yield from walk.found
    if verdict is None and chains[name].policy == "drop":
        yield Drop(table, name, 0, packet, walk.certain)


class _Walk:
    def __init__(self, table: str, chains: Mapping[str, _Chain], packet: Packet) -> None:
        self._table, self._chains, self._packet = table, chains, packet
        self.certain = True
        """Whether nothing so far may have accepted the packet."""
        self.found: list[Drop] = []
        self._steps = 0

    def chain(self, name: str, depth: int = 0) -> str | None:
        """The verdict that surely ends its way here; None = it may come to the end of the chain."""
        for rule in self._chains.get(name, _Chain()).rules if depth < JUMPS_MAX else ():
            self._steps += 1
            if self._steps > STEPS_MAX:
                self.certain = False
                return None
            holds, verdict, target = _read(rule, self._packet)
            if holds is False or not verdict:
                continue
            if verdict in _DROPS:
                certain = self.certain and holds is True
                self.found.append(Drop(self._table, name, rule.get("handle", 0), self._packet, certain))
                if holds:
                    return verdict
                continue
            self.certain = self.certain and holds is True
            if verdict in _JUMPS:
                inner = self.chain(target, depth + 1)
                if holds and (inner or verdict == "goto"):
                    return inner
            elif holds:
                return verdict if verdict == "accept" else None
        return None


def _read(rule: Rule, packet: Packet) -> tuple[bool | None, str, str]:
    """(whether its matches hold, None = not known; its verdict, "" = none; where a jump goes)"""
    holds: bool | None = True
    for expression in rule.get("expr", ()):
        kind, value = next(iter(expression.items()))
        if kind == "match":
            one = matches(value, packet)
            if one is False:
                return False, "", ""
            holds = holds if one else None
        elif kind in _JUMPS:
            return holds, kind, value["target"]
        elif kind in ("accept", "return", *_DROPS):
            return holds, kind, ""
        elif kind in _CONDITIONS:
            holds = None
    return holds, "", ""


def matches(match: Rule, packet: Packet) -> bool | None:
    """None: it depends on something that is not known."""
    key = _key(match["left"])
    if key == "ct state":
        return None if _NEW_STATES & set(_listed(match["right"])) else False
    if key not in packet.fields:
        header = key.partition(" ")[0]
        return False if header in _HEADERS and header != packet.fields["meta l4proto"] else None
    answers = [_equal(packet.fields[key], one) for one in _listed(match["right"])]
    found = True if True in answers else None if None in answers else False
    if match["op"] == "!=" and found is not None:
        return not found
    return found if match["op"] in ("==", "in") else None


def _key(left: object) -> str:
    """ "udp dport", "meta iifname", "ct state"; "" = something else."""
    if isinstance(left, Mapping):
        for kind, value in left.items():
            if kind == "payload" and "field" in value:
                return f"{value['protocol']} {value['field']}"
            if kind in ("meta", "ct") and "key" in value:
                return f"{kind} {value['key']}"
    return ""


def _listed(right: object) -> list[Any]:
    if isinstance(right, Mapping) and "set" in right:
        return list(right["set"])
    return list(right) if isinstance(right, list) else [right]


def _equal(value: object, one: object) -> bool | None:
    """Whether the value is, or lies in, this operand."""
    if isinstance(one, Mapping):
        if "prefix" in one:
            prefix = one["prefix"]
            network = ipaddress.ip_network(f"{prefix['addr']}/{prefix['len']}", strict=False)
            return ipaddress.ip_address(str(value)) in network
        if "range" in one:
            low, high = one["range"]
            return _order(low) <= _order(value) <= _order(high)
        return None
    if isinstance(one, str) and one.startswith("@"):
        return None
    if isinstance(one, str) and one.endswith("*"):
        return str(value).startswith(one[:-1])
    return str(value) == str(one)


def _order(value: object) -> int:
    text = str(value)
    return int(text) if text.isdigit() else int(ipaddress.ip_address(text))


def rule_texts(listing: str) -> dict[tuple[str, str, int], str]:
    """(table, chain, handle) -> the rule as written, from what `nft -a list ruleset` prints."""
    found: dict[tuple[str, str, int], str] = {}
    table = chain = ""
    for line in listing.splitlines():
        text, _, comment = line.strip().rpartition(" # handle ")
        if (opened := re.fullmatch(r"table (\w+ \S+) \{", text)) is not None:
            table, chain = opened[1], ""
        elif (opened := re.fullmatch(r"chain (\S+) \{", text)) is not None:
            chain = opened[1]
        elif text and comment.isdigit():
            found[table, chain, int(comment)] = text
    return found


def packets_of(
    vxlan_port: int, underlay: str, leg: str, peers: Iterable[str], published: Iterable[tuple[str, int]]
) -> list[Packet]:
    """What a host has to let through. `underlay`, `leg`: names of links ("" = none); `published`: (protocol, port)."""
    found: list[Packet] = []

    def add(traffic: str, hooks: tuple[str, ...], address: str, **fields: object) -> None:
        protocol = str(fields.pop("protocol"))
        named = {key.replace("_", " "): value for key, value in fields.items() if value != ""}
        common = {"meta l4proto": protocol, "ip protocol": protocol, "meta nfproto": "ipv4", "meta protocol": "ip"}
        found.append(Packet(traffic, hooks, address, common | named))

    for peer in peers:
        for traffic, fields in (
            ("vxlan", {"protocol": "udp", "udp_dport": vxlan_port, "th_dport": vxlan_port}),
            ("icmp", {"protocol": "icmp", "icmp_type": "echo-request"}),
        ):
            add(traffic, ("prerouting", "input"), peer, ip_saddr=peer, meta_iifname=underlay, **fields)
            add(traffic, ("output", "postrouting"), peer, ip_daddr=peer, meta_oifname=underlay, **fields)
    if leg:
        add("forward", ("forward",), "", protocol="tcp", meta_iifname=leg, meta_oifname=underlay)
    for protocol, port in published:
        fields = {"protocol": protocol, f"{protocol}_dport": port, "th_dport": port}
        add(f"{protocol} {port}", ("prerouting",), "", **fields)
    return found
