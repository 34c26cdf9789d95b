"""Settings of the kernel that the overlay needs: of the host, of each leg, of each namespace of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import structlog

from overlay import namespaces
from overlay.plan import Leg
from overlay.rtnl import LEG_SETTINGS

log = structlog.get_logger("overlay")

NO_ADDRESS = "1"
"""addr_gen_mode "none": link-local addresses are given like the others, so that one that is missing is missed."""
TASK_SYSCTLS = {
    # As Docker: ping and low ports need no privilege inside a container.
    "net.ipv4.ip_unprivileged_port_start": "0",
    "net.ipv4.ping_group_range": "0 2147483647",
    # Answers may come by another of the task's networks than their question left by.
    "net.ipv4.conf.all.rp_filter": "2",
    # A published port of this host leads back into the network it was asked from: the host would redirect.
    "net.ipv4.conf.all.accept_redirects": "0",
    "net.ipv4.conf.default.accept_redirects": "0",
}
IPV6_SYSCTLS = {
    # Off, until a link of a network that has IPv6 turns it on.
    "net.ipv6.conf.default.disable_ipv6": "1",
    # Addresses and routes are given, not advertised; and no address is ever taken: usable at once.
    "net.ipv6.conf.default.accept_ra": "0",
    "net.ipv6.conf.default.autoconf": "0",
    "net.ipv6.conf.default.accept_dad": "0",
    "net.ipv6.conf.default.accept_redirects": "0",
    "net.ipv6.conf.default.addr_gen_mode": NO_ADDRESS,
}
"""Of each namespace of ours; optional, since IPv6 may be absent from the kernel."""
HOST_MINIMA = {
    f"net.{family}.neigh.default.{name}": limit
    for family in ("ipv4", "ipv6")
    for name, limit in (("gc_thresh2", 16384), ("gc_thresh3", 32768))
} | {"net.netfilter.nf_conntrack_tcp_timeout_established": 432_000}
"""The machine's neighbour tables are shared by all namespaces; the default of 1,024 is 10 tasks of 100 peers. A
connection by a published port is remembered for 5 days, the kernel's default: some hosts lower it below the two hours
after which a TCP keepalive speaks."""
FORWARD6 = ("net.ipv6.conf.all.force_forwarding", "net.ipv6.conf.default.force_forwarding")
"""Linux 6.17: forwards without making the host a router, which would stop it from hearing router advertisements. "all"
reaches only the links that exist when it is set."""


def set_optional(name: str, value: str) -> None:
    """A sysctl that some kernels lack (IPv6 off, no br_netfilter)."""
    with contextlib.suppress(OSError):
        namespaces.sysctl(name, value)


def set_all_optional(sysctls: Mapping[str, str]) -> None:
    for name, value in sysctls.items():
        set_optional(name, value)


def set_host_sysctls(ipv6: bool) -> None:
    """`ipv6`: whether any network has it."""
    if namespaces.read_sysctl("net.ipv4.ip_forward") != "1":
        namespaces.sysctl("net.ipv4.ip_forward", "1")
        log.info("ip_forward_enabled")
    if ipv6:
        _forward6()
    for name, least in HOST_MINIMA.items():
        value = namespaces.read_sysctl(name)
        if value is not None and int(value) < least:
            set_optional(name, str(least))


def _forward6() -> None:
    """All links, as for IPv4: what comes back for a task may come in by any of them."""
    if namespaces.read_sysctl("net.ipv6.conf.all.forwarding") == "1":
        return
    forced = [namespaces.read_sysctl(name) for name in FORWARD6]
    if forced == ["1", "1"]:
        return
    supported = None not in forced
    if not supported:
        for path in Path("/proc/sys/net/ipv6/conf").glob("*/accept_ra"):
            with contextlib.suppress(OSError):
                if path.read_text().strip() == "1":
                    path.write_text("2")  # as a router, too
    for name in FORWARD6 if supported else ("net.ipv6.conf.all.forwarding",):
        namespaces.sysctl(name, "1")
    log.info("ipv6_forwarding_enabled")


def set_leg_sysctls(leg: Leg) -> None:
    for name, (_, value) in LEG_SETTINGS.items():
        namespaces.sysctl(f"net.ipv4.conf.{leg.name}.{name}", str(value))
    for name in ("accept_ra", "autoconf", "accept_dad"):
        set_optional(f"net.ipv6.conf.{leg.name}.{name}", "0")
    set_optional(f"net.ipv6.conf.{leg.name}.addr_gen_mode", NO_ADDRESS)
    set_optional(f"net.ipv6.conf.{leg.name}.disable_ipv6", "0" if leg.ipv6 else "1")
