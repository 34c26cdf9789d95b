"""Encrypted networks between three hosts: what the underlay sees, what is dropped, rotations, repairs. `make test-vm`
runs this inside the virtual machine, whose kernel has ESP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest

from overlay import xfrm
from overlay.esp import REQID
from overlay.interface import Attachment, EncryptionKey, HostState, Interface, NetworkError, OverlayNetwork
from overlay.netlink import Netlink
from tests.overlay_lab import OverlayLab, SimulatedHost

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(600),
    pytest.mark.skipif("PYSWARM_VM" not in os.environ, reason="runs inside the virtual machine: make test-vm"),
]

SECRET = OverlayNetwork("netssssssssssssssssssssss", 4101, "10.77.4.0/24", "10.77.4.1", encrypted=True)
CLEAR = OverlayNetwork("netcccccccccccccccccccccc", 4102, "10.77.5.0/24", "10.77.5.1")
ESP, UDP = socket.IPPROTO_ESP, socket.IPPROTO_UDP
AUDIT_S = 6.0
KEYS = {serial: EncryptionKey(serial, os.urandom(20)) for serial in range(1, 60)}
"""Made once, as the managers do: a serial never has two keys."""


@dataclass
class Capture:
    """What the underlay carries: (IP protocol, VNI of clear VXLAN or None). `inside` opens its socket there."""

    inside: Callable[[Callable[[], socket.socket]], socket.socket]
    seen: list[tuple[int, int | None]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self) -> Iterator[Capture]:
        opened = self.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
        opened.settimeout(0.2)
        reader = threading.Thread(target=self._read, args=(opened,))
        reader.start()
        try:
            yield self
        finally:
            self._stop.set()
            reader.join(10)
            opened.close()

    def _read(self, opened: socket.socket) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                self._note(opened.recv(2000))

    def _note(self, frame: bytes) -> None:
        if frame[12:14] != b"\x08\x00":
            return
        protocol, header = frame[23], 14 + (frame[14] & 15) * 4
        vni = None
        if protocol == UDP and struct.unpack_from(">H", frame, header + 2)[0] == 4789:
            vni = int.from_bytes(frame[header + 12 : header + 15], "big")
        if protocol in {ESP, UDP}:
            self.seen.append((protocol, vni))


def here(action: Callable[[], socket.socket]) -> socket.socket:
    """In this process's namespace: a lab's underlay."""
    return action()


class SecretLab:
    """Three hosts with a task each on the encrypted network (s1..s3) and on a clear one (c1..c3)."""

    def __init__(self) -> None:
        self.lab = OverlayLab()
        self.newest = 3

    def capture(self) -> Capture:
        return Capture(lambda action: self.lab.sockets.inside(self.lab.outside, action))

    def state(self, host: SimulatedHost) -> HostState:
        made = self.lab.state(host, networks=(SECRET, CLEAR))
        epochs = {each.node_id: each.network.encryption().epoch for each in self.lab.hosts}
        return replace(
            made,
            peers=tuple(replace(peer, encryption_epoch=epochs[peer.node_id]) for peer in made.peers),
            keys=tuple(KEYS[serial] for serial in range(self.newest, self.newest - 3, -1)),
        )

    async def apply(self, *hosts: SimulatedHost) -> None:
        for host in hosts or self.lab.hosts:
            await host.network.apply(self.state(host))

    async def audit(self) -> None:
        """Let each host look twice: a new epoch of one reaches the others with the next state."""
        for _ in range(2):
            for host in self.lab.hosts:
                host.now_s[0] += AUDIT_S
            await self.apply()

    async def build(self) -> None:
        await self.apply()
        for host in self.lab.hosts:
            await self.lab.task(host, f"s{host.number}", (SECRET, f"10.77.4.1{host.number}"))
            await self.lab.task(host, f"c{host.number}", (CLEAR, f"10.77.5.1{host.number}"))
        await self.apply()
        for number in (1, 2, 3):
            self.lab.sockets.serve(self.lab.path(f"s{number}"), "0.0.0.0", 7000, f"s{number}")

    def ping(self, source: str, address: str, *more: str) -> bool:
        done = self.lab.sockets.run(self.lab.path(source), "ping", "-c", "1", "-W", "3", *more, address)
        return done.returncode == 0

    def all_reach_all(self) -> bool:
        return all(self.ping(f"s{a}", f"10.77.4.1{b}") for a in (1, 2, 3) for b in (1, 2, 3) if a != b)

    def xfrm(self, host: SimulatedHost, *words: str) -> str:
        return self.lab.sockets.run(host.netns, "ip", "xfrm", *words).stdout


@pytest.fixture(scope="module")
def secret() -> Iterator[SecretLab]:
    made = SecretLab()
    asyncio.run(made.build())
    yield made
    asyncio.run(made.lab.close())


def test_the_underlay_sees_esp_and_no_clear_packet_of_the_encrypted_network(secret: SecretLab) -> None:
    with secret.capture().running() as capture:
        assert secret.all_reach_all()
        for number in (2, 3):
            assert secret.lab.sockets.ask(secret.lab.path("s1"), f"10.77.4.1{number}", 7000) == (
                f"s{number}",
                "10.77.4.11",
            )
        assert secret.ping("c1", "10.77.5.12")
    assert sum(protocol == ESP for protocol, _ in capture.seen) >= 12
    assert {vni for _, vni in capture.seen if vni} == {CLEAR.vni}, "the clear network shows that the capture works"


@pytest.mark.parametrize(("payload", "passes"), [(1388, True), (1389, False)])
def test_the_mtu_leaves_room_for_esp(secret: SecretLab, payload: int, passes: bool) -> None:
    with secret.capture().running() as capture:
        assert secret.ping("s1", "10.77.4.12", "-M", "do", "-s", str(payload)) is passes
    assert not any(vni == SECRET.vni for _, vni in capture.seen)


def forged(vni: int) -> bytes:
    """A VXLAN packet with an ARP request in it, as c2 or s2 could have sent it."""
    mac = b"\x02\x42\x0a\x4d\x04\x63"
    arp = struct.pack(
        ">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, bytes([10, 77, 4, 99]), bytes(6), bytes([10, 77, 4, 11])
    )
    return struct.pack(">II", 0x08000000, vni << 8) + b"\xff" * 6 + mac + b"\x08\x06" + arp


@pytest.mark.parametrize(("network", "arrives"), [(SECRET, False), (CLEAR, True)])
def test_forged_clear_packets_reach_clear_networks_only(
    secret: SecretLab, network: OverlayNetwork, arrives: bool
) -> None:
    h1 = secret.lab.hosts[0]
    before = received(secret, h1, network)
    client = secret.lab.sockets.open(secret.lab.outside, socket.SOCK_DGRAM)
    for _ in range(5):
        client.sendto(forged(network.vni), (h1.address, 4789))
    assert (received(secret, h1, network) - before >= 5) is arrives


def received(secret: SecretLab, host: SimulatedHost, network: OverlayNetwork) -> int:
    """Packets that came out of the network's VXLAN device."""
    namespace = host.run_dir / "netns" / f"net-{network.network_id[:12]}"
    text = secret.lab.sockets.run(namespace, "cat", "/proc/net/dev").stdout
    line = next(line for line in text.splitlines() if line.strip().startswith("vx0:"))
    return int(line.split(":")[1].split()[1])


