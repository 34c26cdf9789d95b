"""The fixed part of the nftables tables of a host and of a task, as values (pure).

Services are not in it: they are elements of its sets and maps (overlay/elements.py). What hooks into each packet is
kept short: translation is decided once per connection, in the nat chains.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from overlay.addressing import leg_pattern
from overlay.elements import AT, BACKENDS, GATEWAYS, HIDDEN, MARKS, PUBLISHED, REFUSED, VIPS
from overlay.expressions import Rule, answer_to_ingress, recall_ingress, remember_ingress
from overlay.interface import Balancer

TASK_TABLE = "pyswarm"
DNS_PORT = 53
FROM_TASK_MARK = 0x70797377
"""Of connections, in a host's namespace under IPVS."""
NETDEV = 5
"""nf_tables family of hooks at a link."""
ASKED_BY_UDP = "asked_udp"
"""VIPs that the task has sent UDP to, noted by its balancing chains. Forgetting stale flows walks the machine's
whole connection table (10 ms), so it is done only where this says that there can be any."""
ASKED_MAX = 1024
"""The kernel allocates the set for its full size at once: 64 K entries take 6 ms and 1 MiB per task."""


@dataclass(frozen=True, slots=True)
class Words:
    """What differs between the two families in nft's text."""

    name: str
    address: str
    loopback: str
    port_unreachable: str
    prohibited: str


FAMILY_WORDS: dict[int, Words] = {
    socket.AF_INET: Words("ip", "ipv4_addr", "127.0.0.0/8", "icmp port-unreachable", "icmp admin-prohibited"),
    socket.AF_INET6: Words("ip6", "ipv6_addr", "::1", "icmpv6 port-unreachable", "icmpv6 admin-prohibited"),
}


@dataclass(frozen=True, slots=True)
class Chain:
    name: str
    rules: tuple[str, ...]
    hook: str = ""
    """ "" = it is jumped to."""
    device: str = ""
    """The link that it hooks at, in a netdev table."""
    raw: tuple[Rule, ...] = ()
    """After the others: rules that nft's text has no words for."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The fixed part of one table: text for nft, and what an audit needs to know of it."""

    family: int
    table: str
    sets: tuple[tuple[str, str], ...]
    """(name, declaration)"""
    chains: tuple[Chain, ...]
    marker: str = field(init=False)
    """An empty chain named after the layout's digest: a table with it was made by this version of the text."""

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(repr((self.table, self.sets, self.chains)).encode(), digest_size=4).hexdigest()
        object.__setattr__(self, "marker", f"layout_{digest}")

    def rules(self) -> dict[str, int]:
        """Rules that each chain has."""
        return {self.marker: 0} | {chain.name: len(chain.rules) + len(chain.raw) for chain in self.chains}

    def element_sets(self) -> tuple[str, ...]:
        """Those that we fill (packets fill the others)."""
        return tuple(name for name, declaration in self.sets if "dynamic" not in declaration)

    def text(self) -> str:
        table = f"{'netdev' if self.family == NETDEV else FAMILY_WORDS[self.family].name} {self.table}"
        lines = [f"table {table} {{"]
        for name, declaration in self.sets:
            lines += [f"  {declaration.split()[0]} {name} {{", f"    {declaration.split(' ', 1)[1]}", "  }"]
        lines += [f"  chain {self.marker} {{", "  }"]
        for chain in self.chains:
            lines += [f"  chain {chain.name} {{", f"    {chain.hook}", *(f"    {rule}" for rule in chain.rules), "  }"]
        return "\n".join([*lines, "}", ""])


def layouts_text(layouts: Iterable[Layout]) -> str:
    """For nft, in a namespace that has none of them."""
    return "".join(layout.text() for layout in layouts)


def _refusal(words: Words) -> Chain:
    return Chain("refusal", ("meta l4proto tcp reject with tcp reset", f"reject with {words.port_unreachable}"))


