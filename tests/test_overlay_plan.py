"""The pure parts: what is wanted, what lies between it and what stands, names and elements."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from socket import AF_INET, AF_INET6

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay import firewall
from overlay.addressing import leg_mac, leg_name, node_address, overlaps, port_name, task_mac
from overlay.balance import host_picture, network_elements, vips_by_network, vips_change, wanted_chains, withdrawn
from overlay.diff import (
    BRIDGE_NAME,
    LEG_PORT_NAME,
    VXLAN_NAME,
    DeleteLeg,
    MakeBridge,
    MakeLeg,
    MakeVxlan,
    SandboxOperation,
    SetEntries,
    SetLeg,
    SetPort,
    SetVxlan,
    TaskKernel,
    empty_sandbox,
    sandbox_operations,
    settled,
    task_operations,
)
from overlay.elements import (
    AT,
    SLOTS_MAX,
    Balancing,
    balancing,
    chain_name,
    chains_of,
    port_elements,
    slot_count,
    slots,
    vip_elements,
)
from overlay.interface import (
    WEIGHT_MAX,
    Balance,
    HostState,
    Interface,
    NetworkError,
    OverlayNetwork,
    Peer,
    PublishedPort,
    RemoteEndpoint,
    Vip,
)
from overlay.namespaces import sysctl_path
from overlay.plan import (
    Leg,
    Sandbox,
    Vxlan,
    check_state,
    plan_sandbox,
    plan_task,
    port_alias,
    read_port_alias,
)
from overlay.ruleset import host_layouts, task_layouts
from overlay.schemes import SCHEMES

NFTABLES = SCHEMES["nftables"]
NET = OverlayNetwork("n1", 4097, "10.0.1.0/24", "10.0.1.1")
STATE = HostState(
    vtep="192.0.2.1",
    index=1,
    networks=(NET,),
    peers=(Peer("b", "192.0.2.2", 2), Peer("c", "192.0.2.3", 300)),
    endpoints=(RemoteEndpoint("n1", "10.0.1.9", "b"), RemoteEndpoint("n1", "10.0.1.8", "unknown")),
)


def test_names_follow_from_numbers_and_fit_the_kernel() -> None:
    assert task_mac("10.0.1.9") == "02:42:0a:00:01:09"
    assert (node_address(300), leg_mac(300)) == ("198.18.1.44", "02:43:c6:12:01:2c")
    assert max(len(leg_name("abcdef", vni)) for vni in (1, (1 << 24) - 1)) <= 15
    assert len(port_name("x" * 25)) <= 15
    assert port_name("x" * 25) != port_name("x" * 24 + "y")


def test_a_network_knows_its_endpoints_and_every_peers_leg() -> None:
    wanted = plan_sandbox(NET, STATE, STATE.endpoints, "t", 1500)
    assert wanted.vxlan == Vxlan(4097, 4789, "192.0.2.1", 1450)
    assert wanted.leg == Leg(leg_name("t", 4097), leg_mac(1), 1450, frozenset({("10.0.1.1", 24), ("198.18.0.1", 32)}))
    assert wanted.forwarding == {
        ("02:42:0a:00:01:09", "192.0.2.2"),
        (leg_mac(2), "192.0.2.2"),
        (leg_mac(300), "192.0.2.3"),
    }
    assert dict(wanted.neighbours).keys() == {"10.0.1.9", "198.18.0.2", "198.18.1.44"}


def test_an_internal_network_has_no_leg_here_or_anywhere() -> None:
    wanted = plan_sandbox(replace(NET, internal=True), STATE, STATE.endpoints, "t", 1500)
    assert wanted.leg is None
    assert dict(wanted.neighbours).keys() == {"10.0.1.9"}


def test_an_mtu_too_small_is_refused() -> None:
    with pytest.raises(NetworkError, match="network n1: an MTU of 500 bytes"):
        plan_sandbox(replace(NET, mtu_bytes=500), STATE, (), "t", 1500)


def test_the_default_route_is_the_first_that_is_not_internal() -> None:
    inside = OverlayNetwork("n0", 1, "10.0.0.0/24", "10.0.0.1", internal=True)
    other = OverlayNetwork("n2", 2, "10.0.2.0/24", "10.0.2.1")
    interfaces = (Interface("n0", "10.0.0.5/24"), Interface("n1", "10.0.1.5/24"), Interface("n2", "10.0.2.5/24"))
    task = plan_task("t1", interfaces, {"n0": inside, "n1": NET, "n2": other}, 1, 1500)
    assert [(link.name, link.gateways, link.routes) for link in task.links] == [
        ("eth0", (), ()),
        ("eth1", ("10.0.1.1",), (("0.0.0.0", 0, "10.0.1.1"), ("198.18.0.0", 16, ""))),
        ("eth2", ("10.0.2.1",), ()),
    ]


DUAL = replace(NET, network_id="n6", vni=6, subnet6="fd00:1::/64", gateway6="fd00:1:0::1")


def test_each_family_leaves_by_the_first_network_that_has_it() -> None:
    interfaces = (Interface("n1", "10.0.1.5/24"), Interface("n6", "10.0.1.5/24", "fd00:1:0::5/64"))
    first, second = plan_task("t1", interfaces, {"n1": NET, "n6": DUAL}, 1, 1500).links
    assert [destination for destination, _, _ in first.routes] == ["0.0.0.0", "198.18.0.0"]
    assert second.routes == (("::", 0, "fd00:1::1"), ("2001:2::", 48, ""))
    assert second.addresses == (("10.0.1.5", 24), ("fd00:1::5", 64))
    assert [read_port_alias(port_alias("t1", link)) for link in (first, second)] == [
        ("t1", "eth0", interfaces[0]),
        ("t1", "eth1", Interface("n6", "10.0.1.5/24", "fd00:1::5/64")),
    ]
    assert read_port_alias("a remark of somebody else") is None


def test_a_network_with_ipv6_has_its_addresses_beside_those_of_ipv4() -> None:
    endpoint = RemoteEndpoint("n6", "10.0.1.9", "b", "fd00:1::0009")
    wanted = plan_sandbox(DUAL, STATE, (endpoint,), "t", 1500)
    assert wanted.vxlan is not None
    assert wanted.vxlan.ipv6
    assert wanted.leg is not None
    assert wanted.leg.addresses == {
        ("10.0.1.1", 24),
        ("198.18.0.1", 32),
        ("fd00:1::1", 64),
        ("2001:2::1", 128),
        ("fe80::43:c6ff:fe12:1", 64),
    }
    assert wanted.neighbours >= {("fd00:1::9", "02:42:0a:00:01:09"), ("2001:2::12c", leg_mac(300))}
    with pytest.raises(NetworkError, match="network n6: an MTU of 1279 bytes"):
        plan_sandbox(replace(DUAL, mtu_bytes=1279), STATE, (), "t", 1500)


@pytest.mark.parametrize(
    ("interfaces", "message"),
    [
        ((Interface("n9", "10.0.1.5/24"),), "network n9 is not among those"),
        ((Interface("n1", "10.0.1.5/24"), Interface("n1", "10.0.1.6/24")), "two interfaces in network n1"),
        ((Interface("n1", "10.0.2.5/24"),), "does not lie in subnet 10.0.1.0/24"),
        ((Interface("n1", "10.0.1.5/24", "fd00::5/64"),), "fd00::5/64 does not lie in subnet .none of that family"),
    ],
)
def test_a_task_that_cannot_be_wired_is_refused(interfaces: tuple[Interface, ...], message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        plan_task("t1", interfaces, {"n1": NET}, 1, 1500)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (replace(STATE, peers=(Peer("b", "192.0.2.1", 2),)), "node b has the same data path address"),
        (replace(STATE, peers=(Peer("b", "192.0.2.2", 1),)), "that of this node"),
        (replace(STATE, peers=(Peer("b", "192.0.2.2", 70000),)), "node b has index 70000"),
        (replace(STATE, networks=(replace(NET, gateway="10.0.2.1"),)), "gateway 10.0.2.1 is not in its subnet"),
    ],
)
def test_a_state_that_would_mangle_the_kernel_is_refused(state: HostState, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        check_state(state)


def test_overlap_names_the_other() -> None:
    others = [("192.168.0.0/16", "the route"), ("10.0.1.7/32", "address")]
    assert overlaps("10.0.1.0/24", others) == ("10.0.1.7/32", "address")
    assert overlaps("10.0.2.0/24", others) is None


# --- the difference, against a model of the kernel ------------------------------------------------------

pairs = st.frozensets(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), max_size=4)


def functional(items: frozenset[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    """One value for each key, as in the kernel's tables."""
    return frozenset(dict(sorted(items)).items())


