"""Rules about hosts, and about what passes between them (pure)."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from swarm.doctor import causes
from swarm.doctor.checks import Kind
from swarm.doctor.claims import Checks, Claim, broken, by_name, by_node, by_pair, pair_name, some, warning
from swarm.doctor.evidence import Evidence, pair_of

_ACROSS = (Kind.OVERLAY, Kind.FULL, Kind.TCP, Kind.EGRESS, Kind.BACKEND, Kind.PUBLISHED, Kind.UNDERLAY, Kind.PATH)
"""Kinds of checks that go from one host to another."""


def silent_nodes(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    for node_id, reason in evidence.silent.items():
        name = evidence.name(node_id)
        pings = [
            check
            for check in evidence.passed | evidence.failing
            if check.peer_id == node_id and check.kind is Kind.UNDERLAY
        ]
        reached = {check.node_id for check in pings if check in evidence.passed}
        unreached = {check.node_id for check in pings} - reached
        remedy = f"start its daemon, or look into its log; if the host is gone for good: pyswarm node rm --force {name}"
        why = reason
        if reached:
            why += f"; its address answers {evidence.called(reached)}, so its daemon is stopped, frozen or cut off"
        elif unreached:
            pairs = [frozenset({node_id, peer_id}) for peer_id in unreached]
            dropped, mended = causes.firewall(evidence, unreached, "icmp", pairs)
            why += f"; its address does not answer {evidence.called(unreached)} either"
            why += f"; {dropped}" if dropped else ""
            remedy = f"{mended or 'see whether the host is up and its network works'}; then {remedy}"
        narrow = [
            result
            for check, result in evidence.results.items()
            if check.kind is Kind.PATH and check.peer_id == node_id and result.sizes and check in evidence.failing
        ]
        if narrow:
            carried = min(max(result.sizes) for result in narrow)
            why += f"; packets of more than {carried} bytes do not reach it: large messages of managers get lost, too"
            remedy = f"raise the MTU of the path to {max(result.full_size for result in narrow)}; then {remedy}"
        explained = frozenset(check for check in remaining if node_id in pair_of(check))
        yield Claim(broken(name, "the node does not answer", why, remedy), explained)


def host_facts(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    for node_id, facts in evidence.facts.items():
        name = evidence.name(node_id)
        for diagnosis, concerns in causes.of_host(node_id, name, facts, evidence.name):
            explained = frozenset(check for check in remaining if check.kind is Kind.HOST and check.node_id == node_id)
            yield Claim(diagnosis, explained | frozenset(check for check in remaining if concerns(check)))


def outdated_mirrors(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    for (node_id, network_id), wanted in evidence.plan.endpoints.items():
        networks = (
            {each.network_id: each for each in evidence.facts[node_id].networks} if (node_id in evidence.facts) else {}
        )
        if network_id not in networks or len(wanted) > len(networks[network_id].endpoints) == causes.ENDPOINTS_TOLD:
            continue
        known = set(networks[network_id].endpoints)
        parts = [(wanted - known, "was not told of"), (known - wanted, "still knows")]
        why = "; ".join(f"it {words} {some(sorted(which))}" for which, words in parts if which)
        if why:
            explained = frozenset(
                check for check in remaining if check.network_id == network_id and node_id in pair_of(check)
            )
            what = f"its picture of network {evidence.name(network_id)} is not what the managers have"
            remedy = "restart its daemon: containers stay, and it is told everything anew"
            yield Claim(broken(evidence.name(node_id), what, why, remedy), explained)


# ---- between hosts


def underlay(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    failed = by_pair(check for check in remaining if check.kind is Kind.UNDERLAY)
    alone = _cut_off(evidence, failed)
    for node_id in sorted(alone, key=evidence.name):
        pairs = [pair for pair in failed if node_id in pair]
        others = evidence.called({peer for pair in pairs for peer in pair - {node_id}})
        what = f"it and {others} do not reach each other"
        yield _underlay_claim(evidence, remaining, evidence.name(node_id), what, pairs)
    for pair in failed:
        if pair & alone:
            continue
        subject = pair_name(evidence, pair)
        if evidence.any_passed(Kind.OVERLAY, pair):
            explained = frozenset(
                check for check in remaining if pair_of(check) == pair and check.kind in (Kind.UNDERLAY, Kind.PATH)
            )
            why = "pings between the hosts are not answered, yet packets of the overlay pass"
            remedy = "let ICMP pass between the hosts: without it nobody notices when large packets get lost"
            yield Claim(warning(subject, "the path between them could not be measured", why, remedy), explained)
        else:
            yield _underlay_claim(evidence, remaining, subject, "they do not reach each other", [pair])


def _cut_off(evidence: Evidence, failed: Collection[frozenset[str]]) -> frozenset[str]:
    """Nodes that reach no other, where some others reach each other."""
    pairs = {pair_of(check) for check in evidence.passed | evidence.failing if check.kind is Kind.UNDERLAY}
    nodes = {node_id for pair in pairs for node_id in pair}
    alone = {
        node_id
        for node_id in nodes
        if len(mine := [pair for pair in pairs if node_id in pair]) > 1 and all(pair in failed for pair in mine)
    }
    return frozenset(alone) if len(alone) < len(nodes) else frozenset()


def _underlay_claim(
    evidence: Evidence, remaining: Checks, subject: str, what: str, pairs: list[frozenset[str]]
) -> Claim:
    explained = frozenset(check for check in remaining if check.kind in _ACROSS and pair_of(check) in pairs)
    why, remedy = causes.firewall(evidence, {node_id for pair in pairs for node_id in pair}, "icmp", pairs)
    words = {evidence.results[check].detail for check in explained if check.kind is Kind.UNDERLAY} - {""}
    why = why or some(sorted(words)) or "pings from host to host stay unanswered, and so does the overlay"
    remedy = remedy or "check cables, addresses, routes and firewalls between the hosts: `ping` from one to the other"
    return Claim(broken(subject, what, why, remedy), explained)


def path_mtu(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    for pair, checks in by_pair(check for check in remaining if check.kind is Kind.PATH).items():
        measured = [evidence.results[check] for check in checks]
        carried = min(max(result.sizes, default=0) for result in measured)
        wanted = max(result.full_size for result in measured)
        lost = evidence.all_failed(Kind.FULL, pair) or any(
            check.kind is Kind.FULL and pair_of(check) == pair for check in remaining
        )
        explained = frozenset(
            check for check in remaining if pair_of(check) == pair and check.kind in (Kind.PATH, Kind.FULL)
        )
        small = [
            f"{facts.underlay_link} of {evidence.name(node_id)} has an MTU of {facts.underlay_mtu_bytes}"
            for node_id in sorted(pair)
            if (facts := evidence.facts.get(node_id)) is not None and facts.underlay_mtu_bytes < wanted
        ]
        what = f"packets of more than {carried} bytes do not pass; a full one of the overlays has {wanted}"
        why = "; ".join(small) or "something between the hosts carries only smaller ones"
        facts_of = [evidence.facts[node_id] for node_id in pair if node_id in evidence.facts]
        widest = max((each.mtu_bytes for facts in facts_of for each in facts.networks), default=0)
        fitting = carried - (wanted - widest if widest else causes.OVERHEAD_BYTES)
        remedy = (
            f"raise the MTU of the path to {wanted} (`ip link set dev ... mtu {wanted}`), or make the networks anew"
            f" with --opt {causes.MTU_OPTION}={fitting}"
        )
        make = broken if lost else warning
        yield Claim(make(pair_name(evidence, pair), what, why, remedy), explained)


def vxlan(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    for pair in by_pair(check for check in remaining if check.kind is Kind.OVERLAY):
        if not evidence.all_failed(Kind.OVERLAY, pair):
            continue
        explained = frozenset(
            check
            for check in remaining
            if pair_of(check) == pair and check.kind in _ACROSS and check.kind not in (Kind.UNDERLAY, Kind.EGRESS)
        )
        why, remedy = causes.firewall(evidence, pair, "vxlan", [pair])
        what = "packets of the overlays (VXLAN, udp 4789 if not chosen otherwise) do not pass between them"
        why = why or "pings from host to host pass, so something drops UDP to the VXLAN port"
        remedy = remedy or "let the VXLAN port pass in both directions on both hosts and on what is between them"
        yield Claim(broken(pair_name(evidence, pair), what, why, remedy), explained)


def single_endpoints(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    """Some of a pair's networks work."""
    for check in sorted((check for check in remaining if check.kind is Kind.OVERLAY), key=by_name(evidence)):
        explained = frozenset(
            other for other in remaining if (other.node_id, other.backend_id) == (check.node_id, check.backend_id)
        )
        task, network = evidence.name(check.backend_id), evidence.name(check.network_id)
        yield Claim(
            broken(
                evidence.name(check.node_id),
                f"{task} on {evidence.name(check.peer_id)} does not answer on network {network}",
                "other packets between the two hosts pass",
                f"see whether the task itself drops pings: pyswarm service exec {task} sh; else restart the daemon of"
                f" {evidence.name(check.node_id)}",
            ),
            explained,
        )


