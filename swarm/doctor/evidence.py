"""What the nodes' answers show, before anybody asks why (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from proto.control_pb2 import CheckCount
from proto.dispatch_pb2 import FirewallDrop, HostFacts, ProbeResult
from swarm.doctor.checks import Check, Kind, Plan

OUTCOMES = ProbeResult.Outcome


@dataclass(frozen=True, slots=True)
class Evidence:
    plan: Plan
    results: Mapping[Check, ProbeResult]
    facts: Mapping[str, HostFacts]
    """By node."""
    silent: Mapping[str, str]
    """Node -> why there is nothing of it."""
    failing: frozenset[Check]
    passed: frozenset[Check]

    def name(self, object_id: str) -> str:
        return self.plan.names.get(object_id, object_id)

    def called(self, object_ids: Iterable[str]) -> str:
        """ "w1, w2 and w3" """
        names = sorted(self.name(each) for each in object_ids)
        return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)

    def drops(self, node_id: str, traffic: str, addresses: Iterable[str] = ()) -> list[FirewallDrop]:
        """Foreign rules on the node that drop it: the certain ones, else the possible ones."""
        wanted = {"", *addresses}
        facts = self.facts.get(node_id, HostFacts())
        found = [drop for drop in facts.drops if drop.traffic == traffic and drop.address in wanted]
        return [drop for drop in found if drop.certain] or found

    def all_failed(self, kind: Kind, pair: frozenset[str]) -> bool:
        """Of the pair's checks of this kind, in both directions, none passed and one at least failed."""
        return any(pair_of(check) == pair for check in self.failing if check.kind is kind) and not self.any_passed(
            kind, pair
        )

    def any_passed(self, kind: Kind, pair: frozenset[str]) -> bool:
        return any(check.kind is kind and pair_of(check) == pair for check in self.passed)

    def counts(self) -> list[CheckCount]:
        out = []
        for kind in Kind:
            mine = [check for check in self.plan.checks if check.kind is kind]
            if mine:
                passed = sum(check in self.passed for check in mine)
                failed = sum(check in self.failing for check in mine)
                out.append(
                    CheckCount(name=kind.value, passed=passed, failed=failed, unknown=len(mine) - passed - failed)
                )
        return out


def pair_of(check: Check) -> frozenset[str]:
    return frozenset({check.node_id, check.peer_id})


def evidence(
    before: Plan,
    after: Plan,
    results: Mapping[Check, ProbeResult],
    facts: Mapping[str, HostFacts],
    silent: Mapping[str, str],
) -> Evidence:
    """`before`: what was tried; `after`: what follows from the state now. What is not in both was asked of something
    that changed meanwhile, and says nothing."""
    settled = set(before.checks) & set(after.checks)
    judged = {check: verdict(check, results, facts, silent) for check in settled}
    changed = {key for key, known in before.endpoints.items() if after.endpoints.get(key) != known}
    compared = {key: known for key, known in before.endpoints.items() if key not in changed}
    plan = replace(
        before,
        endpoints=compared,
        unserved=before.unserved & after.unserved,
        masquerading=before.masquerading & after.masquerading,
    )
    return Evidence(
        plan,
        results,
        facts,
        silent,
        failing=frozenset(check for check, passed in judged.items() if passed is False),
        passed=frozenset(check for check, passed in judged.items() if passed),
    )


def verdict(
    check: Check,
    results: Mapping[Check, ProbeResult],
    facts: Mapping[str, HostFacts],
    silent: Mapping[str, str],
) -> bool | None:
    """Whether the check passed; None: not known."""
    if check.kind is Kind.HOST:
        return False if check.node_id in silent else not ails(facts[check.node_id]) if check.node_id in facts else None
    result = results.get(check)
    if result is None or result.outcome == OUTCOMES.FAILED:
        return None
    match check.kind:
        case Kind.PATH | Kind.FULL:
            return result.full_size in result.sizes if result.full_size else result.outcome == OUTCOMES.OK
        case Kind.TCP:
            return result.outcome in (OUTCOMES.OK, OUTCOMES.REFUSED)
        case Kind.NAMES:
            return result.outcome == OUTCOMES.OK and frozenset(result.answers) == check.expected
    return result.outcome == OUTCOMES.OK


def ails(facts: HostFacts) -> bool:
    """Something of the host itself is not as it has to be."""
    return bool(
        not facts.forwards
        or facts.strict_links
        or facts.tables_missing
        or facts.networks_error
        or facts.names_error
        or not facts.underlay_link
        or any(network.missing or network.foreign for network in facts.networks)
    )