tables = pairs.map(functional)
vxlans = st.builds(
    Vxlan,
    st.integers(1, 2),
    st.just(4789),
    st.sampled_from(["192.0.2.1", "192.0.2.2"]),
    st.integers(1400, 1401),
    st.booleans(),
)
legs = st.builds(
    Leg,
    st.sampled_from(["leg-a", "leg-b"]),
    st.sampled_from(["m1", "m2"]),
    st.integers(1400, 1401),
    st.frozensets(st.tuples(st.sampled_from(["10.0.1.1", "198.18.0.1"]), st.integers(24, 25)), min_size=1),
)
wanteds = st.builds(Sandbox, st.just("n"), st.just(True), vxlans, st.none() | legs, tables, tables).map(
    lambda box: replace(box, leg=replace(box.leg, mtu_bytes=box.mtu_bytes)) if box.leg else box
)
standings = st.builds(
    Sandbox,
    st.just("n"),
    st.booleans(),
    st.none() | vxlans,
    st.none() | legs,
    tables,
    tables,
    st.dictionaries(st.sampled_from([VXLAN_NAME, LEG_PORT_NAME, "t1"]), st.integers(1400, 1401)).map(
        lambda ports: frozenset(ports.items())
    ),
).map(lambda box: box if box.vxlan else replace(box, forwarding=frozenset(), neighbours=frozenset()))


