"""`network doctor`: have the nodes concerned try what follows from the state, and say what it means."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from proto.control_pb2 import DoctorProgress, DoctorReply
from proto.dispatch_pb2 import HostFacts, ProbeResult
from swarm.api.backend import Backend
from swarm.api.find import find_service
from swarm.doctor.checks import Check, Kind, Plan
from swarm.doctor.evidence import evidence
from swarm.doctor.plan import plan
from swarm.doctor.rules import report
from swarm.errors import NoLeader


async def examine(backend: Backend, ref: str) -> AsyncGenerator[DoctorReply, None]:
    """Progress, then the report. Raises NotFound, Invalid (several match), NoLeader (it was lost meanwhile)."""
    service = find_service(backend.store, ref) if ref else None
    before = plan(backend.store, service)
    results: dict[Check, ProbeResult] = {}
    facts: dict[str, HostFacts] = {}
    silent: dict[str, str] = {}
    lost = False

    def on_lost() -> None:
        nonlocal lost
        lost = True

    unsubscribe = backend.lost_leadership.subscribe(on_lost)
    try:
        async for reply in _ask(backend, before, results, facts, silent):
            yield reply
    finally:
        unsubscribe()
    if lost:
        raise NoLeader("this manager does not lead any more: ask the doctor again")
    service = backend.store.services.get(service.id) if service is not None else None
    after = plan(backend.store, service) if service is not None or not ref else Plan(())
    yield DoctorReply(report=report(evidence(before, after, results, facts, silent)))


async def _ask(
    backend: Backend,
    before: Plan,
    results: dict[Check, ProbeResult],
    facts: dict[str, HostFacts],
    silent: dict[str, str],
) -> AsyncGenerator[DoctorReply, None]:
    """Ask every node at once; fill in what they answer, and tell how far they are."""
    asked = before.by_node()
    probes = {
        node_id: {number: check for number, check in enumerate(checks) if check.kind is not Kind.HOST}
        for node_id, checks in asked.items()
    }
    total = sum(len(each) for each in probes.values())
    async with backend.exams.open() as exam:
        for node_id, checks in probes.items():
            exam.ask(node_id, [check.probe(number) for number, check in checks.items()])
        async for node_id, said in exam:
            for result in said.results:
                check = probes[node_id].get(result.number)
                if check is not None:
                    results[check] = result
            if said.error:
                silent[node_id] = said.error
            elif said.done:
                facts[node_id] = said.facts
            progress = DoctorProgress(
                nodes=len(asked), answered=len(facts) + len(silent), probes=total, tried=len(results)
            )
            yield DoctorReply(progress=progress)
