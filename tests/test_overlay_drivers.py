"""The networks of a task that are no overlays: the host's bridge, a LAN by macvlan, none."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from overlay.addressing import overlaps
from overlay.hostbridge import SUBNETS, bridge_network, choose_subnet, free_address
from overlay.interface import (
    Attachment,
    BridgeNetwork,
    HostState,
    Interface,
    MacvlanNetwork,
    NetworkError,
    OverlayNetwork,
    PublishedPort,
)
from overlay.reconcile import AUDIT_PERIOD_S
from tests.overlay_lab import NET, OUTSIDE, UNDERLAY6, OverlayLab, address6, interface

BRIDGE = BridgeNetwork("netbbbbbbbbbbbbbbbbbbbbbb")
LAN = MacvlanNetwork("netmmmmmmmmmmmmmmmmmmmmmm", "eth0", "192.168.99.0/24", OUTSIDE)
BRIDGED = Interface(BRIDGE.network_id, "")
ON_LAN = Interface(LAN.network_id, "192.168.99.50/24")


# --- which subnet, which address -------------------------------------------------------------------------


def test_the_bridge_takes_the_first_subnet_that_overlaps_nothing() -> None:
    assert choose_subnet("b", []) == "172.17.0.0/16"
    assert choose_subnet("b", [("172.17.0.1/32", "docker0"), ("172.16.0.0/14", "a route")]) == "172.20.0.0/16"
    with pytest.raises(NetworkError, match=r"network b: each of 172\.17\.0\.0/16 to 192\.168\.240\.0/20 overlaps"):
        choose_subnet("b", [("172.16.0.0/12", "a route"), ("192.168.0.0/16", "a route")])


@given(st.lists(st.sampled_from(SUBNETS), max_size=10))
def test_the_chosen_subnet_is_free(taken: list[str]) -> None:
    assert (
        overlaps(choose_subnet("b", [(subnet, "x") for subnet in taken]), [(subnet, "x") for subnet in taken]) is None
    )


SMALL = bridge_network("b", "172.17.0.0/29")


@given(st.sets(st.integers(2, 6), max_size=4), st.integers(1, 6))
def test_an_address_is_free_and_the_one_after_the_last_given(used: set[int], last: int) -> None:
    taken = {f"172.17.0.{number}" for number in used}
    found = free_address(SMALL, taken, f"172.17.0.{last}/29")
    number = int(found.removesuffix("/29").rpartition(".")[2])
    assert number in {2, 3, 4, 5, 6} - used
    between = [(last + step - 1) % 6 + 1 for step in range(1, (number - last - 1) % 6 + 1)]
    assert set(between) <= used | {1}


def test_a_full_bridge_is_an_error() -> None:
    with pytest.raises(NetworkError, match=r"network b: all 6 addresses of 172\.17\.0\.0/29"):
        free_address(SMALL, [f"172.17.0.{number}" for number in range(2, 7)], "")


# --- on the kernel ---------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def lab() -> AsyncIterator[OverlayLab]:
    made = OverlayLab()
    await made.hosts[0].network.apply(state(made))
    made.sockets.serve(made.outside, OUTSIDE, 9000, "outside")
    yield made
    await made.close()


def state(lab: OverlayLab, *published: PublishedPort) -> HostState:
    return replace(lab.state(lab.hosts[0], (NET,), published=published), bridges=(BRIDGE,), macvlans=(LAN,))


async def attach(lab: OverlayLab, task_id: str, *interfaces: Interface) -> str:
    """The address that the host gave it."""
    network = lab.hosts[0].network
    path = await network.attach(Attachment(task_id, interfaces))
    lab.tasks[task_id] = (lab.hosts[0], path, {})
    return await network.given_address(task_id)


@pytest.mark.root
async def test_tasks_on_the_bridge_have_egress_each_other_and_ports_of_the_host(lab: OverlayLab) -> None:
    first, second = await attach(lab, "b1", BRIDGED), await attach(lab, "b2", BRIDGED)
    assert (first, second) == ("172.17.0.2", "172.17.0.3")
    lab.sockets.serve(lab.path("b2"), "0.0.0.0", 80, "b2")
    assert lab.sockets.ask(lab.path("b1"), second, 80) == ("b2", first)
    assert lab.sockets.ask(lab.path("b1"), OUTSIDE, 9000) == ("outside", "192.168.99.1")
    await lab.hosts[0].network.apply(state(lab, PublishedPort("tcp", 18080, ((second, 80),))))
    assert lab.sockets.ask(lab.client, "192.168.99.1", 18080)[0] == "b2"


@pytest.mark.root
async def test_a_task_may_be_on_the_bridge_and_on_an_overlay(lab: OverlayLab) -> None:
    given = await attach(lab, "x", interface(NET, "10.77.1.20"), BRIDGED)
    await attach(lab, "y", interface(NET, "10.77.1.21"))
    lab.sockets.serve(lab.path("x"), "0.0.0.0", 80, "x")
    assert given == "172.17.0.2"
    assert lab.sockets.ask(lab.path("y"), "10.77.1.20", 80) == ("x", "10.77.1.21")


@pytest.mark.root
async def test_the_bridge_keeps_clear_of_what_the_host_has(lab: OverlayLab) -> None:
    host = lab.hosts[1]
    lab.sockets.run(host.netns, "ip", "route", "add", "172.17.0.0/16", "via", OUTSIDE)
    clash = OverlayNetwork("netcccccccccccccccccccccc", 5000, "172.18.0.0/16", "172.18.0.1")
    wanted = replace(lab.state(host, (clash,)), bridges=(BRIDGE,))
    await host.network.apply(wanted)
    await host.network.attach(Attachment("b1", (BRIDGED,)))
    assert await host.network.given_address("b1") == "172.19.0.2"
    late = OverlayNetwork("netdddddddddddddddddddddd", 5001, "172.19.4.0/24", "172.19.4.1")
    await host.network.apply(replace(wanted, networks=(clash, late)))
    with pytest.raises(NetworkError, match=r"172\.19\.4\.0/24 overlaps the bridge of this host's own"):
        await host.network.attach(Attachment("x", (Interface(late.network_id, "172.19.4.5/24"),)))


@pytest.mark.root
async def test_a_macvlan_task_stands_in_the_lan_with_its_own_address(lab: OverlayLab) -> None:
    await attach(lab, "m1", ON_LAN)
    lab.sockets.serve(lab.path("m1"), "0.0.0.0", 80, "m1")
    assert lab.sockets.ask(lab.client, "192.168.99.50", 80) == ("m1", "192.168.99.100")
    assert lab.sockets.ask(lab.path("m1"), OUTSIDE, 9000) == ("outside", "192.168.99.50")


@pytest.mark.root
async def test_a_macvlan_network_without_its_parent_says_so(lab: OverlayLab) -> None:
    network = lab.hosts[0].network
    await network.apply(replace(state(lab), macvlans=(replace(LAN, parent="eth7"),)))
    with pytest.raises(NetworkError, match="task m1: this host has no link eth7, the parent of macvlan network netmmm"):
        await network.attach(Attachment("m1", (ON_LAN,)))
    assert await network.attached() == frozenset()


@pytest.mark.root
async def test_a_task_on_no_network_has_a_loopback_only(lab: OverlayLab) -> None:
    await attach(lab, "n1")
    links = lab.sockets.run(lab.path("n1"), "ip", "-br", "-4", "addr").stdout.splitlines()
    assert [line.split()[:3:2] for line in links] == [["lo", "127.0.0.1/8"]]
    client = lab.sockets.open(lab.path("n1"), socket.SOCK_STREAM)
    with pytest.raises(OSError, match="unreachable"):
        client.connect((OUTSIDE, 9000))


@pytest.mark.root
async def test_a_restarted_agent_adopts_them_and_teardown_leaves_nothing(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    given = await attach(lab, "b1", BRIDGED)
    await attach(lab, "m1", ON_LAN)
    await attach(lab, "n1")
    outside, _ = lab.sockets.connect(lab.path("b1"), OUTSIDE, 9000)
    on_lan, _ = lab.sockets.connect(lab.path("m1"), OUTSIDE, 9000)
    links = [lab.sockets.run(lab.path(name), "ip", "-o", "link").stdout for name in ("b1", "m1", "n1")]
    await asyncio.to_thread(host.again)
    await host.network.apply(state(lab))
    assert await attach(lab, "b1", BRIDGED) == given
    assert await attach(lab, "m1", ON_LAN) == ""
    assert await attach(lab, "b2", BRIDGED) == "172.17.0.3"
    assert links == [lab.sockets.run(lab.path(name), "ip", "-o", "link").stdout for name in ("b1", "m1", "n1")]
    for connection in (outside, on_lan):
        connection.sendall(b"x")
        assert connection.recv(10) == b"x"
    await host.network.teardown()
    assert not (host.run_dir / "netns").exists()
    assert "pyst1" not in lab.sockets.run(host.netns, "ip", "link").stdout


@pytest.mark.root
@pytest.mark.parametrize(("task", "command"), [("b1", "ip link del eth0"), ("m1", "ip link del eth0")])
async def test_their_links_are_repaired(lab: OverlayLab, task: str, command: str) -> None:
    host = lab.hosts[0]
    await attach(lab, task, {"b1": BRIDGED, "m1": ON_LAN}[task])
    assert lab.sockets.run(lab.path(task), *command.split()).returncode == 0
    host.now_s[0] += AUDIT_PERIOD_S
    await host.network.apply(state(lab))
    assert lab.sockets.ask(lab.path(task), OUTSIDE, 9000)[0] == "outside"


@pytest.mark.root
async def test_the_bridge_goes_with_its_last_task(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    await attach(lab, "b1", BRIDGED)
    await host.network.apply(lab.state(host, (NET,)))
    assert "pyst1-0" in lab.sockets.run(host.netns, "ip", "link").stdout
    await host.network.detach("b1")
    assert "pyst1-0" not in lab.sockets.run(host.netns, "ip", "link").stdout


@pytest.mark.root
@pytest.mark.parametrize("other", [BRIDGED, ON_LAN], ids=["bridge", "macvlan"])
@pytest.mark.parametrize("comes_first", [True, False])
async def test_published_connections_are_answered_whatever_other_networks_the_task_has(
    lab: OverlayLab, other: Interface, comes_first: bool
) -> None:
    host, neighbour = lab.hosts[:2]
    own = interface(NET, "10.77.1.20")
    await attach(lab, "x", *((other, own) if comes_first else (own, other)))
    lab.tasks["x"] = (host, lab.path("x"), {NET: "10.77.1.20"})
    for address in ("0.0.0.0", "::"):
        lab.sockets.serve(lab.path("x"), address, 80 + 6 * (":" in address), "x")
    port = PublishedPort("tcp", 18080, (("10.77.1.20", 80), (address6(NET, "10.77.1.20"), 86)))
    await neighbour.network.apply(lab.state(neighbour, (NET,), published=(port,)))
    for damage in ("true", "ip rule del table 198", "ip route flush table 198", "ip -6 route flush table 198"):
        lab.sockets.run(lab.path("x"), *damage.split())
        host.now_s[0] += AUDIT_PERIOD_S
        await host.network.apply(state(lab, port))
        await host.network.apply(state(lab, port))
        for through in (host, neighbour):
            assert lab.sockets.ask(lab.client, through.address, 18080) == ("x", "192.168.99.100")
            assert lab.sockets.ask(lab.client, through.address6, 18080) == ("x", f"{UNDERLAY6}64")
    assert lab.sockets.ask(neighbour.netns, "127.0.0.1", 18080) == ("x", "198.18.0.2")
    assert lab.sockets.ask(lab.path("x"), OUTSIDE, 9000)[0] == "outside"
