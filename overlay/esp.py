"""Encrypted networks as values (pure): which security associations and policies this host should have, with which keys.

VXLAN packets of an encrypted network travel in ESP, transport mode, AES-GCM. The way of a packet: the network's
bridge marks what leaves by the VXLAN device (`MARKING`), and for marked packets between two hosts there is a policy
that demands ESP. So nothing that happens to the host's own firewall sends them in clear; two rules there (`guard`)
drop clear packets of an encrypted network in both directions, should the policy be missing or somebody forge them.

AES-GCM is broken by one nonce used twice with one key, so no two directions and no two lives of a counter share a key:
each association has its own, derived from the managers' key by the sender's and the receiver's address and *epoch*. An
epoch is a random number of a host, told to its peers. It is replaced whenever an association would have to be made
a second time (`lost`), because its packet counter would begin at 0 again. Both epochs count: the receiver's replay
window begins anew together with the sender's counter.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from overlay.elements import Element, Elements
from overlay.interface import EncryptionKey, HostState
from overlay.ruleset import Chain, Layout

REQID = 0x70797377
"""On every association and policy of ours; nothing without it is touched."""
MARK = 0x70797378
"""Of packets that have to be encrypted, from the bridge to the choice of the policy."""
KEY_BYTES = 20
"""rfc4106(gcm(aes)): a key of 128 bits and a salt of 32."""
ICV_BYTES = 16
"""The whole tag. With half of it, as the reference has, a forged packet passes with a chance of its blocks in 2^64
(NIST SP 800-38D, appendix C); 8 bytes per packet are all that this would save."""
ESP_BYTES = 8 + 8
"""SPI and sequence number (RFC 4303), initialisation vector (RFC 4106)."""
INSIDE_BYTES = 14 + 8 + 8 + 2
"""Ethernet, VXLAN and UDP headers, and the two bytes of ESP's own before its tag."""
SENDING = 1
"""Place in the ring of the key to send with: the second newest, which each host has by now if its managers do not
rotate faster than hosts hear of it."""

ENCRYPTED = "encrypted"
"""Set of VNIs."""
MARKING_TABLE = "pyswarm"
MARKING = f"""
table bridge {MARKING_TABLE}
delete table bridge {MARKING_TABLE}
table bridge {MARKING_TABLE} {{
  chain marking {{
    type filter hook postrouting priority 0; policy accept;
    oifname "vx0" meta mark set {MARK:#x}
  }}
}}
"""
"""In the namespace of an encrypted network."""
MARKING_RULES = {"marking": 1}


def encrypted_mtu(underlay_mtu_bytes: int) -> int:
    """What an encrypted network carries, in bytes. ESP pads its contents to a multiple of 4."""
    return (underlay_mtu_bytes - 20 - ESP_BYTES - ICV_BYTES) // 4 * 4 - INSIDE_BYTES


