"""What the agent does about drift, restarts, refusals and its own end, on the real kernel."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from overlay import namespaces, nfnl, nft
from overlay.interface import Attachment, Interface, NetworkError, OverlayNetwork, PublishedPort, Vip
from overlay.netlink import NETLINK_NETFILTER, Netlink
from overlay.reconcile import AUDIT_PERIOD_S
from overlay.ruleset import TASK_TABLE, task_layouts
from overlay.tables import TEMPLATES, Tables, delete_tables
from tests.overlay_lab import INSIDE, NET, OTHER, OUTSIDE, OverlayLab, SimulatedHost, address6, interface

pytestmark = pytest.mark.root

VIP = Vip(NET.network_id, "10.77.1.200", ("10.77.1.11", "10.77.1.12"))
A2_IPV6 = address6(NET, "10.77.1.12")
PORT = PublishedPort("tcp", 18080, (("10.77.1.12", 8000),))


async def build() -> OverlayLab:
    """a1 on h1 and a2 on h2, both serving at 8000 behind VIP; a2 alone behind PORT."""
    made = OverlayLab()
    await made.apply()
    for host, name, address in zip(made.hosts, ("a1", "a2"), VIP.backends, strict=False):
        made.sockets.serve(await made.task(host, name, (NET, address)), "0.0.0.0", 8000, name)
    await made.apply((VIP,), (PORT,))
    return made


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


async def audit(lab: OverlayLab) -> None:
    """The agents' next ordinary call after the audit period."""
    for host in lab.hosts:
        host.now_s[0] += AUDIT_PERIOD_S
    await lab.apply((VIP,), (PORT,))


def sandbox(host: SimulatedHost, network: OverlayNetwork = NET) -> Path:
    return host.run_dir / "netns" / f"net-{network.network_id[:12]}"


def works(lab: OverlayLab) -> bool:
    """VIP, remote task, published port from outside, egress."""
    ask = lab.sockets.ask
    try:
        return (
            {ask(lab.path("a1"), VIP.address, 8000)[0] for _ in range(2)} == {"a1", "a2"}
            and ask(lab.path("a1"), "10.77.1.12", 8000)[0] == "a2"
            and ask(lab.client, "192.168.99.1", 18080)[0] == "a2"
            and lab.sockets.run(lab.path("a1"), "ping", "-c", "1", "-W", "1", OUTSIDE).returncode == 0
            and lab.sockets.run(lab.path("a1"), "ping", "-c", "1", "-W", "1", A2_IPV6).returncode == 0
        )
    except OSError:
        return False


