"""The host's own resolvers, to which the name server forwards what is not the cluster's."""

from __future__ import annotations

from pathlib import Path

RESOLV_CONF = Path("/etc/resolv.conf")


def parse(text: str) -> tuple[str, ...]:
    """Addresses of the `nameserver` lines of resolv.conf(5), in order."""
    words = (line.split() for line in text.splitlines())
    return tuple(line[1] for line in words if len(line) >= 2 and line[0] == "nameserver")


def host_resolvers() -> tuple[str, ...]:
    """Read anew at each call: DHCP changes them. Empty where there is no file."""
    try:
        return parse(RESOLV_CONF.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ()
