"""What is true of balancing whichever part of the kernel does it; run by test_overlay_balance.py with nftables, and by
test_vm_balance.py with IPVS. The module that imports these has a fixture `balancer`."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from overlay import ipvs
from overlay.interface import Balancer, PublishedPort, Vip
from overlay.netlink import NETLINK_NETFILTER, NLM_F_ACK, Message, Netlink
from overlay.reconcile import AUDIT_PERIOD_S
from tests.overlay_lab import NET, UNDERLAY6, OverlayLab, SimulatedHost, address6

PORT = 8000
BACKENDS = {"a1": "10.77.1.11", "a2": "10.77.1.12", "a3": "10.77.1.13"}
CLIENT = "10.77.1.10"
FOUR = tuple(BACKENDS.values())
SIX = tuple(address6(NET, address) for address in FOUR)
WEB, WEB6, HEAVY, STICKY, OWN, EMPTY, EMPTY6 = (
    Vip(NET.network_id, "10.77.1.200", FOUR),
    Vip(NET.network_id, "fd00:77:1::c8", SIX),
    Vip(NET.network_id, "10.77.1.201", FOUR[:2], (30, 10)),
    Vip(NET.network_id, "10.77.1.202", FOUR, balance="sh"),
    Vip(NET.network_id, "10.77.1.203", FOUR[:1]),
    Vip(NET.network_id, "10.77.1.204", ()),
    Vip(NET.network_id, "fd00:77:1::cc", ()),
)
VIPS = (WEB, WEB6, HEAVY, STICKY, OWN, EMPTY, EMPTY6)
EVERYWHERE = PublishedPort("tcp", 18080, tuple((address, PORT) for address in FOUR + SIX))
DATAGRAMS = PublishedPort("udp", 18053, tuple((address, 53) for address in FOUR + SIX))
WEIGHED = PublishedPort("tcp", 18081, tuple((address, PORT) for address in FOUR[:2]), (1, 3))
SOURCED = PublishedPort("tcp", 18082, tuple((address, PORT) for address in FOUR), balance="sh")
AT_ONE = PublishedPort("tcp", 18083, ((FOUR[0], PORT),), host_ip="192.168.99.55")
AT_ONE6 = PublishedPort("tcp", 18083, ((SIX[1], PORT),), host_ip=f"{UNDERLAY6}55")
UNSERVED = PublishedPort("tcp", 18084, ())
PORTS = (EVERYWHERE, DATAGRAMS, WEIGHED, SOURCED, AT_ONE, AT_ONE6, UNSERVED)
CLIENT_OUTSIDE, CLIENT_OUTSIDE6 = "192.168.99.100", f"{UNDERLAY6}64"
SCTP_SERVICE = 9


async def build(balancer: Balancer) -> OverlayLab:
    """A server aN on each host hN, a client c1 on h1; h1 has a second address."""
    lab = OverlayLab(balancer)
    await lab.apply()
    for host, (name, address) in zip(lab.hosts, BACKENDS.items(), strict=True):
        serve(lab, name, await lab.task(host, name, (NET, address)))
    await lab.task(lab.hosts[0], "c1", (NET, CLIENT))
    for address in ("192.168.99.55/24", f"{UNDERLAY6}55/64"):
        lab.sockets.run(lab.hosts[0].netns, "ip", "addr", "add", address, "dev", "eth0", "nodad")
    await lab.apply(VIPS, PORTS)
    return lab


def serve(lab: OverlayLab, name: str, netns: Path) -> None:
    for address in (BACKENDS[name], address6(NET, BACKENDS[name])):
        lab.sockets.serve(netns, address, PORT, name)
        lab.sockets.serve(netns, address, 53, name, "udp")


@pytest.fixture(scope="module")
def lab(balancer: Balancer) -> Iterator[OverlayLab]:
    made = asyncio.run(build(balancer))
    yield made
    asyncio.run(made.close())


def labels(lab: OverlayLab, netns: Path, address: str, port: int, times: int) -> Counter[str]:
    return Counter(lab.sockets.ask(netns, address, port)[0] for _ in range(times))


def goes_on(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"still there?")
        return connection.recv(100) == b"still there?"
    except OSError:
        return False


def broken(opened: list[tuple[socket.socket, str]]) -> list[str]:
    """Greetings of the connections that do not go on."""
    return [greeting for connection, greeting in opened if not goes_on(connection)]


def host_addresses(host: SimulatedHost) -> tuple[str, str]:
    return host.address, host.address6


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def error_of(lab: OverlayLab, netns: Path, address: str, port: int) -> int:
    """errno of an attempt to connect; 0 = connected."""
    client = lab.sockets.open(netns, socket.SOCK_STREAM, family_of(address))
    try:
        client.connect((address, port))
    except TimeoutError:
        return errno.ETIMEDOUT
    except OSError as error:
        return error.errno or -1
    return 0


def forget_connections(lab: OverlayLab, netns: Path) -> None:
    """conntrack -F"""

    def flush() -> None:
        with Netlink(NETLINK_NETFILTER) as netlink:
            for family in (socket.AF_INET, socket.AF_INET6):
                body = struct.pack("=BBH", family, 0, 0)
                netlink.transaction([Message(1 << 8 | 2, NLM_F_ACK, body, "forget all connections")])

    lab.sockets.inside(netns, flush)


async def audit(lab: OverlayLab) -> None:
    for host in lab.hosts:
        host.now_s[0] += AUDIT_PERIOD_S
    await lab.apply(VIPS, PORTS)


# --- the client's address -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2])
def test_tasks_on_every_host_see_the_clients_address_through_any_host(lab: OverlayLab, number: int) -> None:
    for address, client in zip(host_addresses(lab.hosts[number]), (CLIENT_OUTSIDE, CLIENT_OUTSIDE6), strict=True):
        answers = [lab.sockets.ask(lab.client, address, 18080) for _ in range(6)]
        assert Counter(answers) == {(name, client): 2 for name in BACKENDS}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_tasks_see_the_address_of_clients_that_send_udp(lab: OverlayLab, number: int) -> None:
    for address, seen in zip(host_addresses(lab.hosts[number]), (CLIENT_OUTSIDE, CLIENT_OUTSIDE6), strict=True):
        answers = set()
        for _ in range(3):
            client = lab.sockets.open(lab.client, socket.SOCK_DGRAM, family_of(address))
            client.connect((address, 18053))
            client.send(b"?")
            answers.add(tuple(client.recv(100).decode().split()))
        assert answers == {(name, seen) for name in BACKENDS}


def test_a_hosts_own_connection_comes_from_its_own_address(lab: OverlayLab) -> None:
    host = lab.hosts[1]
    for address in host_addresses(host):
        answers = {lab.sockets.ask(host.netns, address, 18080) for _ in range(3)}
        assert answers == {(name, address) for name in BACKENDS}


@pytest.mark.parametrize(("loopback", "seen"), [("127.0.0.1", "198.18.0.2"), ("::1", "2001:2::2")])
def test_a_host_reaches_published_ports_by_its_loopback(lab: OverlayLab, loopback: str, seen: str) -> None:
    netns = lab.hosts[1].netns
    answers = {lab.sockets.ask(netns, loopback, 18080) for _ in range(3)}
    assert answers == {(name, seen) for name in BACKENDS}
    clients = [lab.sockets.open(netns, socket.SOCK_DGRAM, family_of(loopback)) for _ in range(3)]
    assert {lab.sockets.ask_udp(client, loopback, 18053) for client in clients} == set(BACKENDS)
    for port in (18081, 18084) if ":" in loopback else (18084,):  # served by IPv4 only, and not at all
        assert error_of(lab, netns, loopback, port) == errno.ECONNREFUSED


def test_a_host_reaches_a_task_elsewhere_by_its_address(lab: OverlayLab) -> None:
    assert lab.sockets.ask(lab.hosts[1].netns, FOUR[2], PORT) == ("a3", "198.18.0.2")


def test_a_task_that_asks_its_own_host_is_answered(lab: OverlayLab) -> None:
    answers = {lab.sockets.ask(lab.path("a1"), "192.168.99.1", 18080) for _ in range(3)}
    assert answers == {(name, "198.18.0.1") for name in BACKENDS}
    other = {lab.sockets.ask(lab.path("a1"), "192.168.99.3", 18080) for _ in range(3)}
    assert other == {(name, "192.168.99.1") for name in BACKENDS}


async def test_clients_are_hidden_from_tasks_that_cannot_answer_through_this_host(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    state = lab.state(host, vips=VIPS, published=PORTS)
    peers = tuple(replace(peer, masquerade=peer.node_id == "node2") for peer in state.peers)
    await host.network.apply(replace(state, peers=peers))
    answers = dict(lab.sockets.ask(lab.client, host.address, 18080) for _ in range(3))
    assert answers == {"a1": CLIENT_OUTSIDE, "a2": "198.18.0.1", "a3": CLIENT_OUTSIDE}
    await lab.apply(VIPS, PORTS)
    assert dict(lab.sockets.ask(lab.client, host.address, 18080) for _ in range(3))["a2"] == CLIENT_OUTSIDE


async def test_connections_outlive_restarts_of_all_agents(lab: OverlayLab) -> None:
    opened = [lab.sockets.connect(lab.client, host.address, 18080) for host in lab.hosts for _ in range(3)]
    opened += [lab.sockets.connect(lab.path("c1"), WEB.address, PORT) for _ in range(3)]
    for host in lab.hosts:
        host.again()
    await lab.apply(VIPS, PORTS)
    assert broken(opened) == []
    answers = {lab.sockets.ask(lab.client, "192.168.99.1", 18080) for _ in range(3)}
    assert answers == {(name, CLIENT_OUTSIDE) for name in BACKENDS}


def test_a_connection_that_the_tasks_namespace_forgot_goes_on(lab: OverlayLab) -> None:
    """Its next packet tells again which host it comes through."""
    opened = [lab.sockets.connect(lab.client, "192.168.99.1", 18080) for _ in range(3)]
    for name in BACKENDS:
        forget_connections(lab, lab.path(name))
    assert broken(opened) == []


# --- how backends are chosen ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vip", [WEB.address, WEB6.address])
def test_a_vip_takes_turns_and_backends_see_the_task(lab: OverlayLab, vip: str) -> None:
    own = address6(NET, CLIENT) if ":" in vip else CLIENT
    answers = Counter(lab.sockets.ask(lab.path("c1"), vip, PORT) for _ in range(9))
    assert answers == {(name, own): 3 for name in BACKENDS}


@pytest.mark.parametrize("vip", [WEB.address, WEB6.address])
def test_a_vip_balances_datagrams_and_answers_pings(lab: OverlayLab, vip: str) -> None:
    answers = set()
    for _ in range(3):
        client = lab.sockets.open(lab.path("c1"), socket.SOCK_DGRAM, family_of(vip))
        answers.add(lab.sockets.ask_udp(client, vip, 53))
    assert answers == set(BACKENDS)
    assert lab.sockets.run(lab.path("c1"), "ping", "-c1", "-W3", vip).returncode == 0


def test_weights_are_proportions(lab: OverlayLab) -> None:
    assert labels(lab, lab.path("c1"), HEAVY.address, PORT, 8) == {"a1": 6, "a2": 2}
    assert labels(lab, lab.client, "192.168.99.2", 18081, 8) == {"a1": 2, "a2": 6}


def test_by_source_a_client_always_meets_the_same_backend(lab: OverlayLab) -> None:
    assert len(labels(lab, lab.path("c1"), STICKY.address, PORT, 6)) == 1
    met = [labels(lab, lab.client, host.address, 18082, 3) for host in lab.hosts]
    assert len(met[0]) == 1
    assert met[0] == met[1] == met[2], "through whichever host"


def test_a_task_that_is_its_own_only_backend_reaches_itself(lab: OverlayLab) -> None:
    assert lab.sockets.ask(lab.path("a1"), OWN.address, PORT) == ("a1", FOUR[0])


def test_a_port_published_at_one_address_answers_there_only(lab: OverlayLab) -> None:
    assert lab.sockets.ask(lab.client, AT_ONE.host_ip, 18083) == ("a1", CLIENT_OUTSIDE)
    assert lab.sockets.ask(lab.client, AT_ONE6.host_ip, 18083) == ("a2", CLIENT_OUTSIDE6)
    for address in (lab.hosts[0].address, lab.hosts[0].address6):
        assert error_of(lab, lab.client, address, 18083) == errno.ECONNREFUSED


# --- nobody there -----------------------------------------------------------------------------------------------


def test_without_backends_a_vip_refuses_at_once(lab: OverlayLab) -> None:
    for vip in (EMPTY.address, EMPTY6.address):
        assert error_of(lab, lab.path("c1"), vip, PORT) == errno.ECONNREFUSED


def test_without_backends_a_published_port_refuses_at_once(lab: OverlayLab) -> None:
    for address in host_addresses(lab.hosts[0]):
        assert error_of(lab, lab.client, address, 18084) == errno.ECONNREFUSED


def test_a_port_with_ipv4_backends_only_refuses_ipv6_at_once(lab: OverlayLab) -> None:
    assert error_of(lab, lab.client, lab.hosts[0].address6, 18081) == errno.ECONNREFUSED


# --- changes ----------------------------------------------------------------------------------------------------


def without(backend: str) -> tuple[tuple[Vip, ...], tuple[PublishedPort, ...]]:
    gone = {BACKENDS[backend], address6(NET, BACKENDS[backend])}
    ports = (
        replace(port, backends=tuple(item for item in port.backends if item[0] not in gone), weights=())
        for port in PORTS
    )
    vips = (replace(vip, backends=tuple(item for item in vip.backends if item not in gone), weights=()) for vip in VIPS)
    return tuple(vips), tuple(ports)


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_removed_backend_keeps_its_connections_and_gets_no_new_ones(lab: OverlayLab, restarted: bool) -> None:
    task, client = lab.path("c1"), lab.client
    opened = [lab.sockets.connect(task, vip, PORT) for vip in (WEB.address, WEB6.address) for _ in range(3)]
    opened += [
        lab.sockets.connect(client, address, 18080) for address in host_addresses(lab.hosts[0]) for _ in range(3)
    ]
    await lab.apply(*without("a2"))
    if restarted:
        for host in lab.hosts:
            host.again()
        await lab.apply(*without("a2"))
    assert labels(lab, task, WEB.address, PORT, 6).keys() == {"a1", "a3"}
    assert labels(lab, client, "192.168.99.1", 18080, 6).keys() == {"a1", "a3"}
    assert any("a2" in greeting for _, greeting in opened)
    assert broken(opened) == []
    await lab.apply(VIPS, PORTS)
    assert labels(lab, task, WEB.address, PORT, 9).keys() == set(BACKENDS)


async def test_no_connection_is_lost_while_backends_come_and_go(lab: OverlayLab) -> None:
    for backend in ("a1", "a2", "a3", "a2", "a1"):
        await lab.apply(*without(backend))
        answered = labels(lab, lab.path("c1"), WEB.address, PORT, 4) + labels(lab, lab.client, "192.168.99.2", 18080, 4)
        assert answered.total() == 8
        assert backend not in answered
    await lab.apply(VIPS, PORTS)


async def test_a_client_of_datagrams_leaves_a_backend_that_is_gone(lab: OverlayLab) -> None:
    flows = {}
    for _ in range(3):
        client = lab.sockets.open(lab.path("c1"), socket.SOCK_DGRAM)
        flows[lab.sockets.ask_udp(client, WEB.address, 53)] = client
    vips, ports = without("a2")
    for host in lab.hosts:  # its task is gone as well
        state = lab.state(host, vips=vips, published=ports)
        ends = tuple(end for end in state.endpoints if end.address != BACKENDS["a2"])
        await host.network.apply(replace(state, endpoints=ends))
    assert lab.sockets.ask_udp(flows["a2"], WEB.address, 53) in {"a1", "a3"}
    assert lab.sockets.ask_udp(flows["a1"], WEB.address, 53) == "a1"
    await lab.apply(VIPS, PORTS)


# --- idle connections -------------------------------------------------------------------------------------------


async def test_idle_connections_are_remembered_for_five_days(lab: OverlayLab) -> None:
    setting = "net.netfilter.nf_conntrack_tcp_timeout_established"
    lab.sockets.run(lab.hosts[0].netns, "sysctl", "-qw", f"{setting}=600")
    await audit(lab)
    for netns in (lab.path("c1"), lab.path("a2"), lab.hosts[0].netns):
        found = lab.sockets.run(netns, "sysctl", "-n", setting)
        assert int(found.stdout) >= 432_000


@pytest.mark.parametrize("through", ["vip", "published"])
async def test_a_connection_that_was_forgotten_ends_or_goes_on_but_does_not_hang(lab: OverlayLab, through: str) -> None:
    where = lab.path("c1") if through == "vip" else lab.hosts[0].netns
    target = (WEB.address, PORT) if through == "vip" else ("192.168.99.1", 18080)
    clients = [lab.sockets.connect(lab.path("c1") if through == "vip" else lab.client, *target)[0] for _ in range(6)]
    forget_connections(lab, where)
    if lab.balancer == "ipvs":
        lab.sockets.inside(where, ipvs.flush)
        await audit(lab)
    ends = Counter[str]()
    for client in clients:
        try:
            client.sendall(b"still there?")
            ends["answered" if client.recv(100) == b"still there?" else "closed"] += 1
        except ConnectionResetError:
            ends["reset"] += 1
    assert ends["answered"] + ends["reset"] == 6
    assert labels(lab, lab.path("c1"), WEB.address, PORT, 3).keys() == set(BACKENDS), "and new ones work"


# --- repair -----------------------------------------------------------------------------------------------------


def works(lab: OverlayLab) -> bool:
    try:
        return (
            labels(lab, lab.path("c1"), WEB.address, PORT, 3).keys() == set(BACKENDS)
            and labels(lab, lab.path("c1"), WEB6.address, PORT, 3).keys() == set(BACKENDS)
            and {lab.sockets.ask(lab.client, "192.168.99.1", 18080)[1] for _ in range(3)} == {CLIENT_OUTSIDE}
            and {lab.sockets.ask(lab.client, lab.hosts[0].address6, 18080)[1] for _ in range(3)} == {CLIENT_OUTSIDE6}
        )
    except OSError:
        return False


async def test_flushed_rules_are_back_with_the_next_audit_and_foreign_tables_are_left_alone(lab: OverlayLab) -> None:
    places = [lab.hosts[0].netns, lab.path("c1"), lab.path("a2")]
    for netns in places:
        lab.sockets.run(netns, "nft", "flush", "ruleset")
        lab.sockets.run(netns, "nft", "add", "table", "ip", "foreign")
    await audit(lab)
    assert works(lab)
    for netns in places:
        assert "table ip foreign" in lab.sockets.run(netns, "nft", "list", "tables").stdout
        lab.sockets.run(netns, "nft", "delete", "table", "ip", "foreign")


async def test_tables_are_replaced_without_disturbing_a_connection(lab: OverlayLab) -> None:
    """As after an upgrade, or when somebody meddled with them."""
    opened = [lab.sockets.connect(lab.client, host.address, 18080) for host in lab.hosts for _ in range(3)]
    opened += [lab.sockets.connect(lab.path("c1"), WEB.address, PORT) for _ in range(3)]
    tables = [(lab.path(name), "pyswarm") for name in lab.tasks]
    tables += [(host.netns, f"pyswarm_t{host.number}") for host in lab.hosts]
    for netns, table in tables:
        lab.sockets.run(netns, "nft", "add", "chain", "ip", table, "meddled")
    await audit(lab)
    for netns, table in tables:
        assert "meddled" not in lab.sockets.run(netns, "nft", "list", "table", "ip", table).stdout
    assert broken(opened) == []


async def test_the_hook_at_a_tasks_link_comes_back(lab: OverlayLab) -> None:
    for damage in ("nft delete table netdev pyswarm", "ip link del eth0"):
        lab.sockets.run(lab.path("a2"), *damage.split())
        await audit(lab)
        assert works(lab), damage


def test_every_rule_can_be_listed(lab: OverlayLab) -> None:
    for netns in (lab.hosts[0].netns, lab.path("c1")):
        listed = lab.sockets.run(netns, "nft", "list", "ruleset")
        assert listed.returncode == 0, listed.stderr
        assert "refusal" in listed.stdout


def test_sctp_is_balanced(lab: OverlayLab) -> None:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError:
        pytest.skip("this kernel has no SCTP")

    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
        made.settimeout(4)
        return made

    servers = []
    for name, address in BACKENDS.items():
        server = lab.sockets.inside(lab.path(name), make)
        server.bind((address, SCTP_SERVICE))
        server.listen(8)
        servers.append(server)
    clients = [lab.sockets.inside(lab.path("c1"), make) for _ in BACKENDS]
    for client in clients:
        client.connect((WEB.address, SCTP_SERVICE))
    accepted = [server.accept()[1][0] for server in servers]
    assert accepted == [CLIENT] * 3
    for item in (*servers, *clients):
        item.close()


async def test_teardown_leaves_nothing_of_balancing_and_all_can_begin_again(lab: OverlayLab) -> None:
    host = lab.hosts[2]
    await host.network.teardown()
    assert "pyswarm" not in lab.sockets.run(host.netns, "nft", "list", "tables").stdout
    assert not lab.sockets.inside(host.netns, ipvs.any_here)
    await lab.apply(VIPS, PORTS)
    serve(lab, "a3", await lab.task(host, "a3", (NET, BACKENDS["a3"])))
    assert labels(lab, lab.client, host.address, 18080, 6) == dict.fromkeys(BACKENDS, 2)