DAMAGE = {
    "forwarding entry": ("sandbox", "bridge fdb del 02:42:0a:4d:01:0c dev vx0 self"),
    "bridge's entry": ("sandbox", "bridge fdb del 02:42:0a:4d:01:0c dev vx0 master"),
    "neighbour": ("sandbox", "ip neigh del 10.77.1.12 dev vx0"),
    "vxlan device": ("sandbox", "ip link del vx0"),
    "bridge": ("sandbox", "ip link del br0"),
    "leg": ("host", "ip link del pyst1-35t"),
    "leg's end": ("sandbox", "ip link set leg nomaster"),
    "leg's address": ("host", "ip addr flush dev pyst1-35t"),
    "task's link": ("task", "ip link del eth0"),
    "task's link down": ("task", "ip link set eth0 down"),
    "task's address": ("task", "ip addr flush dev eth0"),
    "task's route": ("task", "ip route del default"),
    "task's rules": ("task", "nft flush ruleset"),
    "task's elements": ("task", "nft flush map ip pyswarm backends"),
    "task's chain": ("task", "nft flush chain ip pyswarm balance"),
    "host's rules": ("host", "nft flush ruleset"),
    "host's elements": ("host", "nft flush map ip pyswarm_t1 published"),
    "forwarding off": ("host", "sysctl -qw net.ipv4.ip_forward=0"),
    "IPv6 neighbour": ("sandbox", f"ip neigh del {A2_IPV6} dev vx0"),
    "IPv6 off on the device": ("sandbox", "sysctl -qw net.ipv6.conf.vx0.disable_ipv6=1"),
    "leg's IPv6 address": ("host", "ip -6 addr flush dev pyst1-35t scope global"),
    "leg's sysctls": ("host", "sysctl -qw net.ipv4.conf.pyst1-35t.forwarding=0 net.ipv4.conf.pyst1-35t.rp_filter=1"),
    "task's IPv6 address": ("task", "ip -6 addr flush dev eth0 scope global"),
    "task's IPv6 off": ("task", "sysctl -qw net.ipv6.conf.eth0.disable_ipv6=1"),
    "task's IPv6 route": ("task", "ip -6 route del default"),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_the_audit_repairs(shared: OverlayLab, damage: str) -> None:
    lab = shared
    where, command = DAMAGE[damage]
    host = lab.hosts[0]
    netns = {"sandbox": sandbox(host), "host": host.netns, "task": lab.path("a1")}[where]
    done = lab.sockets.run(netns, *command.split())
    assert done.returncode == 0, done.stderr
    await lab.apply((VIP,), (PORT,))  # at once: no audit is due, what was applied is trusted
    await audit(lab)
    assert works(lab)
    ruleset = lab.sockets.run(lab.path("a1"), "nft", "list", "ruleset").stdout
    assert ruleset.count("table ip ") == 1
    assert ruleset.count("table netdev ") == 1


async def test_an_audit_of_a_sound_host_changes_nothing(shared: OverlayLab) -> None:
    lab = shared

    def monitored(netns: Path) -> tuple[str, ...]:
        return tuple(
            lab.sockets.run(netns, *command.split()).stdout
            for command in (
                "ip -o addr",
                "bridge fdb",
                "ip neigh show nud permanent",
                "ip route",
                "ip -6 route",
                "nft -a list ruleset",
            )
        )

    namespaces_of_h1 = (sandbox(lab.hosts[0]), lab.hosts[0].netns, lab.path("a1"))
    before = [monitored(netns) for netns in namespaces_of_h1]
    await audit(lab)
    assert [monitored(netns) for netns in namespaces_of_h1] == before


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


async def test_a_firewall_that_drops_forwarded_packets_is_opened_and_left_as_it_was(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    assert lab.sockets.run(host.netns, "iptables", "-P", "FORWARD", "DROP").returncode == 0
    before = lab.sockets.run(host.netns, "iptables", "-S").stdout
    host.again()
    await lab.apply((VIP,), (PORT,))
    assert works(lab)
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

    def load_and_list() -> str:
        with Netlink(NETLINK_NETFILTER) as netlink:
            Tables(TASK_TABLE, nfnl.vip_chain, nfnl.VIP_CHAIN_RULES, layouts).load(netlink, {}, fresh=True)
            listing = subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=True, text=True).stdout
            delete_tables(netlink, TASK_TABLE)
        return listing

    assert TEMPLATES.get(layouts) is None
    by_text = shared.sockets.inside(shared.client, load_and_list)
    assert TEMPLATES.get(layouts) is not None
    assert shared.sockets.inside(shared.client, load_and_list) == by_text
    assert "dnat to" in by_text


def test_without_libnftables_the_command_loads_the_same_table(shared: OverlayLab) -> None:
    (layout,) = task_layouts("nftables", ("127.0.0.11", 42053), (socket.AF_INET,), ())

    def load_and_list(library: bool) -> str:
        nft.run(layout.text(replace=True), library=library)
        return subprocess.run(
            ["nft", "list", "table", "ip", layout.table], capture_output=True, check=True, text=True
        ).stdout

    by_library = shared.sockets.inside(shared.client, lambda: load_and_list(True))
    by_command = shared.sockets.inside(shared.client, lambda: load_and_list(False))
    assert by_library == by_command
    with pytest.raises(NetworkError, match="nftables refused a ruleset"):
        shared.sockets.inside(shared.client, lambda: nft.run("nonsense", library=False))
