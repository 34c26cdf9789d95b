"""IPVS: virtual services and their destinations, wanted and standing, and the messages between them.

A VIP or published port is a virtual service known by a firewall mark, which nftables gives to its packets: a VIP is
balanced whatever the port. Destinations that are wanted no more keep their connections: they get weight 0, and go when
nothing is open or when their task is gone (the kernel then forgets its connections: `expire_nodest_conn`).
"""

from __future__ import annotations

import errno
import hashlib
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from overlay import namespaces
from overlay.elements import FAMILIES, PROTOCOLS, packed
from overlay.expressions import NODE_PREFIX
from overlay.interface import Balance, PublishedPort, Vip
from overlay.netlink import NETLINK_GENERIC, Message, Netlink, acknowledged, attribute, attributes, nested, text

SCHEDULERS: dict[Balance, str] = {"rr": "wrr", "lc": "wlc", "sh": "sh"}
SYSCTLS = {
    # nftables sees translated packets as one connection: it decides about their source address.
    "net.ipv4.vs.conntrack": "1",
    # Connections to a task that is gone end, and the next packet of a UDP client goes to another.
    "net.ipv4.vs.expire_nodest_conn": "1",
    # A packet of a connection that is not known (any more) goes to a backend, which resets it: no hanging.
    "net.ipv4.vs.sloppy_tcp": "1",
}
TCP_TIMEOUT_S = 432_000
"""Of an idle connection: 5 days, as the kernel's own connection tracking. IPVS's default is 15 minutes."""
TCP_FIN_TIMEOUT_S, UDP_TIMEOUT_S = 120, 300
"""The kernel's defaults."""

_NEW_SERVICE, _SET_SERVICE, _DEL_SERVICE, _GET_SERVICE = 1, 2, 3, 4
_NEW_DEST, _SET_DEST, _DEL_DEST, _GET_DEST, _SET_CONFIG, _FLUSH = 5, 6, 7, 8, 12, 17
_SERVICE, _DEST = 1, 2
_CTRL_ID, _CTRL_GETFAMILY = 16, 3
_MASQUERADE = 0
_SH_FALLBACK = 8
"""Source hashing passes over destinations of weight 0."""
_LISTING, _LISTING_HEADER_LINES = Path("/proc/thread-self/net/ip_vs"), 3
_GONE = frozenset({errno.ENOENT, errno.ESRCH})

Key = tuple[int, int]
"""(family, mark)"""
Destination = tuple[bytes, int]
"""(address, port); port 0 = the one asked for."""


@dataclass(frozen=True, slots=True)
class Service:
    scheduler: str
    weights: Mapping[Destination, int]


Services = Mapping[Key, Service]


@dataclass(slots=True)
class Standing:
    """A service in the kernel."""

    scheduler: str
    weights: dict[Destination, int]


# --- what is wanted (pure) ----------------------------------------------------------------------------------


def vip_mark(address: str) -> int:
    """An IPv4 VIP's own four bytes; of IPv6, the last four, displaced by a number for the rest: networks do not mix."""
    key = packed(address)
    if len(key) == 16:
        start = int.from_bytes(hashlib.blake2b(key[:12], digest_size=4).digest())
        key = ((start + int.from_bytes(key[12:])) % (1 << 32)).to_bytes(4)
        if key.startswith(NODE_PREFIX) or not any(key):
            key = b"\x36" + key[1:]
    return int(struct.unpack("=I", key)[0])


def port_mark(published: PublishedPort) -> int:
    number = PROTOCOLS[published.protocol]
    if not published.host_ip:
        return int(struct.unpack("=I", struct.pack(">BBH", ord("p"), number, published.port))[0])
    text = f"{published.host_ip} {number} {published.port}".encode()
    return int(struct.unpack("=I", b"a" + hashlib.blake2b(text, digest_size=3).digest())[0])


def vip_services(vip: Vip) -> Services:
    if not vip.backends:
        return {}
    weights = vip.weights or (1,) * len(vip.backends)
    found = {(packed(address), 0): weight for address, weight in zip(vip.backends, weights, strict=True)}
    return {(FAMILIES[len(packed(vip.address))], vip_mark(vip.address)): Service(SCHEDULERS[vip.balance], found)}


def port_services(published: PublishedPort, families: Iterable[int]) -> Services:
    weights = published.weights or (1,) * len(published.backends)
    out: dict[Key, Service] = {}
    for family in families:
        found = {
            (packed(address), port): weight
            for (address, port), weight in zip(published.backends, weights, strict=True)
            if FAMILIES[len(packed(address))] == family
        }
        if found:
            out[family, port_mark(published)] = Service(SCHEDULERS[published.balance], found)
    return out


