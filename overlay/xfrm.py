"""The kernel's IPsec tables over raw netlink: associations and policies of ours, in the current namespace."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Mapping

from overlay.esp import ICV_BYTES, KEY_BYTES, MARK, REQID, Association, Changes, Encryption, Policy
from overlay.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    Netlink,
    acknowledged,
    attribute,
    attributes,
)

NETLINK_XFRM = 6
NEWSA, DELSA, GETSA = 0x10, 0x11, 0x12
DELPOLICY, GETPOLICY, UPDPOLICY = 0x14, 0x15, 0x19
_TMPL, _AEAD, _MARK_VALUE, _REPLAY_ESN = 5, 18, 21, 23
_OUT, _ALLOW, _TRANSPORT = 1, 0, 0
_ESN = 128
"""64-bit sequence numbers: 32 bits last for little more than an hour at a million packets per second."""
REPLAY_WINDOW_PACKETS = 1024
"""Packets that the network or the receiver's processors reorder; at a million per second, a millisecond."""
ALGORITHM = "rfc4106(gcm(aes))"
_SELECTOR = struct.Struct("=16s16sHHHHHBBBxxxiI")
_LIFETIME = struct.pack("=8Q", *(4 * [2**64 - 1] + 4 * [0]))
"""No limits: keys are replaced by the managers, and 64-bit sequence numbers do not run out."""
_CURRENT = bytes(32)
_STATE = struct.Struct("=16s4sBxxx16s64s32s12sIIHBBB7x")
_STATE_OFFSET = _SELECTOR.size
_STATE_ID = struct.Struct("=16s4sHBx")
_POLICY = struct.Struct("=64s32sIIBBBBxxxx")
_POLICY_ID = struct.Struct("=IBxxx")
_TEMPLATE = struct.Struct("=16s4sBxxxHxx16sIBBBxIII")
_ANY = 2**32 - 1


def _address(text: str) -> bytes:
    return socket.inet_aton(text) + bytes(12)


def _selector(source: str, destination: str, port: int) -> bytes:
    """UDP to this port between two hosts."""
    return _SELECTOR.pack(
        _address(destination),
        _address(source),
        socket.htons(port),
        0xFFFF,
        0,
        0,
        socket.AF_INET,
        32,
        32,
        socket.IPPROTO_UDP,
        0,
        0,
    )


def add_association(item: Association) -> Message:
    state = _STATE.pack(
        _address(item.destination),
        struct.pack(">I", item.spi),
        socket.IPPROTO_ESP,
        _address(item.source),
        _LIFETIME,
        _CURRENT,
        bytes(12),
        0,
        REQID,
        socket.AF_INET,
        _TRANSPORT,
        0,
        _ESN,
    )
    words = REPLAY_WINDOW_PACKETS // 32
    replay = struct.pack("=6I", words, 0, 0, 0, 0, REPLAY_WINDOW_PACKETS) + bytes(4 * words)
    aead = struct.pack("=64sII", ALGORITHM.encode(), 8 * KEY_BYTES, 8 * ICV_BYTES) + item.key
    selector = _SELECTOR.pack(bytes(16), bytes(16), 0, 0, 0, 0, socket.AF_INET, 0, 0, 0, 0, 0)
    body = selector + state + attribute(_AEAD, aead) + attribute(_REPLAY_ESN, replay)
    what = f"add the security association {item.source} to {item.destination}"
    return Message(NEWSA, NLM_F_CREATE | NLM_F_EXCL, body, what)


def delete_association(item: Association) -> Message:
    body = _STATE_ID.pack(_address(item.destination), struct.pack(">I", item.spi), socket.AF_INET, socket.IPPROTO_ESP)
    what = f"delete the security association {item.source} to {item.destination}"
    return Message(DELSA, 0, body, what, frozenset({errno.ESRCH}))


def _mark() -> bytes:
    return attribute(_MARK_VALUE, struct.pack("=II", MARK, _ANY))


