"""From evidence to findings: a table of rules, from causes to symptoms (pure).

Each rule looks at the failed checks that no rule before it has explained, says what it finds, and which of them that
explains. So one broken cable is one finding, not one for each service behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from proto.control_pb2 import Diagnosis, DoctorReport
from swarm.doctor import hosts, services
from swarm.doctor.claims import Checks, Claim
from swarm.doctor.evidence import Evidence

Rule = Callable[[Evidence, Checks], Iterable[Claim]]

RULES: tuple[Rule, ...] = (
    hosts.silent_nodes,
    hosts.host_facts,
    hosts.outdated_mirrors,
    hosts.underlay,
    hosts.path_mtu,
    hosts.vxlan,
    hosts.single_endpoints,
    hosts.offload,
    hosts.way_out,
    services.names,
    services.unserved,
    services.backends,
    services.follows_from_backends,
    services.virtual_ips,
    services.published,
    services.unexplained,
    services.shadowed_programs,
    services.hidden_clients,
    services.partial,
    services.unreadable,
)


def report(evidence: Evidence) -> DoctorReport:
    remaining = evidence.failing
    found: list[Diagnosis] = []
    for rule in RULES:
        claims = list(rule(evidence, remaining))
        found += [claim.diagnosis for claim in claims if claim.diagnosis is not None]
        remaining = remaining.difference(*(claim.explained for claim in claims))
    found.sort(key=lambda each: -each.severity)
    return DoctorReport(checks=evidence.counts(), diagnoses=found)
