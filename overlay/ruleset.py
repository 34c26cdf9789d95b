"""The nftables tables of a host and of a task, as values (pure).

The shape of a table is fixed (`Layout`); services live only in the elements of its maps, so a change of
backends costs the same whether there is one service or a thousand. A service with K backends is sent to a
chain for K, which counts round robin and looks the backend up by (service, count).

All services with the same K could share one chain, but its counter as well: a client that asks service A, then B,
then A... would meet the same backend of A each time. So there are LANES chains for each K, chosen by address.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from overlay.addressing import leg_pattern
from overlay.interface import PublishedPort

LANES = 64
"""Of two services with equally many backends, one pair in 64 shares a counter; chains stay few."""
TASK_TABLE = "pyswarm"
DNS_PORT = 53
ASKED_BY_UDP = "asked_udp"
"""VIPs that the task has sent UDP to, noted by its balancing chains. Forgetting stale flows walks the machine's
whole connection table (10 ms), so it is done only where this says that there can be any."""
ASKED_MAX = 1024
"""The kernel allocates the set for its full size at once: 64 K entries take 6 ms and 1 MiB per task."""
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}

Element = tuple[str, bytes]
"""(set, key as the kernel has it)"""
Value = bytes | str | None
"""What a map holds for it: data, the chain to go to, or None in a plain set."""
Elements = dict[Element, Value]


@dataclass(frozen=True, slots=True)
class Chain:
    name: str
    rules: tuple[str, ...]
    hook: str


@dataclass(frozen=True, slots=True)
class Layout:
    """The fixed part of one table: text for nft, and what an audit needs to know of it."""

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
        return {self.marker: 0} | {chain.name: len(chain.rules) for chain in self.chains}

    def element_sets(self) -> tuple[str, ...]:
        """Those that we fill (packets fill the others)."""
        return tuple(name for name, declaration in self.sets if "dynamic" not in declaration)

    def text(self, replace: bool) -> str:
        """One transaction. `replace`: a table of that name may stand; its deletion waits 15 ms for packets under
        way, which a fresh namespace is spared."""
        lines = [f"table ip {self.table}", f"delete table ip {self.table}"] if replace else []
        lines.append(f"table ip {self.table} {{")
        for name, declaration in self.sets:
            lines += [f"  {declaration.split()[0]} {name} {{", f"    {declaration.split(' ', 1)[1]}", "  }"]
        lines += [f"  chain {self.marker} {{", "  }"]
        for chain in self.chains:
            lines += [f"  chain {chain.name} {{", f"    {chain.hook}", *(f"    {rule}" for rule in chain.rules), "  }"]
        return "\n".join([*lines, "}", ""])


def task_layout(dns_address: str, dns_port: int) -> Layout:
    """In a task's namespace: its DNS server, the VIPs of its networks."""
    redirect = f"ip daddr {dns_address} {{}} dport {DNS_PORT} dnat to {dns_address}:{dns_port}"
    return Layout(
        table=TASK_TABLE,
        sets=(
            ("vips", "map type ipv4_addr : verdict"),
            ("backends", "map type ipv4_addr . mark : ipv4_addr"),
            ("refused", "set type ipv4_addr"),
            (ASKED_BY_UDP, f"set type ipv4_addr; size {ASKED_MAX}; flags dynamic;"),
        ),
        chains=(
            Chain(
                "balance",
                (redirect.format("udp"), redirect.format("tcp"), "ip daddr vmap @vips"),
                "type nat hook output priority -100; policy accept;",
            ),
            Chain(
                "refuse",
                (
                    "ip daddr @refused meta l4proto tcp reject with tcp reset",
                    "ip daddr @refused reject with icmp port-unreachable",
                ),
                "type filter hook output priority 0; policy accept;",
            ),
        ),
    )


