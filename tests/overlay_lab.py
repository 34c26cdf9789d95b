"""Three hosts as network namespaces on an underlay bridge, with real sockets in any of the namespaces."""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from typing import TypeVar

from overlay.host import KernelNetwork
from overlay.interface import (
    Attachment,
    Balancer,
    HostState,
    Interface,
    OverlayNetwork,
    Peer,
    PublishedPort,
    RemoteEndpoint,
    Vip,
)
from overlay.namespaces import NamespaceThread

T = TypeVar("T")

TIMEOUT_S = 4
REFUSED_WITHIN_S = 1.5
"""A lost SYN is repeated after 1 s at the earliest... an answer before that is a refusal, not a lucky retry; the
rest is for a busy machine."""
DNS_PORT = 42053
VXLAN_PORT = 4789
ETH_P_ALL = 3
OUTSIDE = "192.168.99.254"
UNDERLAY6 = "fd00:99::"
_numbers = itertools.count()

NET = OverlayNetwork(
    "netaaaaaaaaaaaaaaaaaaaaaa",
    4097,
    "10.77.1.0/24",
    "10.77.1.1",
    subnet6="fd00:77:1::/64",
    gateway6="fd00:77:1::1",
)
INSIDE = OverlayNetwork("netiiiiiiiiiiiiiiiiiiiiii", 4098, "10.77.2.0/24", "10.77.2.1", internal=True)
OTHER = OverlayNetwork("netoooooooooooooooooooooo", 4099, "10.77.3.0/24", "10.77.3.1")


def address6(network: OverlayNetwork, address: str) -> str:
    """The IPv6 address of the lab's task at this IPv4 address; "" in a network without IPv6."""
    if not network.subnet6:
        return ""
    return str(IPv6Address(int(IPv6Network(network.subnet6)[0]) + int(address.rpartition(".")[2])))


def interface(network: OverlayNetwork, address: str) -> Interface:
    second = address6(network, address)
    return Interface(
        network.network_id,
        f"{address}/{network.subnet.partition('/')[2]}",
        f"{second}/{network.subnet6.partition('/')[2]}" if second else "",
    )


class Sockets:
    """Opens sockets in namespaces (they stay there) and runs small servers."""

    def __init__(self) -> None:
        self._thread = NamespaceThread()
        self._pool = ThreadPoolExecutor(max_workers=1, initializer=self._thread._begin)
        self._selector = selectors.DefaultSelector()
        self._opened: list[socket.socket] = []
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._server = threading.Thread(target=self._serve, daemon=True)
        self._server.start()

    def inside(self, netns: Path, action: Callable[[], T]) -> T:
        def run() -> T:
            with self._thread.inside(netns):
                return action()

        return self._pool.submit(run).result(timeout=20)

    def open(self, netns: Path, kind: socket.SocketKind, family: int = socket.AF_INET) -> socket.socket:
        made = self.inside(netns, lambda: socket.socket(family, kind))
        made.settimeout(TIMEOUT_S)
        self._opened.append(made)
        return made

    def run(self, netns: Path, *command: str) -> subprocess.CompletedProcess[str]:
        """The command, in that namespace."""
        return self.inside(
            netns,
            lambda: subprocess.run(command, capture_output=True, text=True, check=False, timeout=15),
        )

    def serve(self, netns: Path, address: str, port: int, label: str, kind: str = "tcp") -> None:
        """Answers "<label> <client address>": TCP on connecting, later messages with themselves; UDP each message."""
        tcp = kind == "tcp"
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = self.open(netns, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM, family)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        if tcp:
            server.listen(64)
        server.setblocking(False)
        with self._lock:
            self._selector.register(server, selectors.EVENT_READ, (label, tcp))
            self._wake.send(b"x")

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    if self._woken.recv(64) == b"":
                        return
                elif isinstance(key.fileobj, socket.socket):
                    self._answer(key.fileobj, key.data)

    def _answer(self, server: socket.socket, data: tuple[str, bool] | None) -> None:
        try:
            if data is None:
                message = server.recv(65536)
                if message:
                    server.sendall(message)
                else:
                    self._selector.unregister(server)
                    server.close()
            elif data[1]:
                client, peer = server.accept()
                client.sendall(f"{data[0]} {peer[0]}\n".encode())
                self._selector.register(client, selectors.EVENT_READ, None)
            else:
                _, peer = server.recvfrom(65536)
                server.sendto(f"{data[0]} {peer[0]}\n".encode(), peer)
        except OSError:
            return

    def connect(self, netns: Path, address: str, port: int) -> tuple[socket.socket, str]:
        """An open connection and the server's greeting."""
        client = self.open(netns, socket.SOCK_STREAM, socket.AF_INET6 if ":" in address else socket.AF_INET)
        client.connect((address, port))
        return client, client.recv(1000).decode().strip()

    def ask(self, netns: Path, address: str, port: int) -> tuple[str, str]:
        """(label of the server, address of the client as the server saw it)"""
        client, greeting = self.connect(netns, address, port)
        client.close()
        label, seen = greeting.split()
        return label, seen

    def ask_udp(self, client: socket.socket, address: str, port: int) -> str:
        client.sendto(b"?", (address, port))
        return client.recv(1000).decode().split()[0]

    def close(self) -> None:
        self._wake.close()
        self._server.join(5)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        for item in self._opened:
            item.close()
        self._pool.shutdown()
        self._thread.close()


