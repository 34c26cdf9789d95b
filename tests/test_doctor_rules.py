"""The doctor's findings: one cause is one finding, with its reason and remedy; consequences are not told beside it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.control_pb2 import Diagnosis
from proto.dispatch_pb2 import HostFacts, Listener, ProbeResult
from proto.objects_pb2 import TASK_STARTING, TCP, NodeStatus
from swarm.doctor.checks import Check, Kind
from swarm.doctor.evidence import pair_of
from swarm.doctor.plan import plan
from tests.doctor_swarm import (
    FULL_BYTES,
    Answer,
    a_node,
    a_service,
    a_swarm,
    a_task,
    broken,
    examined,
    good_facts,
    the_one,
    vtep,
)

SILENT = ProbeResult(outcome=ProbeResult.SILENT)
REFUSED = ProbeResult(outcome=ProbeResult.REFUSED, detail="connection refused")
PAIR = frozenset({"n1", "n2"})
OVERLAY = (Kind.OVERLAY, Kind.FULL, Kind.TCP)
ACROSS = (*OVERLAY, Kind.UNDERLAY, Kind.PATH, Kind.EGRESS, Kind.BACKEND, Kind.PUBLISHED)


def between(result: ProbeResult, *kinds: Kind) -> Answer:
    """What goes between n1 and n2 fails."""
    return lambda check: result if check.kind in kinds and pair_of(check) == PAIR else None


def on_n2(result: ProbeResult, *kinds: Kind) -> Answer:
    """What n2 tries fails; of published ports, what others try there."""

    def differs(check: Check) -> ProbeResult | None:
        where = check.peer_id if check.kind is Kind.PUBLISHED else check.node_id
        return result if where == "n2" and check.kind in kinds else None

    return differs


def with_drop(traffic: str, address: str = "", certain: bool = True) -> HostFacts:
    facts = good_facts()
    rule = "udp dport 4789 drop # handle 4"
    facts.drops.add(table="inet guard", chain="input", rule=rule, traffic=traffic, address=address, certain=certain)
    return facts


def known_to_all(address: str) -> dict[str, HostFacts]:
    """The nodes know of a fourth task."""
    told = {node: good_facts() for node in ("n1", "n2", "n3", "n4")}
    for facts in told.values():
        facts.networks[0].endpoints.append(address)
    return told


def test_all_well_is_no_finding() -> None:
    found = examined(a_swarm())
    assert not found.diagnoses
    assert all(each.passed and not each.failed and not each.unknown for each in found.checks)


# ---------------------------------------------------------------- hosts, and between them


def test_a_node_that_is_not_connected_is_one_finding() -> None:
    store, away = a_swarm(state_of_n3=NodeStatus.DOWN), {"n3": "it is not connected"}
    one = the_one(examined(store, lambda check: SILENT if check.peer_id == "n3" else None, silent=away))
    assert (one.subject, one.what) == ("n3", "the node does not answer")
    assert one.why == "it is not connected; its address does not answer n1 and n2 either"
    frozen = the_one(examined(store, silent=away))
    assert "its address answers n1 and n2, so its daemon is stopped, frozen or cut off" in frozen.why
    assert "pyswarm node rm --force n3" in frozen.remedy


def test_a_silent_node_behind_a_narrow_path_says_so() -> None:
    small = ProbeResult(sizes=[84, 1400], full_size=FULL_BYTES)
    store, away = a_swarm(), {"n3": "its connection to the leader was lost meanwhile"}

    def differs(check: Check) -> ProbeResult | None:
        return small if check.peer_id == "n3" and check.kind is Kind.PATH else None

    one = the_one(examined(store, differs, silent=away))
    assert "packets of more than 1400 bytes do not reach it" in one.why
    assert one.remedy.startswith("raise the MTU of the path to 1500")


def test_hosts_that_do_not_reach_each_other_are_one_finding() -> None:
    one = the_one(examined(a_swarm(), between(SILENT, *ACROSS)))
    assert (one.subject, one.what) == ("n1 - n2", "they do not reach each other")


def test_a_host_that_reaches_no_other_is_one_finding() -> None:
    def differs(check: Check) -> ProbeResult | None:
        pair = pair_of(check)
        return SILENT if "n2" in pair and len(pair) == 2 and check.kind in ACROSS else None

    one = the_one(examined(a_swarm(), differs))
    assert (one.subject, one.what) == ("n2", "it and n1 and n3 do not reach each other")


def test_pings_that_only_the_underlay_refuses_are_a_warning() -> None:
    found = examined(a_swarm(), between(SILENT, Kind.UNDERLAY, Kind.PATH))
    assert not broken(found)
    assert "ICMP" in found.diagnoses[0].remedy


@pytest.mark.parametrize("lost", [True, False])
def test_a_path_that_carries_less_is_broken_when_full_packets_get_lost(lost: bool) -> None:
    small = ProbeResult(sizes=[84, 1400], full_size=FULL_BYTES)
    kinds = (Kind.PATH, Kind.FULL) if lost else (Kind.PATH,)
    facts = good_facts()
    facts.underlay_mtu_bytes = 1400
    [one] = examined(a_swarm(), between(small, *kinds), {"n2": facts}).diagnoses
    assert one.severity == (Diagnosis.BROKEN if lost else Diagnosis.WARNING)
    assert one.what == "packets of more than 1400 bytes do not pass; a full one of the overlays has 1500"
    assert one.why == "eth0 of n2 has an MTU of 1400"
    assert "com.docker.network.driver.mtu=1350" in one.remedy


def test_a_path_too_narrow_for_an_encrypted_network_is_told_the_mtu_that_fits() -> None:
    small = ProbeResult(sizes=[84, 1400], full_size=FULL_BYTES)
    facts = good_facts()
    facts.networks[0].mtu_bytes = 1416
    swarm = {"n1": facts, "n2": facts}
    [one] = examined(a_swarm(), between(small, Kind.PATH), swarm).diagnoses
    assert "com.docker.network.driver.mtu=1316" in one.remedy


def test_vxlan_that_does_not_pass_names_the_foreign_rule_for_that_pair_only() -> None:
    guilty = with_drop("vxlan", vtep("n1"))
    guilty.drops.add(table="inet else", chain="input", rule="policy drop", traffic="vxlan", address=vtep("n3"))
    one = the_one(examined(a_swarm(), between(SILENT, *OVERLAY, Kind.BACKEND), {"n2": guilty}))
    assert one.subject == "n1 - n2"
    assert one.why == "on n2, chain input of table inet guard drops them: udp dport 4789 drop # handle 4"
    assert one.remedy == "on n2: nft delete rule inet guard input handle 4, or accept the packets before it"


def test_vxlan_that_does_not_pass_for_no_known_reason_is_told_as_such() -> None:
    lost = between(SILENT, *OVERLAY, Kind.BACKEND)
    assert "something drops UDP to the VXLAN port" in the_one(examined(a_swarm(), lost)).why
    perhaps = with_drop("vxlan", vtep("n1"), certain=False)
    assert "may drop them" in the_one(examined(a_swarm(), lost, {"n2": perhaps})).why


def test_tcp_that_is_lost_where_pings_pass_is_offloading() -> None:
    for lost in (between(SILENT, Kind.TCP, Kind.BACKEND), on_n2(SILENT, Kind.TCP)):
        found = broken(examined(a_swarm(), lost))
        assert all("TCP on the overlays" in each.what for each in found)
    one = the_one(examined(a_swarm(), between(SILENT, Kind.TCP, Kind.BACKEND)))
    assert "ethtool -K eth0 tx-checksum-ip-generic off" in one.remedy


def test_full_packets_that_are_lost_on_a_wide_path_are_offloading() -> None:
    lost = ProbeResult(sizes=[], full_size=FULL_BYTES - 50, outcome=ProbeResult.SILENT)
    one = the_one(examined(a_swarm(), between(lost, Kind.FULL)))
    assert "full-size packets on the overlays" in one.what


def test_one_endpoint_that_does_not_answer_is_not_blamed_on_the_port() -> None:
    def differs(check: Check) -> ProbeResult | None:
        return SILENT if check.node_id == "n1" and check.peer_id == "n2" and check.kind in OVERLAY else None

    one = the_one(examined(a_swarm(), differs))
    assert one.subject == "n1"
    assert "web.2 on n2 does not answer on network net" in one.what


@pytest.mark.parametrize(
    ("field", "value", "kinds", "words"),
    [
        ("forwards", False, (Kind.EGRESS, Kind.PUBLISHED), "net.ipv4.ip_forward=0"),
        ("strict_links", ["pysx-1"], (Kind.EGRESS, Kind.PUBLISHED), "rp_filter is strict on pysx-1"),
        ("tables_missing", ["host"], (Kind.EGRESS, Kind.PUBLISHED), "nftables tables of pyswarm of the host"),
        ("tables_missing", ["web2"], (Kind.NAMES, Kind.VIP), "nftables tables of pyswarm of 1 tasks"),
        ("networks_error", "nftables refused", ACROSS, "could not be brought up to date"),
        ("underlay_link", "", ACROSS, "no link of the host has its data path address"),
    ],
)
def test_what_is_wrong_on_a_host_explains_what_fails_there(
    field: str, value: Any, kinds: tuple[Kind, ...], words: str
) -> None:
    facts = good_facts()
    facts.ClearField(field)  # type: ignore[arg-type]
    facts.MergeFrom(HostFacts(**{field: value}))
    one = the_one(examined(a_swarm(), on_n2(SILENT, *kinds), {"n2": facts}))
    assert one.subject == "n2"
    assert words in one.what
    assert one.why
    assert one.remedy


def test_entries_that_differ_explain_what_fails_on_that_network() -> None:
    facts = good_facts()
    facts.networks[0].missing.append("forwarding entry 02:42:0a:00:01:0b to 192.0.2.1")
    facts.networks[0].foreign.append("neighbour 10.0.1.99 at 02:42:00:00:00:01")
    one = the_one(examined(a_swarm(), between(SILENT, *OVERLAY), {"n2": facts}))
    assert one.what == "the kernel does not have network net as the managers say"
    assert one.why == (
        "missing: forwarding entry 02:42:0a:00:01:0b to 192.0.2.1; not ours: neighbour 10.0.1.99 at 02:42:00:00:00:01"
    )


def test_a_node_that_was_not_told_of_a_task_is_named() -> None:
    facts = good_facts(("10.0.1.11", "10.0.1.12", "10.0.1.77"))
    one = the_one(examined(a_swarm(), facts={"n2": facts}))
    assert one.why == "it was not told of 10.0.1.13; it still knows 10.0.1.77"


def test_what_changed_meanwhile_says_nothing() -> None:
    later = a_swarm(a_task("web", 8, "n1"))
    stale = good_facts(("10.0.1.11",))

    def differs(check: Check) -> ProbeResult | None:
        return ProbeResult(answers=["10.0.1.11"]) if check.name == "tasks.web" else None

    found = examined(a_swarm(), differs, {"n2": stale}, later=later)
    assert not found.diagnoses
    assert {each.name: each.unknown for each in found.checks}["names"] == 3


def test_a_way_out_that_is_closed_names_the_chain() -> None:
    one = the_one(examined(a_swarm(), on_n2(SILENT, Kind.EGRESS), {"n2": with_drop("forward")}))
    assert (one.subject, one.what) == ("n2", "its tasks do not get out of the host")
    assert "chain input of table inet guard drops them" in one.why


# ---------------------------------------------------------------- names and services


def test_a_name_server_that_is_mute_is_one_finding_for_all_names() -> None:
    one = the_one(examined(a_swarm(), on_n2(SILENT, Kind.NAMES)))
    assert (one.subject, one.what) == ("n2", "its name server (process 77) does not answer")
    assert one.remedy.startswith("on n2: kill -9 77;")


def test_a_stale_name_is_told_with_what_is_right() -> None:
    stale = ProbeResult(answers=["10.0.1.99"])
    one = the_one(examined(a_swarm(), lambda check: stale if (check.name, check.node_id) == ("web", "n2") else None))
    assert one.what == "web has another address there than the managers say"
    assert one.why == "it answers 10.0.1.99, right is 10.0.1.2"


def test_tasks_that_do_not_listen_explain_the_service_s_addresses_and_ports() -> None:
    kinds = (Kind.BACKEND, Kind.VIP, Kind.PUBLISHED)
    one = the_one(examined(a_swarm(), lambda check: REFUSED if check.kind in kinds else None))
    assert (one.subject, one.what) == ("web", "web.1, web.2, web.3: nothing listens at tcp 80")
    assert "listen on 0.0.0.0:80" in one.remedy


def test_a_virtual_ip_that_fails_alone_is_told() -> None:
    one = the_one(examined(a_swarm(), on_n2(REFUSED, Kind.VIP)))
    assert one.what == "its virtual IP 10.0.1.2 does not answer at tcp 80 for tasks on n2"
    assert "connection refused" in one.why


def test_a_published_port_that_fails_alone_names_the_chain() -> None:
    def differs(check: Check) -> ProbeResult | None:
        return SILENT if check.kind is Kind.PUBLISHED and check.peer_id == "n2" != check.node_id else None

    one = the_one(examined(a_swarm(), differs, {"n2": with_drop("tcp 8000")}))
    assert one.what == "its port tcp 8000 does not answer at 192.0.2.2 (n2), asked from n1 and n3"
    assert "chain input of table inet guard" in one.why


def test_a_service_without_running_tasks_points_to_explain() -> None:
    late = a_task("late", 9, "n1", state=TASK_STARTING)
    one = the_one(examined(a_swarm(a_service("late", "net", (9000, 80)), late), facts=known_to_all("10.0.1.19")))
    assert (one.subject, one.remedy) == ("late", "see why: pyswarm explain late")


def test_programs_on_published_ports_and_hidden_clients_are_warnings() -> None:
    old = a_node("n4")
    old.description.answers_through_ingress = False
    told = known_to_all("10.0.1.14")
    told["n2"].listeners.append(Listener(protocol=TCP, port=8000, address="0.0.0.0", pid=5, command="nginx"))
    told["n2"].error = "firewall rules: the command nft is not installed"
    found = examined(a_swarm(old, a_task("web", 4, "n4")), facts=told)
    assert not broken(found)
    whats = [each.what for each in found.diagnoses]
    assert "nginx (process 5) listens at 0.0.0.0, tcp 8000, which a service publishes" in whats
    assert any("do not see the addresses of clients" in what for what in whats)
    assert any("could not be read" in what for what in whats)


CHECKS = [check for check in plan(a_swarm()).checks if check.kind is not Kind.HOST]


@given(st.sets(st.sampled_from(CHECKS), min_size=1), st.sampled_from([SILENT, REFUSED]))
def test_whatever_fails_something_is_said_of_it(lost: set[Check], result: ProbeResult) -> None:
    found = examined(a_swarm(), lambda check: result if check in lost else None)
    if any(each.failed for each in found.checks):
        assert found.diagnoses
        assert all(each.subject and each.what and each.remedy for each in found.diagnoses)
