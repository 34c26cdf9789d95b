"""Real packets between three hosts: VXLAN, VIPs, published ports, egress, isolation, the DNS redirect."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlay.addressing import leg_name, node_address6
from overlay.interface import PublishedPort, Vip
from tests.overlay_lab import (
    DNS_PORT,
    INSIDE,
    NET,
    OTHER,
    OUTSIDE,
    REFUSED_WITHIN_S,
    Capture,
    OverlayLab,
    address6,
)

pytestmark = pytest.mark.root

ECHO_REQUEST6, ECHO_REPLY6 = 128, 129
WEB_VIP, WEB_PORT = "10.77.1.200", 8000
EMPTY_VIP = "10.77.1.201"
OTHER_VIP = "10.77.3.200"
BACKENDS = {"a1": "10.77.1.11", "a2": "10.77.1.12", "a3": "10.77.1.13"}
PUBLISHED = PublishedPort("tcp", 18080, tuple((address, WEB_PORT) for address in BACKENDS.values()))
PUBLISHED_UDP = PublishedPort("udp", 18053, tuple((address, 53) for address in BACKENDS.values()))
EMPTY_PORT = PublishedPort("tcp", 18081, ())
VIPS = (
    Vip(NET.network_id, WEB_VIP, tuple(BACKENDS.values())),
    Vip(NET.network_id, EMPTY_VIP, ()),
    Vip(OTHER.network_id, OTHER_VIP, ("10.77.3.21",)),
)


async def build() -> OverlayLab:
    """Each host: a task aN in NET (a server). h1: c1 in NET and INSIDE, i1 in INSIDE only, o1 in OTHER. h2: i2, o2."""
    lab = OverlayLab()
    await lab.apply()
    for host, (name, address) in zip(lab.hosts, BACKENDS.items(), strict=True):
        path = await lab.task(host, name, (NET, address))
        lab.sockets.serve(path, "0.0.0.0", WEB_PORT, name)
        lab.sockets.serve(path, address, 53, name, "udp")
    h1, h2, _ = lab.hosts
    await lab.task(h1, "c1", (INSIDE, "10.77.2.10"), (NET, "10.77.1.10"))
    await lab.task(h1, "i1", (INSIDE, "10.77.2.11"))
    await lab.task(h2, "i2", (INSIDE, "10.77.2.12"))
    await lab.task(h1, "o1", (OTHER, "10.77.3.20"))
    await lab.task(h2, "o2", (OTHER, "10.77.3.21"))
    lab.sockets.serve(lab.path("i2"), "0.0.0.0", WEB_PORT, "i2")
    lab.sockets.serve(lab.path("o2"), "0.0.0.0", WEB_PORT, "o2")
    lab.sockets.serve(lab.outside, OUTSIDE, 9000, "outside")
    await lab.apply(VIPS, (PUBLISHED, PUBLISHED_UDP, EMPTY_PORT))
    return lab


@pytest.fixture(scope="module")
def lab() -> Iterator[OverlayLab]:
    made = asyncio.run(build())
    yield made
    asyncio.run(made.close())


def refused(lab: OverlayLab, netns: Path, address: str, port: int) -> bool:
    """True when a connection is refused at once; a silent timeout is not that."""
    client = lab.sockets.open(netns, socket.SOCK_STREAM)
    client.settimeout(REFUSED_WITHIN_S)
    try:
        client.connect((address, port))
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def cut_off(lab: OverlayLab, netns: Path, address: str, port: int, source: str = "") -> bool:
    """True when no connection comes about, for whatever reason."""
    client = lab.sockets.open(netns, socket.SOCK_STREAM)
    client.settimeout(REFUSED_WITHIN_S)
    client.bind((source, 0))
    try:
        client.connect((address, port))
    except OSError:
        return True
    return False


@pytest.mark.parametrize("target", BACKENDS)
def test_a_task_reaches_tasks_on_every_host_under_its_own_address(lab: OverlayLab, target: str) -> None:
    assert lab.sockets.ask(lab.path("c1"), BACKENDS[target], WEB_PORT) == (target, "10.77.1.10")


@pytest.mark.parametrize("target", BACKENDS)
def test_a_task_reaches_tasks_on_every_host_by_ipv6(lab: OverlayLab, target: str) -> None:
    there = address6(NET, BACKENDS[target])
    lab.sockets.serve(lab.path(target), there, 8006, target)
    assert lab.sockets.ask(lab.path("c1"), there, 8006) == (target, address6(NET, "10.77.1.10"))
    ping = lab.sockets.run(lab.path("c1"), "ping", "-c", "1", "-W", "2", "-M", "do", "-s", "1402", there)
    assert ping.returncode == 0, ping.stdout


def test_ipv6_goes_by_the_gateway_to_the_other_nodes_addresses_too(lab: OverlayLab) -> None:
    task = lab.path("c1")
    for address in (NET.gateway6, node_address6(1), node_address6(3)):
        ping = lab.sockets.run(task, "ping", "-c", "1", "-W", "2", address)
        assert ping.returncode == 0, ping.stdout
    assert f"via {NET.gateway6}" in lab.sockets.run(task, "ip", "-6", "route", "get", "2001:db8::1").stdout


def test_ipv6_solicitations_are_answered_by_the_own_host_and_flooded_to_nobody(lab: OverlayLab) -> None:
    """Neither for a task elsewhere nor for an address that nobody has."""
    capture = Capture(lab.sockets, lab.outside)
    lab.sockets.run(lab.path("c1"), "ip", "-6", "neigh", "flush", "dev", "eth1")
    for address in (address6(NET, BACKENDS["a2"]), "fd00:77:1::dead"):
        lab.sockets.run(lab.path("c1"), "ping", "-c", "1", "-W", "1", address)
    # Ethernet 14 (12 = its type), IPv6 40 (20 = its next header), then ICMPv6's type
    ipv6 = [frame for frame in capture.frames() if frame[12:14] == b"\x86\xdd"]
    assert {frame[54] for frame in ipv6 if frame[20] == socket.IPPROTO_ICMPV6} == {ECHO_REQUEST6, ECHO_REPLY6}


def test_ipv6_is_off_where_the_network_has_none(lab: OverlayLab) -> None:
    for name in ("i1", "o1"):
        assert lab.sockets.run(lab.path(name), "ip", "-6", "-br", "addr", "show", "dev", "eth0").stdout == ""
    assert lab.sockets.run(lab.path("c1"), "ip", "-6", "-br", "addr", "show", "dev", "eth0").stdout == ""
    here = lab.sockets.run(lab.hosts[0].netns, "ip", "-6", "-br", "addr", "show", "dev", leg_name("t1", OTHER.vni))
    assert here.stdout == ""


@pytest.mark.parametrize(("payload", "passes"), [(1422, True), (1423, False)])
def test_the_mtu_leaves_room_for_vxlan(lab: OverlayLab, payload: int, passes: bool) -> None:
    ping = ("ping", "-M", "do", "-c", "1", "-W", "2", "-s", str(payload), BACKENDS["a2"])
    assert (lab.sockets.run(lab.path("c1"), *ping).returncode == 0) is passes


def test_a_vip_goes_round_robin_over_all_hosts(lab: OverlayLab) -> None:
    labels = [lab.sockets.ask(lab.path("c1"), WEB_VIP, WEB_PORT)[0] for _ in range(9)]
    assert Counter(labels) == {"a1": 3, "a2": 3, "a3": 3}
    assert len({*labels[:3]}) == 3


def test_a_backend_reaches_itself_by_its_vip(lab: OverlayLab) -> None:
    seen = {lab.sockets.ask(lab.path("a1"), WEB_VIP, WEB_PORT) for _ in range(3)}
    assert ("a1", BACKENDS["a1"]) in seen


def test_a_vip_balances_udp(lab: OverlayLab) -> None:
    answers = set()
    for _ in range(3):
        client = lab.sockets.open(lab.path("c1"), socket.SOCK_DGRAM)
        answers.add(lab.sockets.ask_udp(client, WEB_VIP, 53))
    assert answers == set(BACKENDS)


def test_a_vip_without_backends_refuses_at_once(lab: OverlayLab) -> None:
    assert refused(lab, lab.path("c1"), EMPTY_VIP, WEB_PORT)
    client = lab.sockets.open(lab.path("c1"), socket.SOCK_DGRAM)
    client.connect((EMPTY_VIP, 53))
    with pytest.raises((PermissionError, ConnectionRefusedError)):  # the local reject tells the sender itself
        client.send(b"?")


def test_vips_of_other_networks_are_not_there(lab: OverlayLab) -> None:
    assert lab.sockets.ask(lab.path("o1"), OTHER_VIP, WEB_PORT)[0] == "o2"
    assert cut_off(lab, lab.path("c1"), OTHER_VIP, WEB_PORT)


def test_networks_do_not_reach_each_other_through_the_host(lab: OverlayLab) -> None:
    assert cut_off(lab, lab.path("c1"), "10.77.3.20", WEB_PORT)
    assert cut_off(lab, lab.path("c1"), "10.77.3.21", WEB_PORT)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_published_port_answers_on_every_host(lab: OverlayLab, number: int) -> None:
    answers = [lab.sockets.ask(lab.client, f"192.168.99.{number}", 18080) for _ in range(6)]
    assert Counter(label for label, _ in answers) == {"a1": 2, "a2": 2, "a3": 2}
    assert {source for _, source in answers} == {"192.168.99.100"}, "the client's own address"


@pytest.mark.parametrize("address", ["127.0.0.1", "192.168.99.2"])
def test_a_published_port_answers_the_host_itself(lab: OverlayLab, address: str) -> None:
    labels = {lab.sockets.ask(lab.hosts[1].netns, address, 18080)[0] for _ in range(3)}
    assert labels == set(BACKENDS)


def test_a_published_udp_port_answers(lab: OverlayLab) -> None:
    answers = set()
    for _ in range(3):
        client = lab.sockets.open(lab.client, socket.SOCK_DGRAM)
        answers.add(lab.sockets.ask_udp(client, "192.168.99.2", 18053))
    assert answers == set(BACKENDS)


def test_a_task_reaches_a_published_port_of_its_own_and_another_host(lab: OverlayLab) -> None:
    for address in ("192.168.99.1", "192.168.99.3"):
        assert {lab.sockets.ask(lab.path("a1"), address, 18080)[0] for _ in range(3)} == set(BACKENDS)


def test_a_published_port_without_backends_refuses_at_once(lab: OverlayLab) -> None:
    assert refused(lab, lab.client, "192.168.99.1", 18081)
    assert refused(lab, lab.hosts[0].netns, "127.0.0.1", 18081)


def test_egress_comes_from_the_host(lab: OverlayLab) -> None:
    assert lab.sockets.ask(lab.path("a2"), OUTSIDE, 9000) == ("outside", "192.168.99.2")


def test_the_default_route_is_by_the_first_network_that_is_not_internal(lab: OverlayLab) -> None:
    assert lab.sockets.ask(lab.path("c1"), OUTSIDE, 9000) == ("outside", "192.168.99.1")


def test_an_internal_network_reaches_its_own_tasks_and_nothing_else(lab: OverlayLab) -> None:
    assert lab.sockets.ask(lab.path("i1"), "10.77.2.12", WEB_PORT) == ("i2", "10.77.2.11")
    for address in (OUTSIDE, "192.168.99.1", "10.77.1.11"):
        client = lab.sockets.open(lab.path("i1"), socket.SOCK_STREAM)
        with pytest.raises(OSError, match="unreachable"):
            client.connect((address, WEB_PORT))


def test_outsiders_cannot_route_into_a_network(lab: OverlayLab) -> None:
    lab.sockets.run(lab.client, "ip", "route", "replace", NET.subnet, "via", "192.168.99.1")
    assert cut_off(lab, lab.client, BACKENDS["a1"], WEB_PORT)


def test_a_task_cannot_reach_what_listens_on_the_hosts_loopback(lab: OverlayLab) -> None:
    """route_localnet is on for the legs: a raw frame to 127.0.0.1 must be dropped there."""
    lab.sockets.serve(lab.hosts[0].netns, "127.0.0.1", 7000, "secret")
    task = lab.path("a1")
    lab.sockets.run(task, "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
    lab.sockets.run(task, "ip", "addr", "del", "127.0.0.1/8", "dev", "lo")
    lab.sockets.run(task, "ip", "route", "add", "127.0.0.1/32", "via", NET.gateway)
    assert cut_off(lab, task, "127.0.0.1", 7000, source=BACKENDS["a1"])
    lab.sockets.run(task, "ip", "route", "del", "127.0.0.1/32")
    lab.sockets.run(task, "ip", "addr", "add", "127.0.0.1/8", "dev", "lo")


def test_dns_questions_reach_the_server_on_its_high_port(lab: OverlayLab) -> None:
    task = lab.path("c1")
    lab.sockets.serve(task, "127.0.0.11", DNS_PORT, "dns", "udp")
    lab.sockets.serve(task, "127.0.0.11", DNS_PORT, "dns")
    client = lab.sockets.open(task, socket.SOCK_DGRAM)
    client.connect(("127.0.0.11", 53))  # connected: an answer from any other address or port would be dropped
    client.send(b"?")
    assert client.recv(100).decode().split()[0] == "dns"
    assert lab.sockets.ask(task, "127.0.0.11", 53)[0] == "dns"


def test_port_53_stays_free_for_the_task(lab: OverlayLab) -> None:
    server = lab.sockets.open(lab.path("c1"), socket.SOCK_STREAM)
    server.bind(("0.0.0.0", 53))


async def test_a_removed_backend_keeps_its_connections_and_gets_no_new_ones(lab: OverlayLab) -> None:
    client = lab.path("c1")
    open_connections = [lab.sockets.connect(client, WEB_VIP, WEB_PORT) for _ in range(3)]
    udp = {}
    for _ in range(3):
        datagrams = lab.sockets.open(client, socket.SOCK_DGRAM)
        udp[lab.sockets.ask_udp(datagrams, WEB_VIP, 53)] = datagrams
    rest = (BACKENDS["a1"], BACKENDS["a3"])
    await lab.apply((Vip(NET.network_id, WEB_VIP, rest), *VIPS[1:]), (PUBLISHED, PUBLISHED_UDP, EMPTY_PORT))
    assert {lab.sockets.ask(client, WEB_VIP, WEB_PORT)[0] for _ in range(6)} == {"a1", "a3"}
    for connection, greeting in open_connections:
        connection.sendall(b"still there?")
        assert connection.recv(100) == b"still there?", greeting
    # UDP has no end: the flow to the removed backend is cut and goes to another; the others stay where they were.
    assert lab.sockets.ask_udp(udp["a2"], WEB_VIP, 53) in ("a1", "a3")
    assert lab.sockets.ask_udp(udp["a1"], WEB_VIP, 53) == "a1"
    await lab.apply(VIPS, (PUBLISHED, PUBLISHED_UDP, EMPTY_PORT))


async def test_a_udp_client_of_a_published_port_follows_its_backends(lab: OverlayLab) -> None:
    flows = {}
    for _ in range(3):
        client = lab.sockets.open(lab.client, socket.SOCK_DGRAM)
        flows[lab.sockets.ask_udp(client, "192.168.99.3", 18053)] = client
    await lab.apply(VIPS, (PUBLISHED, PublishedPort("udp", 18053, PUBLISHED_UDP.backends[:1]), EMPTY_PORT))
    assert [lab.sockets.ask_udp(flow, "192.168.99.3", 18053) for flow in flows.values()] == ["a1"] * 3
    await lab.apply(VIPS, (PUBLISHED, PUBLISHED_UDP, EMPTY_PORT))


async def test_two_services_asked_in_turns_are_both_balanced(lab: OverlayLab) -> None:
    """A counter shared by services with as many backends would send each of them to one backend only."""
    vips = (
        Vip(NET.network_id, "10.77.1.210", (BACKENDS["a1"], BACKENDS["a2"])),
        Vip(NET.network_id, "10.77.1.211", (BACKENDS["a1"], BACKENDS["a2"])),
    )
    await lab.apply((*VIPS, *vips), (PUBLISHED, PUBLISHED_UDP, EMPTY_PORT))
    answers = [
        (
            lab.sockets.ask(lab.path("c1"), "10.77.1.210", WEB_PORT)[0],
            lab.sockets.ask(lab.path("c1"), "10.77.1.211", WEB_PORT)[0],
        )
        for _ in range(4)
    ]
    assert Counter(first for first, _ in answers) == {"a1": 2, "a2": 2}
    assert Counter(second for _, second in answers) == {"a1": 2, "a2": 2}
    await lab.apply(VIPS, (PUBLISHED, PUBLISHED_UDP, EMPTY_PORT))


async def test_many_backends_of_one_port_are_all_used(lab: OverlayLab) -> None:
    many = tuple((BACKENDS["a1"], 20000 + number) for number in range(256))
    for _, port in many[::32]:
        lab.sockets.serve(lab.path("a1"), "0.0.0.0", port, str(port))
    await lab.apply(VIPS, (PUBLISHED, PUBLISHED_UDP, EMPTY_PORT, PublishedPort("tcp", 18090, many)))
    answered = Counter[str]()
    for _ in range(256):
        client = lab.sockets.open(lab.hosts[2].netns, socket.SOCK_STREAM)
        if client.connect_ex(("127.0.0.1", 18090)) == 0:
            answered[client.recv(100).decode().split()[0]] += 1
        client.close()
    assert answered == {str(port): 1 for _, port in many[::32]}
    await lab.apply(VIPS, (PUBLISHED, PUBLISHED_UDP, EMPTY_PORT))