def bridged(box: Sandbox, name: str, mtu_bytes: int) -> frozenset[tuple[str, int]]:
    return frozenset(port for port in box.ports if port[0] != name) | {(name, mtu_bytes)}


def run(box: Sandbox, operation: SandboxOperation) -> Sandbox:
    """What the kernel does."""
    match operation:
        case MakeBridge():
            return replace(box, bridge=True, ports=frozenset())
        case MakeVxlan(vxlan, replaces):
            assert (box.vxlan is not None) == replaces
            empty = frozenset[tuple[str, str]]()
            ports = bridged(box, VXLAN_NAME, vxlan.mtu_bytes)
            return replace(box, vxlan=vxlan, forwarding=empty, neighbours=empty, ports=ports)
        case SetVxlan(vxlan):
            assert box.bridge
            return replace(box, vxlan=vxlan, ports=bridged(box, VXLAN_NAME, vxlan.mtu_bytes))
        case MakeLeg(leg):
            assert box.leg is None
            return replace(box, leg=leg, ports=bridged(box, LEG_PORT_NAME, leg.mtu_bytes))
        case SetLeg(leg, stale):
            assert box.leg is not None
            return replace(box, leg=replace(leg, addresses=(box.leg.addresses - stale) | leg.addresses))
        case DeleteLeg(name):
            assert box.leg is not None
            assert box.leg.name == name
            return replace(box, leg=None, ports=frozenset(port for port in box.ports if port[0] != LEG_PORT_NAME))
        case SetPort(name, mtu_bytes):
            assert box.bridge
            return replace(box, ports=bridged(box, name, mtu_bytes))
        case SetEntries(forward, unforward, know, forget):
            assert box.vxlan is not None
            forwarding = {key: value for key, value in box.forwarding if key not in unforward} | dict(forward)
            neighbours = {key: value for key, value in box.neighbours if key not in forget} | dict(know)
            return replace(box, forwarding=frozenset(forwarding.items()), neighbours=frozenset(neighbours.items()))
    raise AssertionError(operation)


@given(wanteds, standings)
def test_the_operations_lead_from_whatever_stands_to_what_is_wanted(wanted: Sandbox, standing: Sandbox) -> None:
    box = standing if standing.bridge else replace(standing, ports=frozenset())
    for operation in sandbox_operations(wanted, box, ["t1"]):
        box = run(box, operation)
    assert replace(box, ports=frozenset()) == wanted
    assert box.ports >= settled(wanted).ports | {("t1", wanted.mtu_bytes)}
    assert sandbox_operations(wanted, box, ["t1"]) == ()


def test_nothing_standing_is_made_in_the_order_of_dependence() -> None:
    wanted = plan_sandbox(NET, STATE, STATE.endpoints, "t", 1500)
    made = [type(operation) for operation in sandbox_operations(wanted, empty_sandbox("n1"))]
    assert made == [MakeBridge, MakeVxlan, MakeLeg, SetEntries]
    assert BRIDGE_NAME == "br0"


