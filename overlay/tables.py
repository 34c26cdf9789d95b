"""One nftables table of one namespace: load it, change its elements, verify it. Runs inside that namespace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from overlay import nfnl, nft
from overlay.netlink import Message, Netlink
from overlay.ruleset import (
    Element,
    ElementChange,
    Elements,
    Layout,
    Value,
    chain_backends,
    element_change,
)

UNKNOWN = -1
"""A generation that the kernel never has: the table must be read."""
ChainMaker = Callable[[str, str], list[Message]]


@dataclass(slots=True)
class Table:
    layout: Layout
    make_chain: ChainMaker
    chain_rules: int
    """Rules that `make_chain` makes."""
    chains: set[str] = field(default_factory=set)
    """Balancing chains that stand."""
    generation: int = UNKNOWN
    """The namespace's nftables generation after our last transaction: as long as it is that, nobody changed
    anything."""

    def load(self, netlink: Netlink, elements: Mapping[Element, Value], fresh: bool) -> None:
        """Make it from nothing, replacing what stands unless the namespace is fresh."""
        before = nfnl.generation(netlink)
        nft.run(self.layout.text(replace=not fresh))
        self.chains = set()
        # Not asked for: somebody may have deleted the table since, and the audit would take it for ours.
        self.generation = before + 1
        self.change(netlink, element_change({}, elements))

    def messages(self, change: ElementChange) -> list[Message]:
        """One transaction's worth, with the chains that are new here. May be sent to any table in the same state."""
        missing = sorted(change.chains() - self.chains)
        made = [message for chain in missing for message in self.make_chain(self.layout.table, chain)]
        return [*made, *nfnl.change_messages(self.layout.table, change)]

    def change(self, netlink: Netlink, change: ElementChange, messages: list[Message] | None = None) -> None:
        """Atomic. `messages`: as made by `messages` for this change. Raises NetlinkError: nothing was changed."""
        if not change:
            return
        netlink.transaction(nfnl.transaction(self.messages(change) if messages is None else messages))
        self.chains |= change.chains()
        self.generation += 1

    def adopt(self, netlink: Netlink, wanted: Elements) -> bool:
        """Make it equal to `wanted`, touching only what differs; True when something did."""
        self.generation = nfnl.generation(netlink)
        standing = self._standing(netlink)
        if standing is None:
            self.load(netlink, wanted, fresh=False)
            return True
        change = element_change(standing, wanted)
        self.change(netlink, change)
        return bool(change)

    def audit(self, netlink: Netlink, wanted: Callable[[], Elements]) -> bool:
        """As `adopt`, but free of cost when no transaction has happened since."""
        if nfnl.generation(netlink) == self.generation:
            return False
        return self.adopt(netlink, wanted())

    def sweep(self, netlink: Netlink, used: frozenset[str]) -> None:
        """Delete balancing chains without a service. In a transaction of its own: before Linux 6.2 a chain counts
        as used until the one that removed its last element has been cleaned up."""
        unused = sorted(self.chains - used)
        if unused:
            netlink.transaction(
                nfnl.transaction([m for chain in unused for m in nfnl.drop_chain(self.layout.table, chain)])
            )
            self.chains -= set(unused)
            self.generation += 1

    def _standing(self, netlink: Netlink) -> Elements | None:
        """Elements that stand; None when the table's fixed part is not as it should be."""
        counts = nfnl.rule_counts(netlink, self.layout.table)
        balancing = {chain: count for chain, count in counts.items() if chain_backends(chain)}
        fixed = {chain: count for chain, count in counts.items() if chain not in balancing}
        if fixed != self.layout.rules() or any(count != self.chain_rules for count in balancing.values()):
            return None
        self.chains = set(balancing)
        return nfnl.elements(netlink, self.layout.table, self.layout.element_sets())


def task_table(layout: Layout) -> Table:
    return Table(layout, nfnl.vip_chain, nfnl.VIP_CHAIN_RULES)


def host_table(layout: Layout) -> Table:
    return Table(layout, nfnl.port_chain, nfnl.PORT_CHAIN_RULES)
