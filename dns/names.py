"""Pure: which addresses a name has, as seen by a task that is on certain networks.

The name that people use wins over the machinery: the networks of a task are searched in its order, and
the first that knows the name answers. `<name>.<network>` asks one network only.
"""

from __future__ import annotations

from collections.abc import Sequence

from dns.interface import NetworkNames

PTR_SUFFIX = ".in-addr.arpa"


class NetworkView:
    """One network's names, ready for lookup. Names are compared without regard to case (RFC 4343)."""

    def __init__(self, names: NetworkNames) -> None:
        self.name = names.name.lower()
        self.internal = names.internal
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._reverse: dict[str, str] = {}
        for task in names.tasks:
            for name in task.names:
                self._add(name, (task.address,))
            self._reverse[task.address] = f"{task.names[0]}.{names.name}"
        for service in names.services:
            addresses = (service.vip,) if service.vip is not None else service.task_addresses
            for name in service.names:
                self._add(name, addresses)
                self._add(f"tasks.{name}", service.task_addresses)
            if service.vip is not None:
                self._reverse[service.vip] = f"{service.names[0]}.{names.name}"

    def _add(self, name: str, addresses: tuple[str, ...]) -> None:
        # Two services may share an alias: its name then has the addresses of both.
        known = self._addresses.get(name.lower(), ())
        self._addresses[name.lower()] = known + tuple(a for a in addresses if a not in known)

    def lookup(self, name: str) -> tuple[str, ...] | None:
        return self._addresses.get(name)

    def reverse(self, address: str) -> str | None:
        return self._reverse.get(address)


class TaskView:
    """What a task on these networks sees. None means "not ours": the question is forwarded."""

    def __init__(self, networks: Sequence[NetworkView]) -> None:
        self._networks = tuple(networks)
        self.may_forward = not networks or any(not network.internal for network in networks)
        """A task that is on internal networks only has no business outside: its questions stay here."""

    def lookup(self, name: str) -> tuple[str, ...] | None:
        """Addresses of a name (lower case, no trailing dot); an empty tuple = known but none now."""
        for network in self._networks:
            found = network.lookup(name)
            if found is not None:
                return found
        for network in self._networks:
            suffix = f".{network.name}"
            if name.endswith(suffix):
                found = network.lookup(name[: -len(suffix)])
                if found is not None:
                    return found
        return None

    def reverse(self, name: str) -> str | None:
        """The PTR answer to `5.1.0.10.in-addr.arpa`, without trailing dot."""
        if not name.endswith(PTR_SUFFIX):
            return None
        address = ".".join(reversed(name[: -len(PTR_SUFFIX)].split(".")))
        for network in self._networks:
            found = network.reverse(address)
            if found is not None:
                return found
        return None
