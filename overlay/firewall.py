"""Getting along with a firewall on the host whose default is to drop forwarded packets (Docker sets that up).

An `accept` in one nftables table does not overrule a drop in another, so the acceptance of packets from and
to our legs has to stand in the other firewall's own chain: Docker's DOCKER-USER, made for this, else FORWARD.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from overlay import nfnl
from overlay.addressing import leg_pattern
from overlay.netlink import NETLINK_NETFILTER, Netlink

COMMAND_TIMEOUT_S = 10
"""iptables waits for its lock (-w) and lists a few hundred rules; more is a stuck machine."""


def _rules(tag: str) -> list[list[str]]:
    legs = leg_pattern(tag)[:-1] + "+"
    mark = ["-m", "comment", "--comment", f"pyswarm {tag}", "-j", "ACCEPT"]
    return [["-i", legs, *mark], ["-o", legs, *mark]]


def openings(listing: str, tag: str) -> list[list[str]]:
    """iptables arguments that let our legs through, given `iptables -S` (pure). None needed: []."""
    lines = listing.splitlines()
    chain = "DOCKER-USER" if "-N DOCKER-USER" in lines else "FORWARD"
    if "-P FORWARD DROP" not in lines and chain == "FORWARD":
        return []
    # What may pass between the world and a leg is decided in our own table, which sees each packet too.
    present = [line for line in lines if line.startswith(f"-A {chain} ") and f"pyswarm {tag}" in line]
    return [
        ["-I", chain, "1", *rule]
        for rule in _rules(tag)
        if not any(f"{rule[0]} {rule[1]} " in line for line in present)
    ]


def closings(listing: str, tag: str) -> list[list[str]]:
    """iptables arguments that take our rules away again (pure)."""
    out = []
    for line in listing.splitlines():
        for chain in ("DOCKER-USER", "FORWARD"):
            if line.startswith(f"-A {chain} ") and f'"pyswarm {tag}"' in line:
                direction = "-i" if " -i " in line else "-o"
                rule = next(rule for rule in _rules(tag) if rule[0] == direction)
                out.append(["-D", chain, *rule])
    return out


def _iptables(*arguments: str) -> str | None:
    """Its output; None when it is not installed or fails."""
    try:
        done = subprocess.run(
            ["iptables", "-w", "5", *arguments], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _is_legacy() -> bool:
    """Whether iptables that are no nftables in disguise have rules in this namespace."""
    try:
        return "filter" in Path("/proc/net/ip_tables_names").read_text()
    except OSError:
        return False


class Firewall:
    """That of the host; to be called in its namespace."""

    def __init__(self, tag: str) -> None:
        self._tag = tag
        self._seen = -1
        """The nftables generation at the last look: while it is that, nothing has changed."""

    def let_through(self) -> list[str]:
        """Add what is missing; returns the commands run, for the log. Cheap where nothing has changed."""
        with Netlink(NETLINK_NETFILTER) as netlink:
            generation = nfnl.generation(netlink)
            # Listing would otherwise make the tables of iptables.
            in_use = _is_legacy() or (generation != self._seen and ("filter", "FORWARD") in nfnl.chains(netlink))
        self._seen = generation
        listing = _iptables("-S") if in_use else None
        wanted = openings(listing, self._tag) if listing is not None else []
        return [" ".join(rule) for rule in wanted if _iptables(*rule) is not None]

    def take_back(self) -> None:
        with Netlink(NETLINK_NETFILTER) as netlink:
            in_use = _is_legacy() or ("filter", "FORWARD") in nfnl.chains(netlink)
        listing = _iptables("-S") if in_use else None
        for rule in closings(listing, self._tag) if listing is not None else []:
            _iptables(*rule)