def test_a_containers_own_default_route_is_left_alone() -> None:
    task = plan_task("t1", (Interface("n1", "10.0.1.5/24"),), {"n1": NET}, 1, 1500)
    (link,) = task.links
    kernel = TaskKernel(
        links=frozenset({("eth0", link.mac, 1450)}),
        addresses=frozenset({("eth0", "10.0.1.5", 24)}),
        routes=frozenset({("tun0", "0.0.0.0", 0, "10.8.0.1"), ("eth0", "198.18.0.0", 16, "")}),
        neighbours=frozenset({("eth0", "10.0.1.1", leg_mac(1))}),
        present=frozenset({("eth0", link.mac)}),
    )
    assert task_operations(task, kernel) == ()
    gone = replace(kernel, routes=frozenset({("eth0", "198.18.0.0", 16, "")}))
    assert [type(operation).__name__ for operation in task_operations(task, gone)] == ["SetLink"]


# --- services -------------------------------------------------------------------------------------------

backends = st.lists(st.integers(2, 9).map(lambda n: f"10.0.1.{n}"), max_size=4, unique=True).map(tuple)
vips = st.builds(
    lambda address, found, weight, balance: Vip(
        "n1", address, found, tuple(range(weight, weight + len(found))) if weight else (), balance
    ),
    st.sampled_from(["10.0.1.200", "10.0.1.201", "fd00::1"]),
    backends,
    st.integers(0, 3),
    st.sampled_from(["rr", "lc", "sh"]),
)
pictures = st.lists(vips, max_size=4).map(lambda found: {vip.address: vip for vip in found})


@given(pictures, pictures)
def test_a_change_of_vips_is_the_change_of_their_elements(old: dict[str, Vip], new: dict[str, Vip]) -> None:
    standing = network_elements(NFTABLES, old)
    change = vips_change(NFTABLES, old, new)
    for key, value in change.remove:
        assert standing.pop(key) == value  # the kernel refuses to remove what is not there...
    for key, value in change.add:
        assert key not in standing  # ... and to add what is
        standing[key] = value
    assert standing == network_elements(NFTABLES, new)
    lost = withdrawn(old, new)
    now = {vip: new[vip].backends if vip in new else () for vip in old}
    assert lost.keys() == {vip for vip in old if set(old[vip].backends) - set(now[vip])}
    assert wanted_chains(NFTABLES, {"n1": new}) == chains_of(network_elements(NFTABLES, new))


def test_a_service_without_backends_is_refused_and_else_counted_by_their_slots() -> None:
    vip = Vip("n1", "10.0.1.200", ())
    assert vip_elements(vip) == {(AF_INET, "refused", b"\x0a\x00\x01\xc8"): None}
    found = vip_elements(replace(vip, backends=("10.0.1.2", "10.0.1.3", "10.0.1.4")))
    assert {balancing(chain) for _, chain in chains_of(found)} == {Balancing(3, False, False)}
    assert sorted(name for _, name, _ in found) == ["backends", "backends", "backends", "vips"]
    port = port_elements(PublishedPort("udp", 53, (("10.0.1.2", 5353),)), [AF_INET])
    assert port[AF_INET, "published", b"\x11\0\0\0\0\x35\0\0"] == "rr1_53"
    assert port[AF_INET, "backends", b"\x11\0\0\0\0\x35\0\0\0\0\0\0"] == b"\x0a\x00\x01\x02\x14\xe9\0\0"


def test_a_port_published_at_one_address_is_known_by_that_address() -> None:
    published = PublishedPort("tcp", 80, (("10.0.1.2", 8080), ("fd00::2", 8080)), host_ip="192.0.2.7")
    found = port_elements(published, [AF_INET, AF_INET6])
    assert {(family, name) for family, name, _ in found} == {(AF_INET, "published_at"), (AF_INET, "backends_at")}
    assert all(key.startswith(b"\xc0\0\x02\x07\x06\0\0\0\0\x50\0\0") for _, _, key in found)


def test_each_family_has_the_backends_of_its_own() -> None:
    published = PublishedPort("tcp", 80, (("10.0.1.2", 8080), ("10.0.1.3", 8080), ("fd00::2", 8080)), (1, 3, 1))
    found = port_elements(published, [AF_INET, AF_INET6])
    assert sorted(chain for _, chain in chains_of(found)) == ["rr1_16", "rr4_16"]
    only = port_elements(replace(published, backends=published.backends[:2], weights=()), [AF_INET, AF_INET6])
    assert only[AF_INET6, "refused", b"\x06\0\0\0\0\x50\0\0"] is None


def test_neighbouring_vips_count_separately() -> None:
    chains = chains_of(vip_elements(Vip("n1", "10.0.1.200", ("10.0.1.2",))))
    assert chains.isdisjoint(chains_of(vip_elements(Vip("n1", "10.0.1.201", ("10.0.1.2",)))))


