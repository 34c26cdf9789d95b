"""What the agent does about restarts, refusals and its own end, on the real kernel."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from overlay import namespaces, nfnl, nft
from overlay.interface import Attachment, Interface, NetworkError, OverlayNetwork
from overlay.netlink import NETLINK_NETFILTER, Netlink
from overlay.ruleset import TASK_TABLE, task_layouts
from overlay.tables import Tables, delete_tables
from overlay.template import make_template
from tests.overlay_lab import INSIDE, NET, OTHER, OUTSIDE, OverlayLab, interface
from tests.overlay_pair import PORT, VIP, audit, build, sandbox, works
from tests.test_overlay_audit import do_damage

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shared() -> Iterator[OverlayLab]:
    """For tests that leave all working."""
    made = asyncio.run(build())
    yield made
    asyncio.run(made.close())


@pytest_asyncio.fixture
async def lab() -> AsyncIterator[OverlayLab]:
    """For tests that leave it in pieces."""
    made = await build()
    yield made
    await made.close()


async def test_a_restarted_agent_adopts_all_without_disturbing_a_connection(lab: OverlayLab) -> None:
    connection, _ = lab.sockets.connect(lab.path("a1"), "10.77.1.12", 8000)
    outside, _ = lab.sockets.connect(lab.client, "192.168.99.1", 18080)
    ids = lab.sockets.run(lab.path("a1"), "ip", "-o", "link").stdout
    rules = lab.sockets.run(lab.path("a1"), "nft", "-a", "list", "ruleset").stdout
    for host in lab.hosts:
        host.again()
    assert await lab.hosts[0].network.attached() == {"a1"}
    await lab.apply((VIP,), (PORT,))
    for open_connection in (connection, outside):
        open_connection.sendall(b"x")
        assert open_connection.recv(10) == b"x"
    again = Attachment("a1", (interface(NET, "10.77.1.11"),))
    assert await lab.hosts[0].network.attach(again) == lab.path("a1")
    assert lab.sockets.run(lab.path("a1"), "ip", "-o", "link").stdout == ids
    assert lab.sockets.run(lab.path("a1"), "nft", "-a", "list", "ruleset").stdout == rules
    assert works(lab)


async def test_a_restarted_agent_brings_what_changed_meanwhile(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    host.again()
    alone = replace(VIP, backends=("10.77.1.12",))
    await host.network.apply(lab.state(host, networks=(NET,), vips=(alone,), published=()))
    assert {lab.sockets.ask(lab.path("a1"), VIP.address, 8000)[0] for _ in range(4)} == {"a2"}
    with pytest.raises(ConnectionRefusedError):
        lab.sockets.ask(lab.client, "192.168.99.1", 18080)
    assert not sandbox(host, INSIDE).exists()


async def test_a_restarted_agent_detaches_a_task_before_its_first_state(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    network = host.again()
    await network.detach("a1")
    assert await network.attached() == frozenset()
    assert " t" not in lab.sockets.run(sandbox(host), "ip", "-br", "link").stdout


async def test_detaching_frees_the_address_at_once(lab: OverlayLab) -> None:
    """Even while something still holds the old namespace open."""
    host, path = lab.hosts[0], lab.path("a1")
    held = os.open(path, os.O_RDONLY)
    try:
        await host.network.detach("a1")
        await host.network.detach("a1")
        fresh = await lab.task(host, "a1b", (NET, "10.77.1.11"))
        lab.sockets.serve(fresh, "0.0.0.0", 8000, "a1b")
        assert lab.sockets.ask(lab.path("a2"), "10.77.1.11", 8000)[0] == "a1b"
    finally:
        os.close(held)


async def test_a_task_that_moves_is_found_on_its_new_host(lab: OverlayLab) -> None:
    assert lab.sockets.ask(lab.path("a2"), "10.77.1.11", 8000)[0] == "a1"
    await lab.hosts[0].network.detach("a1")
    moved = await lab.task(lab.hosts[2], "a1", (NET, "10.77.1.11"))
    lab.sockets.serve(moved, "0.0.0.0", 8000, "a1-moved")
    await lab.apply((VIP,), (PORT,))
    assert lab.sockets.ask(lab.path("a2"), "10.77.1.11", 8000)[0] == "a1-moved"
    back = await lab.task(lab.hosts[0], "c", (NET, "10.77.1.30"))
    await lab.apply((VIP,), (PORT,))
    assert lab.sockets.ask(back, "10.77.1.11", 8000)[0] == "a1-moved"


async def test_a_network_that_overlaps_the_host_fails_its_own_tasks_only(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    clash = OverlayNetwork("netcccccccccccccccccccccc", 5000, "192.168.99.0/25", "192.168.99.1")
    await host.network.apply(lab.state(host, networks=(clash, NET), vips=(VIP,), published=(PORT,)))
    with pytest.raises(NetworkError, match=r"netccc.*192\.168\.99\.0/25 overlaps .*eth0.*--subnet"):
        await host.network.attach(Attachment("x", (Interface(clash.network_id, "192.168.99.5/25"),)))
    assert await host.network.attached() == {"a1"}
    assert works(lab)


async def test_a_network_works_once_what_it_overlapped_is_gone(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    late = OverlayNetwork("netllllllllllllllllllllll", 5001, "10.99.0.0/24", "10.99.0.1")
    lab.sockets.run(host.netns, "ip", "route", "add", "10.99.0.0/16", "via", OUTSIDE)
    state = lab.state(host, networks=(late, NET), vips=(VIP,), published=(PORT,))
    await host.network.apply(state)
    attachment = Attachment("x", (Interface(late.network_id, "10.99.0.5/24"),))
    with pytest.raises(NetworkError, match=r"10\.99\.0\.0/16"):
        await host.network.attach(attachment)
    lab.sockets.run(host.netns, "ip", "route", "del", "10.99.0.0/16")
    await host.network.apply(state)
    assert namespaces.exists(await host.network.attach(attachment))


async def test_attach_names_what_is_unknown(lab: OverlayLab) -> None:
    network = lab.hosts[0].network
    with pytest.raises(NetworkError, match="task x: network nowhere is not among those"):
        await network.attach(Attachment("x", (Interface("nowhere", "10.1.0.2/24"),)))
    with pytest.raises(NetworkError, match=r"'10\.1\.0\.300/24' is not an address"):
        await network.attach(Attachment("x", (Interface(NET.network_id, "10.1.0.300/24"),)))
    with pytest.raises(NetworkError, match=r"kernel\.msgmax does not belong"):
        await network.attach(Attachment("x", (Interface(NET.network_id, "10.77.1.9/24"),), {"kernel.msgmax": "1"}))
    assert await network.attached() == {"a1"}


async def test_a_refused_attach_leaves_nothing(lab: OverlayLab) -> None:
    network = lab.hosts[0].network
    wrong = Attachment("x", (Interface(NET.network_id, "10.77.1.9/24"),), {"net.ipv4.no_such_thing": "1"})
    with pytest.raises(NetworkError, match="no_such_thing"):
        await network.attach(wrong)
    assert await network.attached() == {"a1"}
    right = replace(wrong, sysctls={"net.ipv4.ip_local_port_range": "2000 3000"})
    path = await network.attach(right)
    found = lab.sockets.run(path, "sysctl", "-n", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start")
    assert found.stdout.split() == ["2000", "3000", "0"]


async def test_a_vtep_that_is_gone_is_named(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    with pytest.raises(NetworkError, match=r"192\.168\.99\.77.*--data-path-addr"):
        await host.network.apply(replace(lab.state(host), vtep="192.168.99.77"))


async def test_a_new_vtep_and_mtu_reach_every_link(lab: OverlayLab) -> None:
    """The host gets another address; h2 hears of it as a changed peer."""
    host = lab.hosts[0]
    lab.sockets.run(host.netns, "ip", "addr", "add", "192.168.99.55/24", "dev", "eth0")
    small = replace(NET, mtu_bytes=1300)
    for item in lab.hosts:
        state = lab.state(item, networks=(small, OTHER), vips=(VIP,), published=(PORT,))
        if item is host:
            state = replace(state, vtep="192.168.99.55")
        peers = tuple(replace(peer, vtep="192.168.99.55") if peer.node_id == "node1" else peer for peer in state.peers)
        await item.network.apply(replace(state, peers=peers))
    assert works(lab)
    assert "mtu 1300" in lab.sockets.run(lab.path("a1"), "ip", "link", "show", "eth0").stdout
    assert "mtu 1300" in lab.sockets.run(host.netns, "ip", "link", "show", "pyst1-35t").stdout
    assert "local 192.168.99.55" in lab.sockets.run(sandbox(host), "ip", "-d", "link", "show", "vx0").stdout


async def test_a_network_that_left_the_state_goes_with_its_last_task(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    await host.network.apply(lab.state(host, networks=(OTHER,)))
    assert lab.sockets.ask(lab.path("a1"), "10.77.1.12", 8000)[0] == "a2"
    await host.network.detach("a1")
    assert not sandbox(host).exists()
    assert "pyst1-35t" not in lab.sockets.run(host.netns, "ip", "link").stdout


async def test_its_vni_can_be_used_again_at_once(lab: OverlayLab) -> None:
    host = lab.hosts[2]
    held = os.open(sandbox(host), os.O_RDONLY)
    try:
        heir = replace(NET, network_id="nethhhhhhhhhhhhhhhhhhhhhh")
        await host.network.apply(lab.state(host, networks=(heir,)))
        path = await host.network.attach(Attachment("x", (Interface(heir.network_id, "10.77.1.9/24"),)))
        assert namespaces.exists(path)
    finally:
        os.close(held)


FOREIGN = (
    "ip link add foreign0 type veth peer name foreign1",
    "ip link set foreign0 up",
    "ip addr add 10.66.0.1/24 dev foreign0",
    "ip addr add fd66::1/64 dev foreign0",
    "ip route add 10.67.0.0/16 dev foreign0",
    "ip neigh add 10.66.0.9 lladdr 02:00:00:00:00:09 dev foreign0 nud permanent",
    "ip rule add fwmark 7 lookup 77",
    "nft table ip mine { chain c { type filter hook forward priority 5; counter; }; }",
)


async def test_what_others_made_is_left_alone(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    for command in FOREIGN:
        done = lab.sockets.run(host.netns, *command.split())
        assert done.returncode == 0, done.stderr

    def foreign() -> list[str]:
        asked = ("ip -d addr show dev foreign0", "ip route show dev foreign0", "ip neigh show dev foreign0", "ip rule")
        rules = lab.sockets.run(host.netns, "nft", "-a", "list", "table", "ip", "mine").stdout
        return [lab.sockets.run(host.netns, *command.split()).stdout for command in asked] + [
            re.sub(r"packets \d+ bytes \d+", "", rules)
        ]

    before = foreign()
    for damage in ("leg", "bridge", "host's elements"):
        assert do_damage(lab, damage).returncode == 0
    await audit(lab)
    assert works(lab)
    assert foreign() == before
    await host.network.teardown()
    assert foreign() == before


@pytest.mark.parametrize("restarted", [False, True])
async def test_teardown_leaves_nothing(lab: OverlayLab, restarted: bool) -> None:
    host = lab.hosts[0]
    if restarted:
        host.again()
    await host.network.teardown()
    await host.network.teardown()
    assert not any((host.run_dir / "netns").glob("*"))
    assert not (host.run_dir / "netns").exists()
    assert "pyst1" not in lab.sockets.run(host.netns, "ip", "link").stdout
    assert "pyswarm" not in lab.sockets.run(host.netns, "nft", "list", "tables").stdout
    assert "10.77." not in lab.sockets.run(host.netns, "ip", "route").stdout
    assert str(host.run_dir) not in Path("/proc/self/mountinfo").read_text()
    await host.network.apply(lab.state(host))  # and it can begin again


async def test_a_firewall_that_drops_forwarded_packets_is_kept_open_and_left_as_it_was(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    assert lab.sockets.run(host.netns, "iptables", "-P", "FORWARD", "DROP").returncode == 0
    before = lab.sockets.run(host.netns, "iptables", "-S").stdout
    for doing in ("again", "iptables -F FORWARD", "iptables -A FORWARD -j DROP", "iptables -F FORWARD"):
        if doing == "again":
            host.again()
        else:
            assert lab.sockets.run(host.netns, *doing.split()).returncode == 0
        await audit(lab)
        assert works(lab), doing
    await host.network.teardown()
    assert lab.sockets.run(host.netns, "iptables", "-S").stdout == before


async def test_tasks_come_and_go_at_once_while_services_change(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    tasks = [Attachment(f"x{n}", (Interface(NET.network_id, f"10.77.1.{50 + n}/24"),)) for n in range(20)]
    states = [
        lab.state(host, vips=(replace(VIP, backends=tuple(f"10.77.1.{50 + n}" for n in range(count))),))
        for count in range(20)
    ]
    await asyncio.gather(*(host.network.attach(task) for task in tasks), *(host.network.apply(item) for item in states))
    assert await host.network.attached() == {"a1", *(task.task_id for task in tasks)}
    await asyncio.gather(
        *(host.network.detach(task.task_id) for task in tasks), *(host.network.apply(item) for item in states)
    )
    assert await host.network.attached() == {"a1"}
    ports = lab.sockets.run(sandbox(host), "ip", "-o", "link", "show", "type", "veth").stdout.splitlines()
    assert len(ports) == 2  # the leg's and a1's
    await lab.apply((VIP,), (PORT,))
    assert works(lab)


@pytest.mark.parametrize("families", [(socket.AF_INET,), (socket.AF_INET, socket.AF_INET6)])
def test_the_messages_of_a_template_make_the_tables_that_the_text_makes(
    shared: OverlayLab, families: tuple[int, ...]
) -> None:
    layouts = task_layouts("nftables", ("127.0.0.11", 42999), families, ("eth0",))  # a port of no other test

    def listed() -> str:
        listing = subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=True, text=True).stdout
        with Netlink(NETLINK_NETFILTER) as netlink:
            delete_tables(netlink, TASK_TABLE)
        return listing

    def by_text() -> str:
        make_template(layouts)
        return listed()

    def by_messages() -> str:
        with Netlink(NETLINK_NETFILTER) as netlink:
            tables = Tables(TASK_TABLE, nfnl.vip_chain, nfnl.VIP_CHAIN_RULES, layouts)
            for fresh in (True, False):  # in place of itself, too
                tables.load(netlink, {}, fresh)
                assert tables.generation == nfnl.generation(netlink)
        return listed()

    made = shared.sockets.inside(shared.client, by_text)
    assert shared.sockets.inside(shared.client, by_messages) == made
    assert "dnat to" in made


def test_without_libnftables_the_command_loads_the_same_table(shared: OverlayLab) -> None:
    (layout,) = task_layouts("nftables", ("127.0.0.11", 42053), (socket.AF_INET,), ())

    def load_and_list(library: bool, again: bool) -> str:
        nft.run(f"delete table ip {layout.table}\n" * again + layout.text(), library=library)
        return subprocess.run(
            ["nft", "list", "table", "ip", layout.table], capture_output=True, check=True, text=True
        ).stdout

    by_library = shared.sockets.inside(shared.client, lambda: load_and_list(True, again=False))
    by_command = shared.sockets.inside(shared.client, lambda: load_and_list(False, again=True))
    assert by_library == by_command
    with pytest.raises(NetworkError, match="nftables refused a ruleset"):
        shared.sockets.inside(shared.client, lambda: nft.run("nonsense", library=False))