class Capture:
    """The Ethernet frames that travel inside VXLAN through a namespace, from now until `frames` is called."""

    def __init__(self, sockets: Sockets, netns: Path) -> None:
        def listen() -> socket.socket:
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            return made

        self._socket = sockets.inside(netns, listen)

    def frames(self) -> list[bytes]:
        self._socket.setblocking(False)
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = self._socket.recv(65536)
                # Ethernet 14 (12 = its type), IPv4 20 (23 = its protocol), UDP 8, VXLAN 8
                udp = packet[12:14] == b"\x08\x00" and packet[23] == socket.IPPROTO_UDP
                if udp and packet[36:38] == VXLAN_PORT.to_bytes(2, "big"):
                    found.append(packet[50:])
        self._socket.close()
        return found


@dataclass
class SimulatedHost:
    number: int
    netns: Path
    run_dir: Path
    network: KernelNetwork
    now_s: list[float]
    balancer: Balancer = "nftables"

    @property
    def node_id(self) -> str:
        return f"node{self.number}"

    @property
    def address(self) -> str:
        return f"192.168.99.{self.number}"

    @property
    def address6(self) -> str:
        return f"{UNDERLAY6}{self.number:x}"

    def again(self) -> KernelNetwork:
        """Another agent's view of the same host, as after a restart."""
        self.network.close()
        self.network = make_network(self)
        return self.network


def make_network(host: SimulatedHost) -> KernelNetwork:
    now_s = host.now_s
    return KernelNetwork(
        host.run_dir,
        f"t{host.number}",
        DNS_PORT,
        host_netns=host.netns,
        clock=lambda: now_s[0],
        balancer=host.balancer,
    )


def ip_batch(lines: list[str]) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True, timeout=30)


@dataclass
class OverlayLab:
    balancer: Balancer = "nftables"
    hosts: list[SimulatedHost] = field(default_factory=list)
    sockets: Sockets = field(default_factory=Sockets)

    def __post_init__(self) -> None:
        self.prefix = f"ovt{os.getpid()}-{next(_numbers)}"
        self.directory = Path(tempfile.mkdtemp(prefix="ovt-"))
        self.tasks: dict[str, tuple[SimulatedHost, Path, dict[OverlayNetwork, str]]] = {}
        self._make_underlay()

    def netns(self, name: str) -> Path:
        return Path("/run/netns") / f"{self.prefix}-{name}"

    def _make_underlay(self) -> None:
        names = ["ul", "client", "h1", "h2", "h3"]
        ip_batch([f"netns add {self.prefix}-{name}" for name in names])
        lines = ["link add br0 type bridge", "link set br0 up", f"addr add {OUTSIDE}/24 dev br0", "link set lo up"]
        for name in names[1:]:
            lines += [
                f"link add u-{name} type veth peer name eth0 netns {self.prefix}-{name}",
                f"link set u-{name} master br0 up",
            ]
        self._ip("ul", lines)
        for number, name in ((100, "client"), (1, "h1"), (2, "h2"), (3, "h3")):
            address = [f"addr add 192.168.99.{number}/24 dev eth0", f"addr add {UNDERLAY6}{number:x}/64 dev eth0 nodad"]
            address += ["link set eth0 up", "link set lo up"]
            self._ip(name, [*address, f"route add default via {OUTSIDE}"])
        for number in (1, 2, 3):
            directory = self.directory / f"h{number}"
            host = SimulatedHost(number, self.netns(f"h{number}"), directory, None, [0.0], self.balancer)  # type: ignore[arg-type]
            host.network = make_network(host)
            self.hosts.append(host)

    def _ip(self, name: str, lines: list[str]) -> None:
        command = ["ip", "-n", f"{self.prefix}-{name}", "-batch", "-"]
        subprocess.run(command, input="\n".join(lines), text=True, check=True, timeout=30)

    @property
    def client(self) -> Path:
        return self.netns("client")

    @property
    def outside(self) -> Path:
        return self.netns("ul")

    def state(
        self,
        host: SimulatedHost,
        networks: tuple[OverlayNetwork, ...] = (NET, INSIDE, OTHER),
        vips: tuple[Vip, ...] = (),
        published: tuple[PublishedPort, ...] = (),
    ) -> HostState:
        endpoints = tuple(
            RemoteEndpoint(network.network_id, address, owner.node_id, address6(network, address))
            for owner, _, addresses in self.tasks.values()
            for network, address in addresses.items()
            if owner is not host
        )
        return HostState(
            vtep=host.address,
            index=host.number,
            networks=networks,
            peers=tuple(Peer(item.node_id, item.address, item.number) for item in self.hosts if item is not host),
            endpoints=endpoints,
            vips=vips,
            published=published,
        )

    async def apply(self, vips: tuple[Vip, ...] = (), published: tuple[PublishedPort, ...] = ()) -> None:
        for host in self.hosts:
            await host.network.apply(self.state(host, vips=vips, published=published))

    async def task(self, host: SimulatedHost, name: str, *interfaces: tuple[OverlayNetwork, str]) -> Path:
        path = await host.network.attach(Attachment(name, tuple(interface(*item) for item in interfaces)))
        self.tasks[name] = (host, path, dict(interfaces))
        return path

    def path(self, name: str) -> Path:
        return self.tasks[name][1]

    async def close(self) -> None:
        for host in self.hosts:
            await host.network.teardown()
            host.network.close()
        self.sockets.close()
        ip_batch([f"netns del {self.prefix}-{name}" for name in ("ul", "client", "h1", "h2", "h3")])
        shutil.rmtree(self.directory)