def host_layout(table: str, tag: str, own_address: str, vxlan_port: int) -> Layout:
    """In the host's namespace: published ports, egress, and who may pass between legs and the world.

    `own_address` is this node's 198.18.x.y: all that leaves by a leg comes from it, so that the backend's
    answer finds back to this host. iif/oif matches need a kernel of 5.7 or later in postrouting.
    """
    legs = f'"{leg_pattern(tag)}"'
    balance = "fib daddr type local meta l4proto . th dport vmap @published"
    # "direction original": an answer to a connection of the host's own may carry a refused port as its destination.
    refused = "ct direction original meta l4proto . th dport @refused fib daddr type local"
    return Layout(
        table=table,
        sets=(
            ("published", "map type inet_proto . inet_service : verdict"),
            ("backends", "map type inet_proto . inet_service . mark : ipv4_addr . inet_service"),
            ("refused", "set type inet_proto . inet_service"),
        ),
        chains=(
            Chain(
                "raw_in",
                (
                    # route_localnet is on for legs: without this a task could reach what listens on 127.0.0.1 only.
                    f"iifname {legs} ip daddr 127.0.0.0/8 drop",
                    f"udp dport {vxlan_port} notrack",
                ),
                "type filter hook prerouting priority -300; policy accept;",
            ),
            Chain(
                "raw_out",
                (f"udp dport {vxlan_port} notrack",),
                "type filter hook output priority -300; policy accept;",
            ),
            Chain("balance_in", (balance,), "type nat hook prerouting priority -100; policy accept;"),
            Chain("balance_out", (balance,), "type nat hook output priority -100; policy accept;"),
            Chain(
                "source",
                (
                    f"oifname {legs} snat to {own_address} fully-random",
                    f"iifname {legs} masquerade fully-random",
                ),
                "type nat hook postrouting priority 100; policy accept;",
            ),
            Chain(
                "passage",
                (
                    f"oifname {legs} ct state established,related accept",
                    f"oifname {legs} ct status dnat accept",
                    # From outside, or from another network's tasks: only published ports lead into a network.
                    f"oifname {legs} reject with icmp admin-prohibited",
                ),
                "type filter hook forward priority 0; policy accept;",
            ),
            Chain(
                "refuse",
                (
                    f"{refused} meta l4proto tcp reject with tcp reset",
                    f"{refused} reject with icmp port-unreachable",
                ),
                "type filter hook input priority 0; policy accept;",
            ),
        ),
    )


# --- elements ----------------------------------------------------------------------------------------


def chain_name(backends: int, lane: int) -> str:
    return f"k{backends}_{lane}"


def chain_backends(name: str) -> int:
    """K of a chain made by `chain_name`; 0 for any other chain."""
    count, _, lane = name[1:].partition("_")
    return int(count) if name.startswith("k") and count.isdigit() and lane.isdigit() else 0


def _mark(number: int) -> bytes:
    return struct.pack("=I", number)


def vip_chain_name(address: str, backends: int) -> str:
    return chain_name(backends, socket.inet_aton(address)[3] % LANES)


def vip_elements(address: str, backends: tuple[str, ...]) -> Elements:
    key = socket.inet_aton(address)
    if not backends:
        return {("refused", key): None}
    out: Elements = {("vips", key): vip_chain_name(address, len(backends))}
    for number, backend in enumerate(backends):
        out["backends", key + _mark(number)] = socket.inet_aton(backend)
    return out


def port_key(protocol: str, port: int) -> bytes:
    return struct.pack(">BxxxHxx", PROTOCOLS[protocol], port)


def port_elements(published: PublishedPort) -> Elements:
    key = port_key(published.protocol, published.port)
    if not published.backends:
        return {("refused", key): None}
    out: Elements = {("published", key): chain_name(len(published.backends), published.port % LANES)}
    for number, (address, port) in enumerate(published.backends):
        out["backends", key + _mark(number)] = socket.inet_aton(address) + struct.pack(">Hxx", port)
    return out


def chains_of(elements: Mapping[Element, Value]) -> frozenset[str]:
    """Chains that verdict maps among the elements lead to."""
    return frozenset(value for value in elements.values() if isinstance(value, str))


@dataclass(frozen=True, slots=True)
class ElementChange:
    """From one picture of a table's elements to another, to be done in one transaction."""

    remove: tuple[tuple[Element, Value], ...]
    add: tuple[tuple[Element, Value], ...]

    def __bool__(self) -> bool:
        return bool(self.remove or self.add)

    def chains(self) -> frozenset[str]:
        return frozenset(value for _, value in self.add if isinstance(value, str))


def element_change(old: Mapping[Element, Value], new: Mapping[Element, Value]) -> ElementChange:
    absent = object()
    return ElementChange(
        tuple((key, value) for key, value in old.items() if new.get(key, absent) != value),
        tuple((key, value) for key, value in new.items() if old.get(key, absent) != value),
    )


def joined(changes: Iterable[ElementChange]) -> ElementChange:
    found = [change for change in changes if change]
    if len(found) == 1:
        return found[0]
    return ElementChange(
        tuple(item for change in found for item in change.remove),
        tuple(item for change in found for item in change.add),
    )
