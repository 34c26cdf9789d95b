"""Rules about names, tasks, virtual IPs and published ports; and notes on what is not broken (pure)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from proto.objects_pb2 import SCTP, TCP, UDP, Protocol
from swarm.doctor import causes
from swarm.doctor.checks import Check, Kind
from swarm.doctor.claims import Checks, Claim, broken, by_name, by_node, outcomes, some, warning
from swarm.doctor.evidence import OUTCOMES, Evidence

L4: dict[Protocol.ValueType, str] = {TCP: "tcp", UDP: "udp", SCTP: "sctp"}


def names(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    failed = by_node(check for check in remaining if check.kind is Kind.NAMES)
    for node_id, facts in evidence.facts.items():
        checks = failed.get(node_id, [])
        mute = [check for check in checks if evidence.results[check].outcome != OUTCOMES.OK]
        name, remedy = evidence.name(node_id), f"kill -9 {facts.names_pid}; the daemon starts another within a second"
        if mute or facts.names_error:
            what = f"its name server (process {facts.names_pid}) does not answer"
            why = "; ".join(filter(None, (outcomes(evidence, mute) if mute else "", facts.names_error)))
            explained = frozenset(mute) | frozenset(
                check for check in remaining if check.node_id == node_id and check.kind is Kind.HOST
            )
            yield Claim(broken(name, what, why, f"on {name}: {remedy}"), explained)
        for check in checks:
            if check not in mute:
                what = f"{check.name} has another address there than the managers say"
                answers = evidence.results[check].answers
                why = f"it answers {_addresses(answers)}, right is {_addresses(check.expected)}"
                yield Claim(broken(name, what, why, f"on {name}: {remedy}"), frozenset({check}))


def _addresses(found: Iterable[str]) -> str:
    return some(sorted(found)) or "no address"


def unserved(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    for service_id in sorted(evidence.plan.unserved, key=evidence.name):
        name = evidence.name(service_id)
        explained = frozenset(check for check in remaining if check.service_id == service_id)
        what = "none of its tasks serves, so its addresses and ports refuse"
        yield Claim(broken(name, what, "no task of it is running", f"see why: pyswarm explain {name}"), explained)


def backends(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    by_task: defaultdict[tuple[str, Protocol.ValueType, int], list[Check]] = defaultdict(list)
    for check in remaining:
        if check.kind is Kind.BACKEND:
            by_task[check.backend_id, check.protocol, check.port].append(check)
    by_port: defaultdict[tuple[str, str, int, bool], list[Check]] = defaultdict(list)
    for (_, protocol, port), checks in by_task.items():
        refused = all(evidence.results[check].outcome == OUTCOMES.REFUSED for check in checks)
        by_port[checks[0].service_id, L4[protocol], port, refused] += checks
    for (service_id, protocol_name, port, refused), checks in sorted(by_port.items()):
        name = evidence.name(service_id)
        tasks = some(sorted({evidence.name(check.backend_id) for check in checks}))
        seen_from = evidence.called({check.node_id for check in checks})
        what, why = f"{tasks}: no answer at {protocol_name} {port}", "the program hangs, or drops connections"
        if refused:
            what = f"{tasks}: nothing listens at {protocol_name} {port}"
            why = "the program listens on another port, on 127.0.0.1 only, or not at all"
        remedy = (
            f"have the program listen on 0.0.0.0:{port}, or correct the target port (--publish-rm, --publish-add); see"
            f" pyswarm service logs {name}"
        )
        yield Claim(broken(name, what, f"asked from {seen_from}; {why}", remedy), frozenset(checks))


def follows_from_backends(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    """A balanced connection meets any of the backends, a bad one as well."""
    bad = {(check.node_id, check.service_id) for check in evidence.failing if check.kind is Kind.BACKEND}
    cut = {(check.node_id, check.backend_id) for check in evidence.failing if check.kind in (Kind.OVERLAY, Kind.TCP)}
    cut_nodes = {node_id for node_id, _ in cut}
    explained = set()
    for check in remaining:
        balancer = check.peer_id if check.kind is Kind.PUBLISHED else check.node_id
        if check.kind in (Kind.VIP, Kind.PUBLISHED) and ((balancer, check.service_id) in bad or balancer in cut_nodes):
            explained.add(check)
    yield Claim(None, frozenset(explained))


def virtual_ips(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    by_service: defaultdict[tuple[str, str], list[Check]] = defaultdict(list)
    for check in remaining:
        if check.kind is Kind.VIP:
            by_service[check.service_id, check.address].append(check)
    for (service_id, address), checks in sorted(by_service.items()):
        where = evidence.called({check.node_id for check in checks})
        ports = some(sorted({f"{L4[check.protocol]} {check.port}" for check in checks}))
        yield Claim(
            broken(
                evidence.name(service_id),
                f"its virtual IP {address} does not answer at {ports} for tasks on {where}",
                outcomes(evidence, checks) + ", though its tasks accept connections",
                f"restart the daemon of {where}: it lays the balancer anew, containers stay",
            ),
            frozenset(checks),
        )


def published(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    by_host: defaultdict[tuple[str, Protocol.ValueType, int, str], list[Check]] = defaultdict(list)
    for check in remaining:
        if check.kind is Kind.PUBLISHED:
            by_host[check.service_id, check.protocol, check.port, check.peer_id].append(check)
    for (service_id, protocol, port, host_id), checks in sorted(by_host.items()):
        host, traffic = evidence.name(host_id), f"{L4[protocol]} {port}"
        why, remedy = causes.firewall(evidence, {host_id}, traffic, [])
        if not why:
            why, remedy = causes.firewall(evidence, {host_id}, "forward", [])
        asked_from = evidence.called({check.node_id for check in checks})
        yield Claim(
            broken(
                evidence.name(service_id),
                f"its port {traffic} does not answer at {checks[0].address} ({host}), asked from {asked_from}",
                why or outcomes(evidence, checks) + ", though its tasks accept connections",
                remedy or f"look for firewalls between {asked_from} and {host}; else restart the daemon of {host}",
            ),
            frozenset(checks),
        )


# ---- what is not broken, but should be known


def shadowed_programs(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    for node_id, facts in sorted(evidence.facts.items()):
        for each in facts.listeners:
            program = f"{each.command or 'a program'} (process {each.pid})"
            yield Claim(
                warning(
                    evidence.name(node_id),
                    f"{program} listens at {each.address}, {L4[each.protocol]} {each.port}, which a service publishes",
                    "connections from outside go to the service, the program gets none",
                    "have the program listen on another port, or publish the service on another",
                )
            )


def hidden_clients(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    if evidence.plan.masquerading:
        where = evidence.called(evidence.plan.masquerading)
        yield Claim(
            warning(
                where,
                "tasks there do not see the addresses of clients of published ports, but those of the hosts",
                "their kernel cannot answer through the host that a connection came in by (Linux 5.16 can)",
                "upgrade the kernel; or publish with mode=host, which keeps addresses on every kernel",
            )
        )


def partial(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    plan = evidence.plan
    left_out = [f"{plan.nodes_left_out} nodes"] if plan.nodes_left_out else []
    left_out += [f"{plan.services_left_out} services"] if plan.services_left_out else []
    left_out += [f"{plan.left_out} checks"] if plan.left_out else []
    if left_out:
        what = f"{' and '.join(left_out)} were left out"
        why = "a swarm of this size cannot be examined wholly at once"
        yield Claim(warning("swarm", what, why, "name a service to examine it: pyswarm network doctor SERVICE"))


def unreadable(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    for node_id, facts in sorted(evidence.facts.items()):
        if facts.error:
            what = "some facts of the host could not be read"
            yield Claim(warning(evidence.name(node_id), what, facts.error, "mend that, then ask again"))


def unexplained(evidence: Evidence, remaining: Checks) -> Iterator[Claim]:
    """Whatever no rule knows: it must not be lost."""
    for kind in Kind:
        checks = sorted((check for check in remaining if check.kind is kind), key=by_name(evidence))
        if checks:
            where = evidence.called({check.node_id for check in checks})
            targets = some(sorted({check.address or check.name for check in checks} - {""}))
            what = f"{len(checks)} checks failed: {kind.value} {targets}".rstrip()
            yield Claim(broken(where, what, outcomes(evidence, checks), "see the daemon's log"), frozenset(checks))