@given(st.lists(st.integers(1, WEIGHT_MAX), min_size=1, max_size=50).map(tuple))
def test_slots_follow_the_weights(weights: tuple[int, ...]) -> None:
    found = Counter(slots(len(weights), weights))
    assert found.keys() == set(range(len(weights))), "each backend gets something"
    assert found.total() == slot_count(len(weights), weights) <= SLOTS_MAX + len(weights)
    if sum(weights) <= SLOTS_MAX:
        assert len({found[number] / weight for number, weight in enumerate(weights)}) == 1


def test_a_heavy_backend_gets_its_share_in_turns_not_in_a_burst() -> None:
    assert slots(3, (5, 5, 5)) == (0, 1, 2)
    assert slots(2, (6, 2)) == (0, 0, 1, 0)


@pytest.mark.parametrize("name", ["balance", "layout_1", "rr_1", "rr3", "shx", "sh3_at2", "k1_1"])
def test_only_balancing_chains_have_slots(name: str) -> None:
    assert balancing(name) is None


@pytest.mark.parametrize("balance", ["rr", "lc", "sh"])
@pytest.mark.parametrize("at", ["", AT])
def test_a_chains_name_says_how_it_balances(balance: Balance, at: str) -> None:
    assert balancing(chain_name(balance, 7, 200, at)) == Balancing(7, balance == "sh", at == AT)


def test_a_backend_named_twice_counts_once() -> None:
    vip = Vip("n1", "10.0.1.200", ("10.0.1.2", "10.0.1.2", "10.0.1.3"), (4, 1, 2))
    (found,) = vips_by_network(replace(STATE, vips=(vip,)))["n1"].values()
    assert (found.backends, found.weights) == (("10.0.1.2", "10.0.1.3"), (4, 2))


def test_clients_are_hidden_from_tasks_that_cannot_answer_them() -> None:
    peers = (Peer("b", "192.0.2.2", 2, masquerade=True),)
    found = host_picture(NFTABLES, replace(STATE, peers=peers), [AF_INET]).elements
    assert {(name, key) for _, name, key in found} == {
        ("gateways", b"\x0a\0\x01\x01"),
        ("hidden", b"\x0a\0\x01\x09"),
    }


def test_another_layout_has_another_marker() -> None:
    (one,), (two,) = (task_layouts("nftables", ("127.0.0.11", port), (AF_INET,), ()) for port in (42053, 42054))
    assert one.marker != two.marker
    (host,), (other,) = (
        host_layouts("nftables", "t", "x", {AF_INET: own}, 4789) for own in ("198.18.0.1", "198.18.0.2")
    )
    assert host.marker != other.marker


# --- the host -------------------------------------------------------------------------------------------

OPEN = "-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT ACCEPT\n"
DROP = "-P INPUT ACCEPT\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n"
DOCKER = DROP + "-N DOCKER-USER\n-A FORWARD -j DOCKER-USER\n-A DOCKER-USER -j RETURN\n"


@pytest.mark.parametrize(("listing", "chain"), [(DROP, "FORWARD"), (DOCKER, "DOCKER-USER")])
def test_a_firewall_that_drops_is_opened_for_our_legs_once(listing: str, chain: str) -> None:
    wanted = firewall.openings(listing, "t1")
    assert [rule[:5] for rule in wanted] == [["-I", chain, "1", way, "pyst1-+"] for way in ("-i", "-o")]
    listed = listing + "".join(
        f'-A {chain} {way} pyst1-+ -m comment --comment "pyswarm t1" -j ACCEPT\n' for way in ("-i", "-o")
    )
    assert firewall.openings(listed, "t1") == []
    assert [rule[:4] for rule in firewall.closings(listed, "t1")] == [
        ["-D", chain, way, "pyst1-+"] for way in ("-i", "-o")
    ]
    assert firewall.closings(listed, "t") == []


def test_a_firewall_that_accepts_is_left_alone() -> None:
    assert firewall.openings(OPEN, "t1") == []


@pytest.mark.parametrize("name", ["net..ipv4", "", "net.../etc/passwd", "net.ipv4.."])
def test_a_sysctl_name_cannot_leave_its_directory(name: str) -> None:
    with pytest.raises(NetworkError, match="is not a name"):
        sysctl_path(name)
    assert str(sysctl_path("net.ipv4.conf.eth0/100.rp_filter")) == "/proc/sys/net/ipv4/conf/eth0.100/rp_filter"
