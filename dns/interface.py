"""What the agent tells the DNS server. The server is a process of its own (`python -m dns.server`), so
that names resolve while the agent restarts. It is told over a unix stream socket what changed (changes.py), one JSON
object per line, and answers each line with one line: the digest of the picture that it now answers by, null where
the change does not fit its own, and an error if there is one. The agent then tells it the whole picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

LISTEN_ADDRESS = "127.0.0.11"
LISTEN_PORT = 42053
"""In each task's namespace; nftables redirects 127.0.0.11:53 to it, so port 53 stays free for the task."""


@dataclass(frozen=True, slots=True)
class ServiceNames:
    names: tuple[str, ...]
    """The service's name, then its aliases on this network."""
    vip: str | None
    """None: the names answer with the task addresses (dnsrr)."""
    task_addresses: tuple[str, ...]
    """Running tasks only; of both families: A questions get the IPv4 ones, AAAA the others."""
    vip6: str | None = None
    ports: tuple[tuple[str, str, int], ...] = ()
    """(name or "", protocol, target port) of the published ports: SRV `_<name or port>._<protocol>.<service>`."""


@dataclass(frozen=True, slots=True)
class TaskNames:
    names: tuple[str, ...]
    """The first is the PTR answer: wpinst.3.abc..."""
    address: str
    address6: str = ""


@dataclass(frozen=True, slots=True)
class NetworkNames:
    network_id: str
    name: str
    """For <name>.<network>."""
    internal: bool
    services: tuple[ServiceNames, ...]
    tasks: tuple[TaskNames, ...]


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One task's namespace to listen in, and the networks whose names it may see, in order."""

    task_id: str
    netns_path: str
    network_ids: tuple[str, ...]
    upstreams: tuple[str, ...] = ()
    """--dns: overrides the host's resolvers."""
    search: tuple[str, ...] = ()
    """--dns-search, also written to the task's resolv.conf."""


@dataclass(frozen=True, slots=True)
class Picture:
    networks: tuple[NetworkNames, ...] = ()
    sandboxes: tuple[Sandbox, ...] = ()
    upstreams: tuple[str, ...] = ()
    """The host's resolvers, "ip" or "ip:port"; loopback ones are asked from the host's namespace."""


class DnsError(Exception):
    """The server could not be reached or refused the picture."""


class NameServer(Protocol):
    async def apply(self, picture: Picture) -> None:
        """Make the server answer by this picture; returns when it does. Starts the server if it is not
        running. Raises DnsError."""
        ...

    async def stop(self) -> None:
        """End the server process."""
        ...

    @property
    def pid(self) -> int: ...
