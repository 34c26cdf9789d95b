"""A client that keeps sending datagrams never ends its flow: it has to be led away from what is over, also from what
ended while the agent was away. On the real kernel."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from overlay.interface import PublishedPort
from tests.overlay_lab import OverlayLab

pytest.register_assert_rewrite("tests.balance_cases")
from tests.balance_cases import BACKENDS, DATAGRAMS, FOUR, PORTS, VIPS, WEB, audit, build, without  # noqa: E402

pytestmark = pytest.mark.root

TRACKING = """
table ip foreign {
  chain in { type filter hook prerouting priority 0; ct state invalid drop; }
  chain out { type filter hook output priority 0; ct state invalid drop; }
}"""
"""Somebody's rules because of which the kernel tracks connections while ours are gone."""


@pytest_asyncio.fixture
async def lab() -> AsyncIterator[OverlayLab]:
    made = await build("nftables")
    yield made
    await made.close()


def flows(lab: OverlayLab) -> dict[tuple[str, int], dict[str, socket.socket]]:
    """By where they were sent to and who answered: from the task c1 to the VIP, from outside and from the host itself
    to the published port."""
    host = lab.hosts[0]
    found: dict[tuple[str, int], dict[str, socket.socket]] = {}
    for netns, address, port in (
        (lab.path("c1"), WEB.address, 53),
        (lab.client, host.address, DATAGRAMS.port),
        (host.netns, "127.0.0.1", DATAGRAMS.port),
    ):
        opened = [lab.sockets.open(netns, socket.SOCK_DGRAM) for _ in BACKENDS]
        found[address, port] = {lab.sockets.ask_udp(client, address, port): client for client in opened}
        assert found[address, port].keys() == BACKENDS.keys()
    return found


async def test_a_backend_that_went_while_the_agent_was_away_is_left_by_its_clients(lab: OverlayLab) -> None:
    opened = flows(lab)
    for host in lab.hosts:
        host.again()
    await lab.apply(*without("a2"))
    for target, clients in opened.items():
        assert lab.sockets.ask_udp(clients["a2"], *target) in {"a1", "a3"}
        assert lab.sockets.ask_udp(clients["a1"], *target) == "a1", "the others stay where they were"


async def test_who_sent_while_our_rules_were_gone_is_served_after_the_repair(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    places = [
        (lab.path("c1"), lab.path("c1"), WEB.address, 53),
        (host.netns, lab.client, host.address, DATAGRAMS.port),
        (host.netns, host.netns, "127.0.0.1", DATAGRAMS.port),
    ]
    clients = []
    for where, netns, address, port in places:
        lab.sockets.run(where, "nft", "flush", "ruleset")
        assert lab.sockets.run(where, "nft", TRACKING).returncode == 0
        clients.append(lab.sockets.open(netns, socket.SOCK_DGRAM))
        clients[-1].sendto(b"?", (address, port))
    await audit(lab)
    for client, (_, _, address, port) in zip(clients, places, strict=True):
        assert lab.sockets.ask_udp(client, address, port) in BACKENDS


async def test_a_port_that_moves_to_one_address_is_left_at_the_others(lab: OverlayLab) -> None:
    """The same number, published by another service at another address."""
    opened = flows(lab)
    moved = PublishedPort("udp", DATAGRAMS.port, ((FOUR[0], 53),), host_ip="192.168.99.55")
    await lab.apply(VIPS, tuple(moved if port is DATAGRAMS else port for port in PORTS))
    client = opened[lab.hosts[0].address, DATAGRAMS.port]["a1"]
    client.sendto(b"?", (lab.hosts[0].address, DATAGRAMS.port))
    with pytest.raises(OSError):
        client.recv(100)