@dataclass(frozen=True, slots=True)
class Operation:
    """One command about a service, or about a destination of it."""

    command: int
    key: Key
    scheduler: str = ""
    destination: Destination | None = None
    weight: int = 0


def operations(
    wanted: Mapping[Key, Service | None],
    standing: Mapping[Key, Standing],
    alive: frozenset[bytes],
    idle: frozenset[tuple[Key, Destination]] = frozenset(),
) -> list[Operation]:
    """What makes `standing` as `wanted`, for the services named there (None: it should not be). `alive`: addresses of
    tasks that still run, whose connections go on. `idle`: destinations without any, just now."""
    out: list[Operation] = []
    for key, service in wanted.items():
        found = standing.get(key)
        if service is not None:
            out += _serve(key, service, found)
        if found is None:
            continue
        kept = service.weights if service is not None else {}
        left = {item: weight for item, weight in found.weights.items() if item not in kept}
        going = {item for item in left if item[0] not in alive or (key, item) in idle}
        out += [Operation(_DEL_DEST, key, destination=item) for item in sorted(going)]
        out += [Operation(_SET_DEST, key, destination=item) for item in sorted(left.keys() - going) if left[item]]
        if service is None and going == left.keys():
            out.append(Operation(_DEL_SERVICE, key))
    return out


def _serve(key: Key, service: Service, found: Standing | None) -> Iterable[Operation]:
    if found is None:
        yield Operation(_NEW_SERVICE, key, service.scheduler)
    elif found.scheduler != service.scheduler:
        yield Operation(_SET_SERVICE, key, service.scheduler)
    known = found.weights if found is not None else {}
    for item, weight in service.weights.items():
        if known.get(item) != weight:
            yield Operation(_SET_DEST if item in known else _NEW_DEST, key, destination=item, weight=weight)


def applied(standing: dict[Key, Standing], done: Iterable[Operation]) -> None:
    """Note in `standing` what was done."""
    for item in done:
        if item.command == _DEL_SERVICE:
            standing.pop(item.key, None)
            continue
        service = standing.setdefault(item.key, Standing("", {}))
        if item.destination is None:
            service.scheduler = item.scheduler
        elif item.command == _DEL_DEST:
            service.weights.pop(item.destination, None)
        else:
            service.weights[item.destination] = item.weight


# --- messages -----------------------------------------------------------------------------------------------


def family_id(netlink: Netlink) -> int:
    """Of IPVS among the generic netlink families. Raises NetlinkError (ENOENT): this kernel has no IPVS."""
    body = struct.pack("=BBH", _CTRL_GETFAMILY, 1, 0) + attribute(2, "IPVS")
    answer = netlink.ask(_CTRL_ID, body, "find IPVS in the kernel")
    return int(struct.unpack("=H", attributes(answer, 4)[1])[0])


def _command(command: int, *parts: bytes) -> bytes:
    return struct.pack("=BBH", command, 1, 0) + b"".join(parts)


def _service(key: Key, scheduler: str = "") -> bytes:
    family, mark = key
    known = attribute(1, struct.pack("=H", family)) + attribute(5, mark)
    if not scheduler:
        return nested(_SERVICE, known)
    flags = _SH_FALLBACK if scheduler == "sh" else 0
    netmask = 0xFFFFFFFF if family == socket.AF_INET else 128
    settings = attribute(6, scheduler) + attribute(7, struct.pack("=II", flags, 0xFFFFFFFF)) + attribute(8, 0)
    return nested(_SERVICE, known + settings + attribute(9, netmask))


def _destination(item: Destination, weight: int) -> bytes:
    address, port = item
    return nested(
        _DEST,
        attribute(1, address),
        attribute(2, struct.pack(">H", port)),
        attribute(3, _MASQUERADE),
        attribute(4, weight),
        attribute(5, 0),
        attribute(6, 0),
        attribute(11, struct.pack("=H", FAMILIES[len(address)])),
    )


def message(family: int, operation: Operation) -> Message:
    body = _service(operation.key, operation.scheduler)
    if operation.destination is not None:
        body += _destination(operation.destination, operation.weight)
    deletes = operation.command in (_DEL_SERVICE, _DEL_DEST)
    what = f"IPVS: {'delete from' if deletes else 'set'} service of mark {operation.key[1]:#x}"
    return Message(family, 0, _command(operation.command, body), what, _GONE if deletes else frozenset())