def encrypted_size(mtu_bytes: int) -> int:
    """What a packet that fills such a network takes on the underlay, in bytes."""
    return -(-(mtu_bytes + INSIDE_BYTES) // 4) * 4 + 20 + ESP_BYTES + ICV_BYTES


def guard(table: str, vxlan_port: int) -> Layout:
    """In the host's namespace. Packets are looked at where they are whole (input comes after defragmentation)."""
    ours = f"udp dport {vxlan_port} @th,96,24 @{ENCRYPTED}"
    return Layout(
        family=socket.AF_INET,
        table=table,
        sets=((ENCRYPTED, "set typeof @th,96,24"),),
        chains=(
            Chain(
                "arriving",
                (f"{ours} ipsec in reqid {REQID} accept", f"{ours} drop"),
                "type filter hook input priority -300; policy accept;",
            ),
            Chain(
                "leaving",
                (f"{ours} ipsec out reqid {REQID} accept", f"{ours} drop"),
                "type filter hook postrouting priority 300; policy accept;",
            ),
        ),
    )


def guarded(vnis: Iterable[int]) -> Elements:
    return {(socket.AF_INET, ENCRYPTED, vni.to_bytes(3, "big")): None for vni in vnis}


def vni_of(element: Element) -> int:
    return int.from_bytes(element[2], "big")


@dataclass(frozen=True, slots=True)
class Association:
    source: str
    destination: str
    spi: int
    key: bytes = field(repr=False)

    @property
    def place(self) -> tuple[str, int]:
        """The kernel has one association per destination and SPI."""
        return self.destination, self.spi

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self.key, digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Policy:
    """Marked VXLAN packets from here to there leave by this association, or not at all."""

    source: str
    destination: str
    port: int
    spi: int


@dataclass(frozen=True, slots=True)
class Encryption:
    """Wanted, or read from the kernel."""

    associations: frozenset[Association] = frozenset()
    policies: frozenset[Policy] = frozenset()


@dataclass(frozen=True, slots=True)
class Host:
    """One end."""

    address: str
    index: int
    epoch: int


@lru_cache(maxsize=8192)
def association(key: EncryptionKey, sender: Host, receiver: Host) -> Association:
    """Its SPI tells senders and the keys of one ring apart exactly (index: 16 bits, serial: 2), epochs nearly.
    Cached: an audit asks for all of them, 10 us each; the cache has room for those of 1,300 peers."""
    name = struct.pack(
        ">QQQ4s4s",
        key.serial,
        sender.epoch,
        receiver.epoch,
        socket.inet_aton(sender.address),
        socket.inet_aton(receiver.address),
    )
    epochs = int.from_bytes(hashlib.blake2b(name, digest_size=2).digest(), "big") >> 2
    spi = sender.index << 16 | _serial_bits(key.serial) << 14 | epochs
    return Association(
        sender.address,
        receiver.address,
        spi,
        HKDF(SHA256(), KEY_BYTES, None, b"pyswarm esp " + name).derive(key.key),
    )


def _serial_bits(serial: int) -> int:
    return serial % 4


def fault(state: HostState, supported: bool) -> str:
    """Why encrypted networks cannot work here, or ""."""
    if not supported:
        return (
            "this host's kernel cannot encrypt (ESP with AES-GCM, nftables' ipsec expression): load the modules esp4,"
            " gcm and nft_xfrm and restart the daemon, or keep the tasks off this node with a constraint"
        )
    if len(state.keys) <= SENDING:
        return "the managers have not told this node the keys of encrypted networks yet; they do once it needs them"
    return ""


def plan_encryption(state: HostState, epoch: int) -> Encryption:
    """Nothing unless the host is on an encrypted network and knows the keys. A peer without an epoch is on none."""
    if len(state.keys) <= SENDING or not any(network.encrypted for network in state.networks):
        return Encryption()
    here = Host(state.vtep, state.index, epoch)
    associations: set[Association] = set()
    policies: set[Policy] = set()
    for there in _peers(state):
        associations.update(association(key, there, here) for key in state.keys)
        out = association(state.keys[SENDING], here, there)
        associations.add(out)
        policies.add(Policy(here.address, there.address, state.vxlan_port, out.spi))
    return Encryption(frozenset(associations), frozenset(policies))


def _peers(state: HostState) -> list[Host]:
    return [Host(p.vtep, p.index, p.encryption_epoch) for p in state.peers if p.encryption_epoch]


def kept(state: HostState, epoch: int, standing: Iterable[Association]) -> frozenset[Association]:
    """Of those that stand: what stays although it is not wanted now, because it could be wanted again. With a peer that
    is here: what any key of the ring gives. With one that is gone (its last task on an encrypted network ended, the
    next may come): what belongs to a serial of the ring. So a task that moves costs no one a new epoch."""
    here, peers = Host(state.vtep, state.index, epoch), _peers(state)
    present = {there.address for there in peers}
    serials = {_serial_bits(key.serial) for key in state.keys}
    possible = {
        association(key, *ends) for key in state.keys for there in peers for ends in ((here, there), (there, here))
    }
    absent = {
        each
        for each in standing
        if present.isdisjoint((each.source, each.destination))
        and here.address in {each.source, each.destination}
        and each.spi >> 14 & 3 in serials
    }
    return frozenset(possible.intersection(standing) | absent)


@dataclass(frozen=True, slots=True)
class Changes:
    """To be carried out in this order."""

    clear: tuple[Association, ...]
    """In the place of one to add."""
    add: tuple[Association, ...]
    direct: tuple[Policy, ...]
    undirect: tuple[Policy, ...]
    remove: tuple[Association, ...]

    def __bool__(self) -> bool:
        return bool(self.clear or self.add or self.direct or self.undirect or self.remove)


def lost(wanted: Encryption, actual: Encryption, made: frozenset[str]) -> bool:
    """Whether something that was made is gone, and may not be made again. `made`: fingerprints."""
    return any(each.fingerprint in made for each in wanted.associations - actual.associations)


def changes(wanted: Encryption, actual: Encryption, keep: frozenset[Association]) -> Changes:
    """New keys are accepted before they are sent with, and old ones after they were sent with for the last time."""
    add = wanted.associations - actual.associations
    places = {each.place for each in add}
    surplus = actual.associations - wanted.associations
    ends = {(policy.source, policy.destination, policy.port) for policy in wanted.policies}
    return Changes(
        clear=_ordered(each for each in surplus if each.place in places),
        add=_ordered(add),
        direct=tuple(sorted(wanted.policies - actual.policies, key=lambda policy: policy.destination)),
        undirect=tuple(
            policy
            for policy in actual.policies - wanted.policies
            if (policy.source, policy.destination, policy.port) not in ends
        ),
        remove=_ordered(each for each in surplus - keep if each.place not in places),
    )


def _ordered(items: Iterable[Association]) -> tuple[Association, ...]:
    return tuple(sorted(items, key=lambda each: (each.source, each.place)))