@lru_cache(maxsize=64)
def task_layouts(
    balancer: Balancer, dns: tuple[str, int], families: tuple[int, ...], ways_out: tuple[str, ...]
) -> tuple[Layout, ...]:
    """In a task's namespace: its DNS server (address and port), the VIPs of its networks, and answers by the host that
    a published connection came through. `ways_out`: links that default routes lead to; none = the task has none, or
    the kernel has no hook for this (then other hosts hide clients from the task). Cached: tasks have one of a few."""
    layouts = [_task_layout(family, balancer, dns, bool(ways_out)) for family in families]
    chains = tuple(
        Chain(
            f"answer_{link}",
            rules=(),
            hook=f'type filter hook egress device "{link}" priority 0; policy accept;',
            device=link,
            raw=(answer_to_ingress(),),
        )
        for link in ways_out
    )
    return (*layouts, *([Layout(NETDEV, TASK_TABLE, (), chains)] if chains else []))


def _task_layout(family: int, balancer: Balancer, dns: tuple[str, int], answers: bool) -> Layout:
    words = FAMILY_WORDS[family]
    name, address = words.name, words.address
    redirect = f"ip daddr {dns[0]} {{}} dport {DNS_PORT} dnat to {dns[0]}:{dns[1]}"
    redirects = (redirect.format("udp"), redirect.format("tcp")) if family == socket.AF_INET else ()
    nftables = balancer == "nftables"
    chains = [
        _refusal(words),
        Chain(
            "balance",
            (*redirects, f"{name} daddr vmap @{VIPS}") if nftables else redirects,
            "type nat hook output priority -100; policy accept;",
        ),
        Chain(
            "leave",
            (f"{name} daddr @{REFUSED} goto refusal",),
            "type filter hook output priority 0; policy accept;",
            raw=(recall_ingress(),) if answers else (),
        ),
    ]
    if answers:
        hook = "type filter hook prerouting priority -150; policy accept;"
        chains.append(Chain("arrive", (), hook, raw=(remember_ingress(),)))
    if not nftables:
        give_mark = f"meta mark set {name} daddr . meta l4proto map @{VIPS}"
        # IPVS leaves a packet on the way to its VIP even if the chosen backend is this task itself: routed again.
        route_again = "meta mark != 0 fib daddr type local meta mark set 0"
        chains += [
            Chain("give_mark", (give_mark,), "type filter hook output priority -150; policy accept;"),
            Chain("hairpin", (route_again,), "type route hook output priority -90; policy accept;"),
        ]
        sets: tuple[tuple[str, str], ...] = ((VIPS, f"map type {address} . inet_proto : mark"),)
    else:
        sets = (
            (VIPS, f"map type {address} : verdict"),
            (BACKENDS, f"map type {address} . mark : {address}"),
            (ASKED_BY_UDP, f"set type {address}; size {ASKED_MAX}; flags dynamic;"),
        )
    return Layout(family, TASK_TABLE, ((REFUSED, f"set type {address}"), *sets), tuple(chains))


def host_layouts(
    balancer: Balancer, table: str, tag: str, own_addresses: dict[int, str], vxlan_port: int
) -> tuple[Layout, ...]:
    """In the host's namespace: published ports, egress, and who may pass between legs and the world; one table for
    each family in `own_addresses`: this node's own address on the overlays (198.18.x.y)."""
    out = []
    for family, own in own_addresses.items():
        words = FAMILY_WORDS[family]
        legs = f'"{leg_pattern(tag)}"'
        sets, balance = (_balance_ports if balancer == "nftables" else _mark_ports)(words, legs)
        service = "inet_proto . inet_service"
        sets = (
            *sets,
            (REFUSED, f"set type {service}"),
            (REFUSED + AT, f"set type {words.address} . {service}"),
            (GATEWAYS, f"set type {words.address}"),
            (HIDDEN, f"set type {words.address}"),
        )
        chains = (_refusal(words), *balance, *_host_chains(words, legs, own, vxlan_port))
        out.append(Layout(family, table, sets, chains))
    return tuple(out)


Parts = tuple[tuple[tuple[str, str], ...], tuple[Chain, ...]]
"""(sets, chains)"""