def test_twenty_quick_rotations_lose_no_packet(secret: SecretLab) -> None:
    """Hosts hear of each rotation one after the other, the order changing, while packets flow in all directions."""

    async def rotate() -> None:
        for number in range(20):
            secret.newest += 1
            order = secret.lab.hosts[number % 3 :] + secret.lab.hosts[: number % 3]
            await secret.apply(*order)

    with flowing(secret) as lost:
        asyncio.run(rotate())
    assert lost() == (0, True), errors(secret)
    assert secret.xfrm(secret.lab.hosts[0], "state").count("reqid") == 2 * (3 + 2), (
        "three to receive, at most two to send"
    )


def errors(secret: SecretLab) -> list[str]:
    """What the hosts' kernels counted as wrong, for the message of a failure."""
    found = []
    for host in secret.lab.hosts:
        counters = secret.lab.sockets.run(host.netns, "cat", "/proc/net/xfrm_stat").stdout
        found += [
            f"{host.node_id} {' '.join(line.split())}" for line in counters.splitlines() if line.split()[1] != "0"
        ]
    return found


@contextlib.contextmanager
def flowing(secret: SecretLab) -> Iterator[Callable[[], tuple[int, bool]]]:
    """UDP between every pair of hosts, numbered, without pause; afterwards: (how many were lost, whether there were
    any)."""
    pairs = [(a, b) for a in (1, 2, 3) for b in (1, 2, 3) if a != b]
    receivers = {}
    for a, b in pairs:
        receivers[a, b] = secret.lab.sockets.open(secret.lab.path(f"s{b}"), socket.SOCK_DGRAM)
        receivers[a, b].setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE: the test counts, it does not race
        receivers[a, b].bind((f"10.77.4.1{b}", 9000 + a))
    senders = {a: secret.lab.sockets.open(secret.lab.path(f"s{a}"), socket.SOCK_DGRAM) for a in (1, 2, 3)}
    sent = dict.fromkeys(pairs, 0)
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.002):
            for a, b in pairs:
                senders[a].sendto(b"x", (f"10.77.4.1{b}", 9000 + a))
                sent[a, b] += 1

    sender = threading.Thread(target=send)
    sender.start()

    def lost() -> tuple[int, bool]:
        missing = 0
        for pair, receiver in receivers.items():
            receiver.settimeout(1)
            got = 0
            with contextlib.suppress(TimeoutError):
                while got < sent[pair]:
                    receiver.recv(10)
                    got += 1
            missing += sent[pair] - got
        return missing, all(count > 50 for count in sent.values())

    try:
        yield lost
    finally:
        stop.set()
        sender.join(10)


