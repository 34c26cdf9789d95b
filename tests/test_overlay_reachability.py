"""Probes from namespaces, and the inspection of a host, on the real kernel: three hosts as namespaces."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from overlay import rtnl
from overlay.addressing import leg_name, network_namespace, task_mac
from overlay.diff import VXLAN_NAME
from overlay.interface import NetworkError
from overlay.netlink import NETLINK_ROUTE, Netlink, acknowledged
from overlay.reachability import IPV4, OpenSocket, answered, connect, echo_request, ping
from proto.dispatch_pb2 import Connect, Ping, ProbeResult
from proto.objects_pb2 import SCTP, TCP, UDP
from tests.overlay_lab import NET, OverlayLab, SimulatedHost, address6

OK, REFUSED, SILENT = ProbeResult.OK, ProbeResult.REFUSED, ProbeResult.SILENT
NEAR, FAR = "10.77.1.11", "10.77.1.12"


def test_an_answer_is_whole_or_it_is_none() -> None:
    request = echo_request(IPV4, 7, 3, 100)
    ip_header = bytes([0x45]) + bytes(19)
    reply = bytes([0, 0, 0, 0]) + request[4:]
    assert len(ip_header + request) == 100
    assert answered(IPV4, ip_header + reply, request)
    assert not answered(IPV4, ip_header + reply[:-1] + b"x", request)
    assert not answered(IPV4, ip_header + reply[:-1], request)
    assert not answered(IPV4, ip_header + request, request), "a request is no answer"
    assert not answered(IPV4, b"", request)


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, timeout=20)


def nft(netns: Path, *words: str) -> None:
    run("nsenter", f"--net={netns}", "nft", *words)


@pytest.fixture
async def lab() -> AsyncIterator[OverlayLab]:
    made = OverlayLab()
    try:
        await made.apply()
        await made.task(made.hosts[0], "near", (NET, NEAR))
        await made.task(made.hosts[1], "far", (NET, FAR))
        await made.apply()
        yield made
    finally:
        await made.close()


def from_task(host: SimulatedHost, task_id: str = "") -> OpenSocket:
    def open_socket(make: Callable[[], socket.socket]) -> Awaitable[socket.socket]:
        return host.network.inside(task_id, make)

    return open_socket


@pytest.mark.root
async def test_pings_measure_which_sizes_pass_whole(lab: OverlayLab) -> None:
    near, far = lab.hosts[0], lab.hosts[1]
    path = await ping(Ping(address=far.address, sizes=[84, 1400], full=True), from_task(near), 1500)
    assert (path.outcome, list(path.sizes), path.full_size) == (OK, [84, 1400, 1500], 1500)
    full = await ping(Ping(address=FAR, sizes=[84], full=True), from_task(near, "near"))
    assert (full.outcome, list(full.sizes), full.full_size) == (OK, [84, 1450], 1450)
    run("ip", "-n", far.netns.name, "link", "set", "eth0", "mtu", "1400")
    path = await ping(Ping(address=far.address, sizes=[84, 1400], full=True), from_task(near), 1500)
    assert (path.outcome, list(path.sizes), path.full_size) == (OK, [84, 1400], 1500)
    nobody = await ping(Ping(address="192.168.99.77", sizes=[84]), from_task(near))
    assert nobody.outcome in (SILENT, ProbeResult.UNREACHABLE)


@pytest.mark.root
async def test_connections_are_accepted_refused_or_unanswered(lab: OverlayLab) -> None:
    near, far_space = from_task(lab.hosts[0], "near"), lab.path("far")
    lab.sockets.serve(far_space, FAR, 80, "far")
    lab.sockets.serve(far_space, FAR, 53, "far", "udp")
    for protocol, port, outcome in ((TCP, 80, OK), (TCP, 81, REFUSED), (UDP, 53, OK), (UDP, 54, REFUSED)):
        result = await connect(Connect(address=FAR, port=port, protocol=protocol), near)
        assert result.outcome == outcome, (protocol, port, result)
    nft(far_space, "table ip t { chain c { type filter hook input priority 0; tcp dport 80 drop; }; }")
    assert (await connect(Connect(address=FAR, port=80), near)).outcome == SILENT
    sctp = await connect(Connect(address=FAR, port=80, protocol=SCTP), near)
    assert sctp.outcome in (REFUSED, ProbeResult.FAILED), "this kernel may lack SCTP"


@pytest.mark.root
async def test_both_families_are_probed(lab: OverlayLab) -> None:
    far6, near = address6(NET, FAR), from_task(lab.hosts[0], "near")
    full = await ping(Ping(address=far6, sizes=[84], full=True), near)
    assert (full.outcome, list(full.sizes), full.full_size) == (OK, [84, 1450], 1450)
    lab.sockets.serve(lab.path("far"), far6, 80, "far")
    for port, outcome in ((80, OK), (81, REFUSED)):
        assert (await connect(Connect(address=far6, port=port), near)).outcome == outcome


@pytest.mark.root
async def test_a_task_that_is_not_here_has_no_namespace(lab: OverlayLab) -> None:
    with pytest.raises(NetworkError, match="task far has no network namespace on this host"):
        await lab.hosts[0].network.inside("far", lambda: None)


@pytest.mark.root
async def test_an_inspection_finds_what_differs_and_changes_nothing(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    before = await host.network.inspect()
    assert before.forwards
    assert (before.underlay_link, before.underlay_mtu_bytes) == ("eth0", 1500)
    assert not before.tables_missing
    assert not before.strict_links
    assert not [drift for drift in before.networks if drift.missing or drift.foreign]
    space = host.run_dir / "netns" / network_namespace(NET.network_id)
    leg = leg_name(f"t{host.number}", NET.vni)

    def spoil() -> None:
        with Netlink(NETLINK_ROUTE) as netlink:
            index = rtnl.link_index(netlink, VXLAN_NAME)
            added = rtnl.add_forwarding(index, "02:42:00:00:00:09", "192.168.99.3")
            netlink.batch(acknowledged([*rtnl.delete_forwarding(index, task_mac(FAR)), added]))

    lab.sockets.inside(space, spoil)
    nft(lab.path("near"), "delete", "table", "ip", "pyswarm")
    run("nsenter", f"--net={host.netns}", "sysctl", "-qw", f"net.ipv4.conf.{leg}.rp_filter=1", "net.ipv4.ip_forward=0")
    for _ in range(2):
        after = await host.network.inspect()
        [drift] = [drift for drift in after.networks if drift.network_id == NET.network_id]
        assert drift.missing == (f"forwarding entry {task_mac(FAR)} to {lab.hosts[1].address}",)
        assert drift.foreign == ("forwarding entry 02:42:00:00:00:09 to 192.168.99.3",)
        assert (after.forwards, after.strict_links, after.tables_missing) == (False, (leg,), ("near",))