def _balance_ports(words: Words, legs: str, condition: str = "") -> Parts:
    name, address, service = words.name, words.address, "inet_proto . inet_service"
    rules = (
        f"{condition}fib daddr type local {name} daddr . meta l4proto . th dport vmap @{PUBLISHED}{AT}",
        f"{condition}fib daddr type local meta l4proto . th dport vmap @{PUBLISHED}",
    )
    return (
        (PUBLISHED, f"map type {service} : verdict"),
        (BACKENDS, f"map type {service} . mark : {address} . inet_service"),
        (PUBLISHED + AT, f"map type {address} . {service} : verdict"),
        (BACKENDS + AT, f"map type {address} . {service} . mark : {address} . inet_service"),
    ), (
        Chain("balance_in", rules, "type nat hook prerouting priority -100; policy accept;"),
        Chain("balance_out", rules, "type nat hook output priority -100; policy accept;"),
    )


def _mark_ports(words: Words, legs: str) -> Parts:
    name, address, service = words.name, words.address, "inet_proto . inet_service"
    # IPVS drops what comes from 127.0.0.1 and leaves the host: that is balanced by nftables here, too.
    sets, (_, balance_out) = _balance_ports(words, legs, f"{name} saddr {words.loopback} ")
    # "direction original": an answer to a connection of the host's own may carry a published port as its destination.
    condition = f"ct direction original {name} saddr != {words.loopback} fib daddr type local"
    rules = (
        f"{condition} meta mark set meta l4proto . th dport map @{MARKS}",
        f"{condition} meta mark set {name} daddr . meta l4proto . th dport map @{MARKS}{AT}",
    )
    # What IPVS sends on has no incoming link any more: the chain `source` knows tasks' own connections by this.
    from_task = f"iifname {legs} ct state new ct mark set {FROM_TASK_MARK:#x}"
    return (
        *sets,
        (MARKS, f"map type {service} : mark"),
        (MARKS + AT, f"map type {address} . {service} : mark"),
    ), (
        balance_out,
        Chain("mark_in", (from_task, *rules), "type filter hook prerouting priority -150; policy accept;"),
        Chain("mark_out", rules, "type filter hook output priority -150; policy accept;"),
    )


def _host_chains(words: Words, legs: str, own_address: str, vxlan_port: int) -> tuple[Chain, ...]:
    """iif/oif matches need a kernel of 5.7 or later in postrouting."""
    name = words.name
    # "direction original": an answer to a connection of the host's own may carry a refused port as its destination.
    refused = "ct direction original"
    hide = f"oifname {legs} {{}} snat to {own_address} fully-random"
    return (
        Chain(
            "raw_in",
            (
                # route_localnet is on for legs: without this a task could reach what listens on 127.0.0.1 only.
                f"iifname {legs} {name} daddr {words.loopback} drop",
                f"udp dport {vxlan_port} notrack",
            ),
            "type filter hook prerouting priority -300; policy accept;",
        ),
        Chain(
            "raw_out",
            (f"udp dport {vxlan_port} notrack",),
            "type filter hook output priority -300; policy accept;",
        ),
        Chain(
            "source",
            (
                # Clients keep their address, and the task answers through this host (`task_layouts`), except
                # where the answer would not come: clients on an overlay, or with an address that every host has.
                hide.format(f"iifname {legs}"),
                hide.format(f"ct mark {FROM_TASK_MARK:#x}"),
                hide.format(f"{name} saddr {words.loopback}"),
                hide.format(f"{name} saddr @{GATEWAYS}"),
                hide.format(f"{name} daddr @{HIDDEN}"),
                f"oifname {legs} accept",
                f"iifname {legs} masquerade fully-random",
            ),
            "type nat hook postrouting priority 100; policy accept;",
        ),
        Chain(
            "passage",
            (
                f"oifname != {legs} accept",
                "ct state established,related accept",
                "ct status dnat accept",
                # From outside, or from another network's tasks: only published ports lead into a network.
                f"reject with {words.prohibited}",
            ),
            "type filter hook forward priority 0; policy accept;",
        ),
        Chain(
            "refuse",
            (
                f"{refused} meta l4proto . th dport @{REFUSED} goto refusal",
                f"{refused} {name} daddr . meta l4proto . th dport @{REFUSED}{AT} goto refusal",
            ),
            "type filter hook input priority 0; policy accept;",
        ),
    )
