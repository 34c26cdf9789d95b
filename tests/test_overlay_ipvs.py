"""IPVS as values: what is wanted, and the operations that lead there. The kernel's side: test_vm_balance.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from socket import AF_INET, AF_INET6

from hypothesis import given
from hypothesis import strategies as st

from overlay.elements import packed
from overlay.interface import PublishedPort, Vip
from overlay.ipvs import (
    Destination,
    Key,
    Operation,
    Service,
    Standing,
    applied,
    is_port_mark,
    operations,
    port_mark,
    port_services,
    vip_mark,
    vip_services,
)
from overlay.schemes import SCHEMES

KEYS: list[Key] = [(AF_INET, 1), (AF_INET, 2), (AF_INET6, 1)]
DESTINATIONS: list[Destination] = [(bytes([10, 0, 1, number]), 0) for number in range(2, 6)]
weights = st.dictionaries(st.sampled_from(DESTINATIONS), st.integers(1, 3), min_size=1)
services = st.builds(Service, st.sampled_from(["wrr", "wlc"]), weights)
wanteds = st.dictionaries(st.sampled_from(KEYS), st.none() | services)
standings = st.dictionaries(
    st.sampled_from(KEYS),
    st.builds(
        Standing, st.sampled_from(["wrr", "sh"]), st.dictionaries(st.sampled_from(DESTINATIONS), st.integers(0, 3))
    ),
)
alives = st.frozensets(st.sampled_from([address for address, _ in DESTINATIONS]))


def possible(standing: dict[Key, Standing], todo: list[Operation]) -> None:
    """As the kernel would: nothing twice, nothing that is not there."""
    known = {key: set(service.weights) for key, service in standing.items()}
    for item in todo:
        match item.command:
            case 1:  # new service
                assert item.key not in known
                known[item.key] = set()
            case 3:  # delete service: with its destinations
                del known[item.key]
            case 5:
                assert item.destination not in known[item.key]
                known[item.key].add(item.destination)  # type: ignore[arg-type]
            case 7:
                known[item.key].remove(item.destination)  # type: ignore[arg-type]
            case _:
                assert item.destination is None or item.destination in known[item.key]


@given(wanteds, standings, alives)
def test_operations_lead_to_what_is_wanted_and_let_the_living_drain(
    wanted: dict[Key, Service | None], standing: dict[Key, Standing], alive: frozenset[bytes]
) -> None:
    before = {key: dict(service.weights) for key, service in standing.items()}
    todo = operations(wanted, standing, alive)
    possible(standing, todo)
    applied(standing, todo)
    for key, service in wanted.items():
        new = dict(service.weights) if service else {}
        left = {item for item in before.get(key, {}) if item not in new and item[0] in alive}
        if service is None and not left:
            assert key not in standing
            continue
        if service is not None:
            assert standing[key].scheduler == service.scheduler
        assert standing[key].weights == new | dict.fromkeys(left, 0)
    assert not operations(wanted, standing, alive), "and then there is nothing to do"


def test_what_has_drained_is_deleted_though_its_task_lives() -> None:
    key, item = KEYS[0], DESTINATIONS[0]
    standing = {key: Standing("wrr", {item: 0})}
    assert operations({key: None}, standing, frozenset({item[0]})) == []
    done = operations({key: None}, standing, frozenset({item[0]}), idle=frozenset({(key, item)}))
    assert [operation.command for operation in done] == [7, 3]


def test_a_vip_is_one_service_of_its_own_mark() -> None:
    vip = Vip("n1", "10.0.1.200", ("10.0.1.2", "10.0.1.3"), (2, 1), "lc")
    assert vip_services(vip) == {
        (AF_INET, vip_mark(vip.address)): Service("wlc", {(packed("10.0.1.2"), 0): 2, (packed("10.0.1.3"), 0): 1})
    }
    assert vip_services(replace(vip, backends=(), weights=())) == {}


@given(st.lists(st.integers(0, 2**32 - 1), unique=True, max_size=20), st.integers(0, 2**90))
def test_vips_of_a_network_have_marks_of_their_own_which_name_no_node(hosts: list[int], prefix: int) -> None:
    addresses = [(prefix << 32 | host).to_bytes(16) for host in hosts]
    marks = [vip_mark(":".join(address.hex()[n : n + 4] for n in range(0, 32, 4))) for address in addresses]
    assert not any(mark.to_bytes(4, sys.byteorder).startswith(b"\xc6\x12") for mark in marks)
    assert len(set(marks)) >= len(marks) - 1  # 65,536 of 2**32 are displaced


def test_published_ports_have_marks_that_no_vip_and_nobody_else_uses() -> None:
    port = PublishedPort("tcp", 80, (("10.0.1.2", 8080), ("fd00::2", 8080)), balance="sh")
    others = [port, replace(port, protocol="udp"), replace(port, port=81), replace(port, host_ip="192.0.2.7")]
    marks = [port_mark(item) for item in others]
    assert len(set(marks)) == 4
    assert all(map(is_port_mark, marks))
    found = port_services(port, [AF_INET, AF_INET6])
    assert found[AF_INET6, marks[0]] == Service("sh", {(packed("fd00::2"), 8080): 1})
    assert found.keys() == {(AF_INET, marks[0]), (AF_INET6, marks[0])}


def test_under_ipvs_nftables_gives_marks_and_refuses_where_nobody_serves() -> None:
    scheme = SCHEMES["ipvs"]
    vip = Vip("n1", "10.0.1.200", ("10.0.1.2",))
    names = [name for _, name, _ in scheme.vip_elements(vip)]
    assert names == ["vips"] * 3 + ["pinged"], "tcp, udp, sctp"
    assert {name for _, name, _ in scheme.vip_elements(replace(vip, backends=()))} == {"refused"}
    port = PublishedPort("tcp", 80, (("10.0.1.2", 8080),))
    found = {(family, name) for family, name, _ in scheme.port_elements(port, [AF_INET, AF_INET6])}
    assert found == {(AF_INET, "marks"), (AF_INET, "published"), (AF_INET, "backends"), (AF_INET6, "refused")}
