"""The MTU follows the path: what a hop between two hosts takes, told by it or not."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.interface import HostState
from overlay.pathmtu import ATTEMPTS, FLOOR_BYTES, PROBE_PERIOD_S, STEP_BYTES, PathProbe, checksum, search
from tests.overlay_lab import NET, OverlayLab, ip_batch
from tests.waiting import until

# --- the search ------------------------------------------------------------------------------------------


@given(st.integers(FLOOR_BYTES, 9000), st.integers(0, 9000), st.booleans(), st.data())
def test_the_search_finds_what_passes(link: int, passes: int, told: bool, data: st.DataObject) -> None:
    """Whatever each router does with what it does not take; and some requests get lost."""
    path = search(link)
    lost = 0
    for _ in range(100):
        if not path.trying:
            break
        if path.trying > passes:
            path = path.told(passes) if told and path.told(passes) != path else path.unanswered()
        elif lost < ATTEMPTS - 1 and data.draw(st.booleans()):
            lost += 1  # never all attempts of one size
            path = path.unanswered()
        else:
            lost = 0
            path = path.answered()
    assert path.trying == 0
    expected = min(link, passes)
    if expected < FLOOR_BYTES:
        assert path.passes == 0
    else:
        assert expected - STEP_BYTES < path.passes <= expected


def test_a_path_that_takes_what_the_link_takes_needs_one_request() -> None:
    path = search(1500)
    assert path.trying == 1500
    assert (path.answered().passes, path.answered().trying) == (1500, 0)


@pytest.mark.parametrize("mtu", [0, 68, 1500, 9000])
def test_a_router_that_says_nonsense_is_not_believed(mtu: int) -> None:
    assert search(1500).told(mtu) == search(1500)


def test_the_checksum_is_that_of_rfc_1071() -> None:
    assert checksum(0x0001, 0xF203, 0xF4F5, 0xF6F7) == 0x220D


# --- on the kernel ---------------------------------------------------------------------------------------

HOP_BYTES = 1400
ROUTER = "192.168.99.200"


@pytest.fixture(scope="module")
def lab() -> Iterator[OverlayLab]:
    """h3 stands behind a router whose link to it takes HOP_BYTES. Towards h3 the router says so; what h3 sends is
    dropped in silence; and fragments do not arrive."""
    made = OverlayLab()
    router = f"{made.prefix}-router"
    ip_batch([f"netns add {router}"])
    made._ip("ul", [f"link add u-r type veth peer name eth0 netns {router}", "link set u-r master br0 up"])
    made._ip("h3", ["link del eth0", f"link add eth0 type veth peer name eth1 netns {router}"])
    made._ip(
        "router",
        [
            f"addr add {ROUTER}/24 dev eth0",
            "link set eth0 up",
            f"link set eth1 mtu {HOP_BYTES} up",
            "addr add 169.254.1.1/32 dev eth1",
            "route add 192.168.99.3/32 dev eth1",
        ],
    )
    made._ip("h3", ["link set eth0 up", "addr add 192.168.99.3/32 dev eth0"])
    made._ip("h3", ["route add 169.254.1.1 dev eth0", "route add default via 169.254.1.1"])
    made._ip("h1", [f"route add 192.168.99.3/32 via {ROUTER}"])
    made.sockets.run(made.netns("router"), "sysctl", "-qw", "net.ipv4.ip_forward=1")
    for name in ("h1", "h3"):
        drop = "table ip t { chain c { type filter hook prerouting priority -450; ip frag-off & 0x3fff != 0 drop; }; }"
        assert made.sockets.run(made.netns(name), "nft", drop).returncode == 0
    yield made
    asyncio.run(made.close())
    ip_batch([f"netns del {router}"])


def states(lab: OverlayLab, mtu_bytes: int | None) -> list[HostState]:
    """Of h1 and h3; h2 is not there."""
    networks = (replace(NET, mtu_bytes=mtu_bytes),)
    found = [lab.state(host, networks) for host in (lab.hosts[0], lab.hosts[2])]
    return [replace(state, peers=tuple(peer for peer in state.peers if peer.node_id != "node2")) for state in found]


async def apply(lab: OverlayLab, mtu_bytes: int | None = None) -> None:
    for host, state in zip((lab.hosts[0], lab.hosts[2]), states(lab, mtu_bytes), strict=True):
        await host.network.apply(state)


def mtu(lab: OverlayLab, name: str) -> int:
    words = lab.sockets.run(lab.path(name), "ip", "link", "show", "eth0").stdout.split()
    return int(words[words.index("mtu") + 1])


def echoed(lab: OverlayLab, connection: socket.socket) -> bool:
    """Whether 200 KB come back."""
    connection.settimeout(3)
    rest = 200_000
    try:
        connection.sendall(bytes(rest))
        while rest > 0:
            rest -= len(connection.recv(65536))
    except TimeoutError:
        return False
    return True


@pytest.mark.root
async def test_large_transfers_work_over_a_hop_that_takes_less_than_the_links(lab: OverlayLab) -> None:
    h1, _, h3 = lab.hosts
    await apply(lab)
    for host, name, address in ((h1, "a1", "10.77.1.11"), (h3, "a3", "10.77.1.13")):
        lab.sockets.serve(await lab.task(host, name, (NET, address)), "0.0.0.0", 8000, name)
    await apply(lab)
    await until(lambda: max(mtu(lab, "a1"), mtu(lab, "a3")) <= HOP_BYTES - 50, what="an MTU that the path takes")
    assert mtu(lab, "a1") == HOP_BYTES - 50, "the router told it"
    assert HOP_BYTES - 50 - STEP_BYTES < mtu(lab, "a3") <= HOP_BYTES - 50, "found out"
    connection, _ = lab.sockets.connect(lab.path("a1"), "10.77.1.13", 8000)
    assert echoed(lab, connection)

    # An option overrules what was measured: these packets vanish.
    await apply(lab, mtu_bytes=1450)
    whole = ("ping", "-c", "2", "-i", "0.2", "-W", "1", "-M", "do", "-s", str(1450 - 28), "10.77.1.13")
    assert lab.sockets.run(lab.path("a1"), *whole).returncode == 1

    # The hop takes more now: so do the links, and what was connected stays so.
    lab._ip("router", ["link set eth1 mtu 1500"])
    lab.sockets.run(h1.netns, "ip", "route", "flush", "cache")
    await apply(lab)
    for host in (h1, h3):
        host.now_s[0] += PROBE_PERIOD_S
    await apply(lab)
    await until(lambda: (mtu(lab, "a1"), mtu(lab, "a3")) == (1450, 1450), what="the links' own MTU")
    assert echoed(lab, connection)


@pytest.mark.root
async def test_a_path_that_is_cut_for_a_moment_does_not_look_smaller(lab: OverlayLab) -> None:
    h1, h2, _ = lab.hosts
    whole = "table ip cut { chain c { type filter hook prerouting priority -450; ip protocol icmp counter drop; }; }"
    assert lab.sockets.run(h2.netns, "nft", whole).returncode == 0
    probe = lab.sockets.inside(h1.netns, lambda: PathProbe(7))
    measuring = asyncio.get_running_loop().run_in_executor(None, probe.measure, ["192.168.99.2"], 1500)
    try:
        dropped = f"packets {ATTEMPTS} "  # all those of the link's size
        await until(lambda: dropped in lab.sockets.run(h2.netns, "nft", "list", "table", "ip", "cut").stdout)
    finally:
        lab.sockets.run(h2.netns, "nft", "delete", "table", "ip", "cut")
    assert await measuring == {"192.168.99.2": 1500}
    probe.close()
