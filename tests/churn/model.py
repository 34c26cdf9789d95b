"""What happens next, and what should be true then (pure): a walk that one seed determines."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

STEPS_PER_PAUSE = 20
CUT_MAX = 1
"""Hosts that are cut off at a time: with three managers, a second one might leave no majority."""


@dataclass(frozen=True, slots=True)
class Scale:
    service: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Update:
    """Every task of the service is replaced."""

    service: str
    start_first: bool


@dataclass(frozen=True, slots=True)
class KillContainer:
    """kill -9 of a container of this service; `lot` (0 to 1) chooses among those that run."""

    service: str
    lot: float


@dataclass(frozen=True, slots=True)
class KillAgent:
    """kill -9; the host's manager, name server and containers go on."""

    host: str


@dataclass(frozen=True, slots=True)
class StartAgent:
    host: str


@dataclass(frozen=True, slots=True)
class KillNameServer:
    host: str


@dataclass(frozen=True, slots=True)
class Cut:
    """The host and all others do not hear each other any more."""

    host: str


@dataclass(frozen=True, slots=True)
class Heal:
    host: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Everything is in order again: what follows from `replicas` is true soon."""


Step = Scale | Update | KillContainer | KillAgent | StartAgent | KillNameServer | Cut | Heal | Pause
WEIGHTS: Mapping[type[Step], int] = {
    Scale: 34,
    Update: 8,
    KillContainer: 30,
    KillAgent: 6,
    StartAgent: 6,
    KillNameServer: 6,
    Cut: 5,
    Heal: 5,
}
"""How often each is drawn; one that makes no sense at the moment is drawn again."""


@dataclass(frozen=True, slots=True)
class State:
    replicas: Mapping[str, int]
    dead: frozenset[str] = frozenset()
    """Hosts without an agent."""
    cut: frozenset[str] = frozenset()


def start(services: int, tasks: int) -> State:
    return State({f"s{number:02}": tasks for number in range(services)})


def after(state: State, step: Step) -> State:
    match step:
        case Scale(service, replicas):
            return replace(state, replicas={**state.replicas, service: replicas})
        case KillAgent(host):
            return replace(state, dead=state.dead | {host})
        case StartAgent(host):
            return replace(state, dead=state.dead - {host})
        case Cut(host):
            return replace(state, cut=state.cut | {host})
        case Heal(host):
            return replace(state, cut=state.cut - {host})
    return state


def disturbed(state: State) -> frozenset[str]:
    """Hosts that cannot follow the managers now."""
    return state.dead | state.cut


def walk(
    rng: random.Random, state: State, hosts: Sequence[str], tasks: int, steps: int
) -> Iterator[tuple[int, Step, State]]:
    """So many steps, each with its number and the state after it. A pause, and what puts the hosts in order before it,
    bear the number of the step that they follow. `tasks`: around which number services are scaled."""
    for number in range(1, steps + 1):
        step = _drawn(rng, state, hosts, tasks)
        state = after(state, step)
        yield number, step, state
        if number % STEPS_PER_PAUSE == 0 or number == steps:
            mending: list[Step] = [*map(Heal, sorted(state.cut)), *map(StartAgent, sorted(state.dead)), Pause()]
            for mended in mending:
                state = after(state, mended)
                yield number, mended, state


def _drawn(rng: random.Random, state: State, hosts: Sequence[str], tasks: int) -> Step:
    while True:
        kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        step = _make(kind, rng, state, hosts, tasks)
        if step is not None:
            return step


def _make(kind: type[Step], rng: random.Random, state: State, hosts: Sequence[str], tasks: int) -> Step | None:
    """One of that kind; None if there is nothing for it to do."""
    service = rng.choice(sorted(state.replicas))
    well = sorted(set(hosts) - disturbed(state))
    if kind is Scale:
        # None at all now and then: the balancer then refuses, which is an answer too.
        wanted = 0 if rng.random() < 0.05 else rng.randint(max(1, tasks // 2), tasks + tasks // 2)
        return Scale(service, wanted) if wanted != state.replicas[service] else None
    if kind is Update:
        return Update(service, rng.random() < 0.5)
    if kind is KillContainer:
        return KillContainer(service, rng.random()) if state.replicas[service] else None
    if kind is KillAgent and well:
        return KillAgent(rng.choice(well))
    if kind is StartAgent and state.dead - state.cut:
        return StartAgent(rng.choice(sorted(state.dead - state.cut)))
    if kind is KillNameServer and well:
        return KillNameServer(rng.choice(well))
    if kind is Cut and well and len(state.cut) < CUT_MAX:
        return Cut(rng.choice(well))
    if kind is Heal and state.cut:
        return Heal(rng.choice(sorted(state.cut)))
    return None
