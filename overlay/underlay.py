"""How large a packet the underlay takes: what the link takes, and the path to each peer."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from overlay.interface import HostState
from overlay.plan import mtu_left

log = structlog.get_logger("overlay")


class Underlay:
    def __init__(self) -> None:
        self.link_mtu_bytes = 0
        """Of the link that has this node's data path address."""
        self.mtu_bytes = 0
        """The least of that and of the paths to all peers."""
        self._paths: dict[str, int] = {}
        """Peer's data path address -> MTU of the path to it, in bytes, as measured last."""
        self._warned: set[tuple[str, int]] = set()

    def learn(self, paths: Mapping[str, int], state: HostState) -> None:
        """A peer that is not in `paths` did not answer and keeps the last."""
        peers = {peer.vtep for peer in state.peers}
        self._paths = {peer: mtu for peer, mtu in {**self._paths, **paths}.items() if peer in peers}

    def resize(self, state: HostState) -> bool:
        """Decide; True when it is another MTU than before."""
        before = self.mtu_bytes
        paths = [self._paths[peer.vtep] for peer in state.peers if peer.vtep in self._paths]
        self.mtu_bytes = min([self.link_mtu_bytes, *paths])
        if before not in (0, self.mtu_bytes):
            log.info("underlay_mtu_changed", bytes=self.mtu_bytes, before=before, link=self.link_mtu_bytes)
        for network in state.networks:
            option, left = network.mtu_bytes or 0, mtu_left(network, self.mtu_bytes)
            if option > left and (network.network_id, left) not in self._warned:
                self._warned.add((network.network_id, left))
                log.warning("network_mtu_too_large", network=network.network_id, option=option, room=left)
        return self.mtu_bytes != before
