"""Our nftables tables of one namespace: load them, change their elements, verify them. Runs inside that namespace."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from overlay import nfnl
from overlay.elements import Element, ElementChange, Elements, Value, element_change
from overlay.netlink import Message, Netlink, NetlinkError
from overlay.ruleset import NETDEV, Layout
from overlay.template import balancing_chains, template

UNKNOWN = -1
"""A generation that the kernel never has: the tables must be read."""
ALL_FAMILIES = (socket.AF_INET, socket.AF_INET6, NETDEV)
ChainMaker = Callable[[int, str, str], list[Message]]
Chains = frozenset[tuple[int, str]]
"""(family, balancing chain)"""


@dataclass(slots=True)
class Tables:
    """All of one name, one per family."""

    name: str
    make_chain: ChainMaker
    chain_rules: int
    """Rules that `make_chain` makes."""
    layouts: tuple[Layout, ...] = ()
    chains: set[tuple[int, str]] = field(default_factory=set)
    """Balancing chains that stand."""
    generation: int = UNKNOWN
    """The namespace's nftables generation after our last transaction: as long as it is that, nobody changed
    anything."""

    def load(self, netlink: Netlink, elements: Mapping[Element, Value], fresh: bool) -> None:
        """Make them, with all elements, in place of what stands, in one transaction. `fresh`: nothing stands; deleting
        waits 15 ms for packets under way. Raises NetworkError."""
        self.chains = set()
        self.generation = nfnl.generation(netlink)
        cleared = (
            () if fresh else [item for layout in self.layouts for item in nfnl.clear_table(layout.family, self.name)]
        )
        change = element_change({}, elements)
        self._transact(netlink, [*cleared, *template(self.layouts), *self.messages(change)])
        self.chains |= change.chains

    def _transact(self, netlink: Netlink, messages: list[Message]) -> None:
        if not messages:
            return
        try:
            netlink.transaction(nfnl.transaction(messages))
        except NetlinkError:
            self.generation = UNKNOWN  # the tables are not as we left them
            raise
        self.generation += 1

    def messages(self, change: ElementChange) -> list[Message]:
        """One transaction's worth, with the chains that are new here. May be sent to any tables in the same state."""
        missing = sorted(change.chains - self.chains)
        made = [message for family, chain in missing for message in self.make_chain(family, self.name, chain)]
        return [*made, *nfnl.change_messages(self.name, change)]

    def change(self, netlink: Netlink, change: ElementChange, messages: list[Message] | None = None) -> None:
        """Atomic. `messages`: as made by `messages` for this change. Raises NetlinkError: nothing was changed."""
        self._transact(netlink, self.messages(change) if messages is None else messages)
        self.chains |= change.chains

    def adopt(self, netlink: Netlink, layouts: tuple[Layout, ...], wanted: Elements) -> bool:
        """Make them equal to `layouts` and `wanted`, touching only what differs; True when something did."""
        self.layouts = layouts
        self.generation = nfnl.generation(netlink)
        surplus = self._surplus(netlink)
        standing = None if surplus else self._standing(netlink)
        if standing is None:
            self._transact(netlink, [nfnl.delete_table(family, self.name) for family in surplus])
            self.load(netlink, wanted, fresh=False)
            return True
        change = element_change(standing, wanted)
        try:
            self.change(netlink, change)
        except NetlinkError:  # something stands there that is none of ours
            self.load(netlink, wanted, fresh=False)
        return bool(change)

    def audit(self, netlink: Netlink, layouts: tuple[Layout, ...], wanted: Callable[[], Elements]) -> bool:
        """As `adopt`, but free of cost when no transaction has happened since."""
        if layouts == self.layouts and nfnl.generation(netlink) == self.generation:
            return False
        return self.adopt(netlink, layouts, wanted())

    def sweep(self, netlink: Netlink, used: Chains) -> None:
        """Delete balancing chains without a service. In a transaction of its own: before Linux 6.2 a chain counts
        as used until the one that removed its last element has been cleaned up."""
        unused = sorted(self.chains - used)
        self._transact(
            netlink, [message for family, chain in unused for message in nfnl.drop_chain(family, self.name, chain)]
        )
        self.chains -= set(unused)

    def _surplus(self, netlink: Netlink) -> list[int]:
        """Families of tables of ours that no layout is for (any more)."""
        others = set(ALL_FAMILIES) - {layout.family for layout in self.layouts}
        return [
            family for family in sorted(others) if any(table == self.name for table, _ in nfnl.chains(netlink, family))
        ]

    def _standing(self, netlink: Netlink) -> Elements | None:
        """Elements that stand; None when a fixed part is not as it should be."""
        found = balancing_chains(netlink, self.layouts)
        if found is None or any(count != self.chain_rules for count in found.values()):
            return None
        self.chains = set(found)
        elements: Elements = {}
        for layout in self.layouts:
            elements |= nfnl.elements(netlink, layout.family, self.name, layout.element_sets())
        return elements


def delete_tables(netlink: Netlink, name: str) -> None:
    """Those of every family; none: fine."""
    for family in ALL_FAMILIES:
        netlink.transaction(nfnl.transaction([nfnl.delete_table(family, name)]))


def task_tables(name: str) -> Tables:
    return Tables(name, nfnl.vip_chain, nfnl.VIP_CHAIN_RULES)


def host_tables(name: str) -> Tables:
    return Tables(name, nfnl.port_chain, nfnl.PORT_CHAIN_RULES)