def set_policy(item: Policy) -> Message:
    policy = _POLICY.pack(_LIFETIME, _CURRENT, 0, 0, _OUT, _ALLOW, 0, 0)
    template = _TEMPLATE.pack(
        bytes(16),
        struct.pack(">I", item.spi),
        socket.IPPROTO_ESP,
        socket.AF_INET,
        bytes(16),
        REQID,
        _TRANSPORT,
        0,
        0,
        _ANY,
        _ANY,
        _ANY,
    )
    body = _selector(item.source, item.destination, item.port) + policy + attribute(_TMPL, template) + _mark()
    return Message(UPDPOLICY, 0, body, f"set the IPsec policy {item.source} to {item.destination}")


def delete_policy(item: Policy) -> Message:
    body = _selector(item.source, item.destination, item.port) + _POLICY_ID.pack(0, _OUT) + _mark()
    what = f"delete the IPsec policy {item.source} to {item.destination}"
    return Message(DELPOLICY, 0, body, what, frozenset({errno.ENOENT}))


def change(netlink: Netlink, wanted: Changes) -> None:
    """Raises NetlinkError; what the kernel did not refuse is done."""
    messages = [
        *(delete_association(item) for item in wanted.clear),
        *(add_association(item) for item in wanted.add),
        *(set_policy(item) for item in wanted.direct),
        *(delete_policy(item) for item in wanted.undirect),
        *(delete_association(item) for item in wanted.remove),
    ]
    if messages:
        netlink.batch(acknowledged(messages))


def read(netlink: Netlink, known: Mapping[tuple[str, int], Association]) -> Encryption:
    """What stands of ours. `known`: where the kernel hides keys (lockdown), one that is in the place of a known one is
    taken for it."""
    states = netlink.dump(GETSA, b"", "read security associations")
    policies = netlink.dump(GETPOLICY, b"", "read IPsec policies")
    return Encryption(
        frozenset(item for item in (_association(body, known) for body in states) if item is not None),
        frozenset(item for item in map(_policy, policies) if item is not None),
    )


def _association(body: bytes, known: Mapping[tuple[str, int], Association]) -> Association | None:
    destination, spi, protocol, source, _, _, _, _, reqid, family, *_ = _STATE.unpack_from(body, _STATE_OFFSET)
    if (reqid, family, protocol) != (REQID, socket.AF_INET, socket.IPPROTO_ESP):
        return None
    key = attributes(body, _STATE_OFFSET + _STATE.size).get(_AEAD, b"")[72 : 72 + KEY_BYTES]
    found = Association(
        socket.inet_ntoa(source[:4]), socket.inet_ntoa(destination[:4]), struct.unpack(">I", spi)[0], key
    )
    return found if any(key) else known.get(found.place, found)


def _policy(body: bytes) -> Policy | None:
    destination, source, port, _, _, _, family, *_ = _SELECTOR.unpack_from(body)
    found = attributes(body, _SELECTOR.size + _POLICY.size)
    if family != socket.AF_INET or found.get(_MARK_VALUE) != struct.pack("=II", MARK, _ANY):
        return None
    template = found.get(_TMPL, b"")
    if len(template) < _TEMPLATE.size:
        return None
    _, spi, _, _, _, reqid, *_ = _TEMPLATE.unpack_from(template)
    if reqid != REQID:
        return None
    ends = socket.inet_ntoa(source[:4]), socket.inet_ntoa(destination[:4])
    return Policy(*ends, socket.ntohs(port), struct.unpack(">I", spi)[0])


def remove_all(netlink: Netlink) -> None:
    found = read(netlink, {})
    change(netlink, Changes((), (), (), tuple(found.policies), tuple(found.associations)))


def encrypts() -> bool:
    """Whether this kernel has ESP with our algorithm (it loads its modules when asked): tried with an association
    that no packet uses. False as well without the privilege."""
    probe = Association(
        "127.0.0.1", "127.0.0.1", 0xFFFF0000 | int.from_bytes(os.urandom(2), "big"), os.urandom(KEY_BYTES)
    )
    try:
        with Netlink(NETLINK_XFRM) as netlink:
            netlink.batch(acknowledged([add_association(probe)]))
            netlink.batch(acknowledged([delete_association(probe)]))
    except OSError:
        return False
    return True
