"""What a rule of the doctor says, and the words and groups that rules share (pure)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from proto.control_pb2 import Diagnosis
from swarm.doctor.checks import Check
from swarm.doctor.evidence import OUTCOMES, Evidence, pair_of

SHOWN_MAX = 5
"""Of a list within one sentence."""

Checks = frozenset[Check]


@dataclass(frozen=True, slots=True)
class Claim:
    """`diagnosis` None: `explained` follows from what was found already."""

    diagnosis: Diagnosis | None
    explained: Checks = frozenset()


def broken(subject: str, what: str, why: str, remedy: str) -> Diagnosis:
    return Diagnosis(severity=Diagnosis.BROKEN, subject=subject, what=what, why=why, remedy=remedy)


def warning(subject: str, what: str, why: str, remedy: str) -> Diagnosis:
    return Diagnosis(severity=Diagnosis.WARNING, subject=subject, what=what, why=why, remedy=remedy)


def some(words: Iterable[str]) -> str:
    listed = list(words)
    more = f" and {len(listed) - SHOWN_MAX} more" if len(listed) > SHOWN_MAX else ""
    return ", ".join(listed[:SHOWN_MAX]) + more


def outcomes(evidence: Evidence, checks: Iterable[Check]) -> str:
    words = {OUTCOMES.REFUSED: "refused", OUTCOMES.SILENT: "no answer", OUTCOMES.UNREACHABLE: "unreachable"}
    results = [evidence.results[check] for check in checks if check in evidence.results]
    return some(sorted({result.detail or words.get(result.outcome, "failed") for result in results}))


def by_pair(checks: Iterable[Check]) -> dict[frozenset[str], list[Check]]:
    found: defaultdict[frozenset[str], list[Check]] = defaultdict(list)
    for check in sorted(checks, key=lambda each: (each.node_id, each.peer_id, each.network_id)):
        found[pair_of(check)].append(check)
    return dict(found)


def by_node(checks: Iterable[Check]) -> dict[str, list[Check]]:
    found: defaultdict[str, list[Check]] = defaultdict(list)
    for check in sorted(checks, key=lambda each: (each.node_id, each.name, each.network_id)):
        found[check.node_id].append(check)
    return dict(found)


def by_name(evidence: Evidence) -> Callable[[Check], tuple[str, ...]]:
    return lambda check: (evidence.name(check.node_id), evidence.name(check.backend_id), check.network_id, check.name)


def pair_name(evidence: Evidence, pair: frozenset[str]) -> str:
    return " - ".join(sorted(evidence.name(node_id) for node_id in pair))