@pytest.mark.parametrize("what", ["state", "policy"])
def test_a_flush_is_repaired_and_nothing_goes_out_in_clear_meanwhile(secret: SecretLab, what: str) -> None:
    h1 = secret.lab.hosts[0]
    epoch = h1.network.encryption().epoch
    with secret.capture().running() as capture:
        secret.xfrm(h1, what, "flush")
        assert not secret.ping("s1", "10.77.4.12")
        asyncio.run(secret.audit())
        assert secret.all_reach_all()
    assert not any(vni == SECRET.vni for _, vni in capture.seen)
    assert (h1.network.encryption().epoch != epoch) is (what == "state"), "no key is used twice from packet 1 on"


def test_without_the_hosts_rules_packets_are_encrypted_all_the_same_and_the_rules_come_back(secret: SecretLab) -> None:
    h1 = secret.lab.hosts[0]
    with secret.capture().running() as capture:
        secret.lab.sockets.run(h1.netns, "nft", "flush", "ruleset")
        assert secret.ping("s1", "10.77.4.12")
        asyncio.run(secret.audit())
    assert not any(vni == SECRET.vni for _, vni in capture.seen)
    assert "@encrypted" in secret.lab.sockets.run(h1.netns, "nft", "list", "ruleset").stdout
    assert secret.all_reach_all()


def test_an_agent_that_starts_anew_adopts_what_stands(secret: SecretLab) -> None:
    h1 = secret.lab.hosts[0]
    before, epoch = secret.xfrm(h1, "state"), h1.network.encryption().epoch
    listing = ("nft", "-a", "list", "ruleset")
    rules = secret.lab.sockets.run(h1.netns, *listing).stdout
    h1.again()
    assert h1.network.encryption().epoch == epoch
    asyncio.run(secret.apply())
    assert secret.all_reach_all()
    assert spis(secret.xfrm(h1, "state")) == spis(before)
    assert secret.lab.sockets.run(h1.netns, *listing).stdout == rules, "and not laid anew: handles are the same"


def spis(text: str) -> set[str]:
    return {line.split("spi ")[1].split("(")[0] for line in text.splitlines() if "spi " in line}


def test_foreign_associations_and_policies_stay(secret: SecretLab) -> None:
    h1 = secret.lab.hosts[0]
    ends = ("src", "192.0.2.1", "dst", "192.0.2.2")
    secret.xfrm(
        h1, "state", "add", *ends, "proto", "esp", "spi", "0x500", "reqid", "7", "mode", "transport",
        "aead", "rfc4106(gcm(aes))", "0x" + "11" * 20, "128",
    )  # fmt: skip
    secret.xfrm(h1, "policy", "add", *ends, "dir", "out", "tmpl", "proto", "esp", "reqid", "7", "mode", "transport")
    asyncio.run(secret.audit())
    assert "0x00000500" in secret.xfrm(h1, "state")
    assert "192.0.2.2" in secret.xfrm(h1, "policy")


def test_a_host_without_keys_does_not_build_the_network_and_says_why(secret: SecretLab) -> None:
    h3 = secret.lab.hosts[2]
    extra = OverlayNetwork("nettttttttttttttttttttttt", 4103, "10.77.6.0/24", "10.77.6.1", encrypted=True)

    async def attach() -> None:
        state = secret.state(h3)
        await h3.network.apply(replace(state, networks=(*state.networks, extra), keys=()))
        await h3.network.attach(Attachment("x3", (Interface(extra.network_id, "10.77.6.13/24"),)))

    with pytest.raises(NetworkError, match="have not told this node the keys"):
        asyncio.run(attach())
    assert "x3" not in asyncio.run(h3.network.attached())
    asyncio.run(secret.apply())
    asyncio.run(secret.audit())
    assert secret.all_reach_all()


def test_when_the_last_encrypted_network_goes_nothing_of_ours_is_left(secret: SecretLab) -> None:
    """Runs last: takes the network down on host 2."""
    h2 = secret.lab.hosts[1]
    epoch = h2.network.encryption().epoch

    async def leave() -> None:
        await h2.network.detach("s2")
        await h2.network.apply(replace(secret.state(h2), networks=(CLEAR,), keys=()))

    asyncio.run(leave())
    left = secret.lab.sockets.inside(h2.netns, read_ours)
    assert left == (0, 0)
    assert "@encrypted" not in secret.lab.sockets.run(h2.netns, "nft", "list", "ruleset").stdout
    assert h2.network.encryption().epoch != epoch
    asyncio.run(secret.lab.hosts[0].network.teardown())
    remaining = secret.xfrm(secret.lab.hosts[0], "state") + secret.xfrm(secret.lab.hosts[0], "policy")
    assert "192.0.2.2" in remaining
    assert f"reqid {REQID}" not in remaining


def read_ours() -> tuple[int, int]:
    with Netlink(xfrm.NETLINK_XFRM) as netlink:
        found = xfrm.read(netlink, {})
    return len(found.associations), len(found.policies)