def offload(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    """Small pings pass, yet TCP or full-size packets do not: checksums or segments are left to a card that fails. Which
    of them fail depends on who computed the checksum, so some may pass."""
    wanted = (Kind.TCP, Kind.FULL)
    for pair, checks in by_pair(check for check in remaining if check.kind in wanted).items():
        lost = "TCP" if any(check.kind is Kind.TCP for check in checks) else "full-size packets"
        explained = frozenset(
            check for check in remaining if pair_of(check) == pair and check.kind in (*wanted, Kind.BACKEND)
        )
        links = {facts.underlay_link for node_id in pair if (facts := evidence.facts.get(node_id)) is not None}
        tasks = some(sorted({evidence.name(check.backend_id) for check in checks}))
        what = f"{lost} on the overlays: lost or damaged between them (to {tasks}), while small pings pass"
        why = (
            "a network card, its driver or a virtual switch miscomputes checksums or segments of encapsulated packets;"
            " or, if it is but one task, a firewall inside it"
        )
        remedy = (
            f"on both hosts: ethtool -K {min(links, default='eth0')} tx-checksum-ip-generic off tx-udp_tnl-segmentation"
            " off; and ask for a newer driver"
        )
        yield Claim(broken(pair_name(evidence, pair), what, why, remedy), explained)


def way_out(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    for node_id, checks in by_node(check for check in remaining if check.kind is Kind.EGRESS).items():
        if any(check.kind is Kind.EGRESS and check.node_id == node_id for check in evidence.passed):
            continue
        why, remedy = causes.firewall(evidence, {node_id}, "forward", [])
        yield Claim(
            broken(
                evidence.name(node_id),
                "its tasks do not get out of the host",
                why or "the host does not forward their packets, or does not hide their addresses",
                remedy or "look for firewall rules on the forward and postrouting hooks: nft list ruleset",
            ),
            frozenset(checks),
        )
