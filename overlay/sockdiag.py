"""TCP sockets of one network namespace, as the kernel's sock_diag tells them (`ss` asks it, too).

Where somebody waits for many tasks, /proc/net/tcp costs too much: it walks the connections of the whole machine, and a
reading takes 4 ms with IPv6's; this takes 0.06 ms for what listens, and 0.5 ms with the connections.
"""

from __future__ import annotations

import socket
import struct
from collections import Counter

from overlay.netlink import Netlink

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_ESTABLISHED, _SYN_RECV, _LISTEN = 1, 3, 10
"""States of include/net/tcp_states.h."""
_REQUEST = struct.Struct("=BBBxI48x")
"""struct inet_diag_req_v2: family, protocol, extensions, states as bits; any socket."""


class TcpSockets:
    """Of the namespace in which it was made; to be used in any. Its methods raise OSError where the kernel cannot tell
    (no tcp_diag)."""

    def __init__(self) -> None:
        self._netlink = Netlink(_NETLINK_SOCK_DIAG)

    def close(self) -> None:
        self._netlink.close()

    def listening(self) -> set[int]:
        """Ports."""
        return {port for port, _ in self._read(_LISTEN)}

    def open_connections(self) -> Counter[int]:
        """Port that listens -> how many there are to it."""
        found = self._read(_LISTEN, _ESTABLISHED, _SYN_RECV)
        served = {port for port, state in found if state == _LISTEN}
        return Counter(port for port, state in found if state != _LISTEN and port in served)

    def _read(self, *states: int) -> list[tuple[int, int]]:
        """(local port, state) of each socket."""
        bits = sum(1 << state for state in states)
        found: list[tuple[int, int]] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, bits)
            for answer in self._netlink.dump(_SOCK_DIAG_BY_FAMILY, request, "read TCP sockets"):
                state, port = struct.unpack_from(">xBxxH", answer)
                found.append((port, state))
        return found