def timeouts(family: int) -> Message:
    parts = (attribute(4, TCP_TIMEOUT_S), attribute(5, TCP_FIN_TIMEOUT_S), attribute(6, UDP_TIMEOUT_S))
    return Message(family, 0, _command(_SET_CONFIG, *parts), "set IPVS timeouts")


def read(netlink: Netlink, family: int) -> tuple[dict[Key, Standing], frozenset[tuple[Key, Destination]]]:
    """All services by mark of the socket's namespace, and which destinations are idle."""
    standing: dict[Key, Standing] = {}
    idle: set[tuple[Key, Destination]] = set()
    for answer in netlink.dump(family, _command(_GET_SERVICE), "read IPVS services"):
        found = attributes(attributes(answer, 4)[_SERVICE])
        if 5 not in found:
            continue
        key = (struct.unpack("=H", found[1])[0], struct.unpack("=I", found[5])[0])
        standing[key] = Standing(text(found[6]), {})
        for item, weight, connections in _read_destinations(netlink, family, key):
            standing[key].weights[item] = weight
            if not connections:
                idle.add((key, item))
    return standing, frozenset(idle)


def _read_destinations(netlink: Netlink, family: int, key: Key) -> Iterator[tuple[Destination, int, int]]:
    """(destination, weight, connections)"""
    length = 4 if key[0] == socket.AF_INET else 16
    for answer in netlink.dump(family, _command(_GET_DEST, _service(key)), "read IPVS destinations"):
        found = attributes(attributes(answer, 4)[_DEST])
        weight, active, inactive = (int(struct.unpack("=I", found[kind])[0]) for kind in (4, 7, 8))
        yield (found[1][:length], struct.unpack(">H", found[2])[0]), weight, active + inactive


def any_here() -> bool:
    """Whether the current namespace has services of whatever kind."""
    return len(_listing().splitlines()) > _LISTING_HEADER_LINES


def _listing() -> str:
    """The kernel's own, of the current namespace; "" without IPVS."""
    try:
        return _LISTING.read_text()
    except OSError:
        return ""


def flush() -> None:
    """Remove every service of the current namespace, whosever it is."""
    with Netlink(NETLINK_GENERIC) as netlink:
        netlink.batch(acknowledged([Message(family_id(netlink), 0, _command(_FLUSH), "flush IPVS")]))


class VirtualServices:
    """Those of one namespace. Made inside it."""

    def __init__(self, ours: Callable[[int], bool]) -> None:
        """`ours`: whether a service of this mark can be one of ours."""
        self._netlink = Netlink(NETLINK_GENERIC)
        self._family = family_id(self._netlink)
        self._ours = ours
        self._standing: dict[Key, Standing] = {}
        self._sound = ""
        """The kernel's listing when all was as given last, with nothing to drain; "" = look again."""
        for name, value in SYSCTLS.items():
            namespaces.sysctl(name, value)
        self._netlink.batch(acknowledged([timeouts(self._family)]))

    def change(self, wanted: Mapping[Key, Service | None], alive: frozenset[bytes]) -> None:
        """Make the services named as wanted (None: it should not be). Raises NetlinkError: `adopt` must compare."""
        self._do(operations(wanted, self._standing, alive))

    def adopt(self, wanted: Services, alive: frozenset[bytes]) -> bool:
        """Inside the namespace: read all from the kernel and make it as wanted; True when something that is wanted was
        missing."""
        listing = _listing()
        found, idle = read(self._netlink, self._family)
        self._standing = {key: standing for key, standing in found.items() if self._ours(key[1])}
        surplus: dict[Key, Service | None] = dict.fromkeys(self._standing)
        todo = operations(surplus | dict(wanted), self._standing, alive, idle)
        self._do(todo)
        drained = all(weight for service in self._standing.values() for weight in service.weights.values())
        self._sound = listing if drained and not todo else ""
        return any(item.command in (_NEW_SERVICE, _SET_SERVICE, _NEW_DEST) or item.weight for item in todo)

    def audit(self, wanted: Callable[[], Services], alive: frozenset[bytes]) -> bool:
        """As `adopt`, but cheap where nothing has happened since, no connection either: reading all takes 30 us per
        service. For what was given last."""
        listing = _listing()
        return (not listing or listing != self._sound) and self.adopt(wanted(), alive)

    def _do(self, todo: list[Operation]) -> None:
        if todo:
            self._sound = ""
            self._netlink.batch(acknowledged([message(self._family, item) for item in todo]))
            applied(self._standing, todo)

    def close(self) -> None:
        self._netlink.close()


def is_port_mark(mark: int) -> bool:
    return struct.pack("=I", mark)[:1] in (b"p", b"a")
