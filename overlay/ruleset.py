"""The fixed part of the nftables tables of a host and of a task, as values (pure).

Services are not in it: they are elements of its sets and maps (overlay/elements.py). What hooks into each packet is
kept short: translation is decided once per connection, in the nat chains.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field

from overlay.addressing import leg_pattern
from overlay.elements import AT, BACKENDS, GATEWAYS, HIDDEN, PUBLISHED, REFUSED, VIPS
from overlay.expressions import Rule, answer_to_ingress, recall_ingress, remember_ingress

TASK_TABLE = "pyswarm"
DNS_PORT = 53
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

    def text(self, replace: bool) -> str:
        """`replace`: a table of that name may stand; its deletion waits 15 ms for packets under way, which a fresh
        namespace is spared."""
        table = f"{'netdev' if self.family == NETDEV else FAMILY_WORDS[self.family].name} {self.table}"
        lines = [f"table {table}", f"delete table {table}"] if replace else []
        lines.append(f"table {table} {{")
        for name, declaration in self.sets:
            lines += [f"  {declaration.split()[0]} {name} {{", f"    {declaration.split(' ', 1)[1]}", "  }"]
        lines += [f"  chain {self.marker} {{", "  }"]
        for chain in self.chains:
            lines += [f"  chain {chain.name} {{", f"    {chain.hook}", *(f"    {rule}" for rule in chain.rules), "  }"]
        return "\n".join([*lines, "}", ""])


def layouts_text(layouts: Iterable[Layout], replace: bool) -> str:
    """All of them in one transaction."""
    return "".join(layout.text(replace) for layout in layouts)


def _refusal(words: Words) -> Chain:
    return Chain("refusal", ("meta l4proto tcp reject with tcp reset", f"reject with {words.port_unreachable}"))


def task_layouts(dns_address: str, dns_port: int, families: tuple[int, ...], default_link: str) -> tuple[Layout, ...]:
    """In a task's namespace: its DNS server, the VIPs of its networks, and answers by the host that a published
    connection came through. `default_link`: where its default route leads; "" = nowhere, or the kernel has no hook
    for this (then other hosts hide clients from the task)."""
    layouts = [_task_layout(family, dns_address, dns_port, bool(default_link)) for family in families]
    if default_link:
        hook = f'type filter hook egress device "{default_link}" priority 0; policy accept;'
        layouts.append(Layout(NETDEV, TASK_TABLE, (), (Chain("answer", (), hook, (answer_to_ingress(),)),)))
    return tuple(layouts)


def _task_layout(family: int, dns_address: str, dns_port: int, answers: bool) -> Layout:
    words = FAMILY_WORDS[family]
    name, address = words.name, words.address
    redirect = f"ip daddr {dns_address} {{}} dport {DNS_PORT} dnat to {dns_address}:{dns_port}"
    redirects = (redirect.format("udp"), redirect.format("tcp")) if family == socket.AF_INET else ()
    chains = [
        _refusal(words),
        Chain(
            "balance",
            (*redirects, f"{name} daddr vmap @{VIPS}"),
            "type nat hook output priority -100; policy accept;",
        ),
        Chain(
            "leave",
            (f"{name} daddr @{REFUSED} goto refusal",),
            "type filter hook output priority 0; policy accept;",
            (recall_ingress(),) if answers else (),
        ),
    ]
    if answers:
        hook = "type filter hook prerouting priority -150; policy accept;"
        chains.append(Chain("arrive", (), hook, (remember_ingress(),)))
    return Layout(
        family,
        TASK_TABLE,
        sets=(
            (VIPS, f"map type {address} : verdict"),
            (BACKENDS, f"map type {address} . mark : {address}"),
            (REFUSED, f"set type {address}"),
            (ASKED_BY_UDP, f"set type {address}; size {ASKED_MAX}; flags dynamic;"),
        ),
        chains=tuple(chains),
    )


def host_layouts(table: str, tag: str, own_addresses: dict[int, str], vxlan_port: int) -> tuple[Layout, ...]:
    """In the host's namespace: published ports, egress, and who may pass between legs and the world; one table for
    each family in `own_addresses`: this node's own address on the overlays (198.18.x.y)."""
    return tuple(_host_layout(family, table, tag, own, vxlan_port) for family, own in own_addresses.items())


def _host_layout(family: int, table: str, tag: str, own_address: str, vxlan_port: int) -> Layout:
    """iif/oif matches need a kernel of 5.7 or later in postrouting."""
    words = FAMILY_WORDS[family]
    name, address = words.name, words.address
    legs = f'"{leg_pattern(tag)}"'
    balance = (
        f"fib daddr type local {name} daddr . meta l4proto . th dport vmap @{PUBLISHED}{AT}",
        f"fib daddr type local meta l4proto . th dport vmap @{PUBLISHED}",
    )
    # "direction original": an answer to a connection of the host's own may carry a refused port as its destination.
    refused = "ct direction original"
    hide = f"oifname {legs} {{}} snat to {own_address} fully-random"
    service = "inet_proto . inet_service"
    return Layout(
        family,
        table,
        sets=(
            (PUBLISHED, f"map type {service} : verdict"),
            (BACKENDS, f"map type {service} . mark : {address} . inet_service"),
            (REFUSED, f"set type {service}"),
            (PUBLISHED + AT, f"map type {address} . {service} : verdict"),
            (BACKENDS + AT, f"map type {address} . {service} . mark : {address} . inet_service"),
            (REFUSED + AT, f"set type {address} . {service}"),
            (GATEWAYS, f"set type {address}"),
            (HIDDEN, f"set type {address}"),
        ),
        chains=(
            _refusal(words),
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
            Chain("balance_in", balance, "type nat hook prerouting priority -100; policy accept;"),
            Chain("balance_out", balance, "type nat hook output priority -100; policy accept;"),
            Chain(
                "source",
                (
                    # Clients keep their address, and the task answers through this host (`task_layouts`), except
                    # where the answer would not come: clients on an overlay, or with an address that every host has.
                    hide.format(f"iifname {legs}"),
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
        ),
    )
