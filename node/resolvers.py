"""The host's own resolv.conf(5): to whom the name server forwards what is not the cluster's, and the search domains of
tasks that ask for none."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RESOLV_CONF = Path("/etc/resolv.conf")


@dataclass(frozen=True, slots=True)
class ResolvConf:
    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()


def parse(text: str) -> ResolvConf:
    """Addresses of the `nameserver` lines, in order, and the domains of the last `search` or `domain` line."""
    nameservers: list[str] = []
    search: tuple[str, ...] = ()
    for keyword, *values in (line.split("#")[0].split() for line in text.splitlines() if line.split("#")[0].strip()):
        if keyword == "nameserver" and values and _is_address(values[0]):
            nameservers.append(values[0])
        elif keyword in ("search", "domain"):
            search = tuple(values)
    return ResolvConf(tuple(nameservers), search)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def of_host() -> ResolvConf:
    """Read anew at each call: DHCP changes it. Empty where there is no file."""
    try:
        return parse(RESOLV_CONF.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ResolvConf()


def host_resolvers() -> tuple[str, ...]:
    return of_host().nameservers


def search_domains(wanted: Sequence[str]) -> tuple[str, ...]:
    """Of a task: its own, the host's where it names none, and none where it names "." (as Docker's --dns-search)."""
    if list(wanted) == ["."]:
        return ()
    return tuple(wanted) or of_host().search
