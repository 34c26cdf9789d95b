"""What goes wrong in which scenario, and one run of it."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

from tests.sim.swarm import Size, Swarm, Trouble
from tests.sim.world import Faults, World

T = TypeVar("T", Faults, Trouble)

SCENARIOS: dict[str, tuple[int, Faults]] = {
    # name: members, faults
    "calm": (3, Faults()),
    "crashes": (3, Faults(crash=0.004, power=0.01, all_off=0.0008)),
    "elections": (5, Faults(crash=0.012, power=0.02, duplication=0.3, unruliness=0.3, latency_s=0.1, transfer=0.01)),
    "partitions": (5, Faults(cut=0.006, mute=0.004, freeze=0.003)),
    "network": (3, Faults(loss=0.05, duplication=0.05, unruliness=0.1, latency_s=0.05, mute=0.002, cut=0.002)),
    "disks": (3, Faults(crash=0.003, power=0.01, full=0.002, rot=0.3)),
    "members": (3, Faults(membership=0.02, crash=0.002, cut=0.002, transfer=0.003)),
}
_MIXED = Faults(
    crash=0.002,
    power=0.005,
    all_off=0.0004,
    cut=0.003,
    mute=0.002,
    freeze=0.002,
    full=0.001,
    rot=0.2,
    transfer=0.002,
    membership=0.01,
    loss=0.02,
    duplication=0.02,
    unruliness=0.05,
    latency_s=0.02,
)
SCENARIOS["mixed"] = (5, _MIXED)

_TROUBLE = Trouble(
    manager_crash=0.05, manager_cut=0.05, host_off=0.1, agent_kill=0.1, host_cut=0.1, container_fault=0.03
)
SWARMS: dict[str, tuple[Size, Trouble]] = {
    # whole clusters: managers, hosts, services
    "swarm-small": (Size(managers=3, hosts=10, services=8, faults_s=15.0, wishes_per_s=2.0), _TROUBLE),
    "swarm": (Size(managers=3, hosts=50, services=25, faults_s=30.0, wishes_per_s=2.0), _TROUBLE),
    "swarm-busy": (Size(managers=3, hosts=50, services=1000, faults_s=60.0, wishes_per_s=30.0), _TROUBLE),
    "swarm-large": (Size(managers=3, hosts=1000, services=100, faults_s=15.0, wishes_per_s=10.0), _TROUBLE),
}


@dataclass
class Result:
    seed: int
    scenario: str
    lines: list[str] = field(default_factory=list)
    """What happened, in order."""
    violation: str = ""
    summary: str = ""


def _drawn(seed: int, chances: T) -> T:
    """Of each fault none, little or much: if all were always there, some would hide what others bring about
    (Groce et al., "Swarm testing", 2012)."""
    chance = random.Random(f"mixture {seed}")
    drawn = {each.name: getattr(chances, each.name) * chance.choice((0, 0, 1, 1, 3)) for each in fields(chances)}
    return replace(chances, **drawn)


def _world(seed: int, scenario: str, say: Callable[[str], None]) -> World | Swarm:
    if scenario in SWARMS:
        size, trouble = SWARMS[scenario]
        return Swarm(seed, size, _drawn(seed, trouble), say)
    managers, faults = SCENARIOS[scenario]
    if scenario == "mixed":
        managers, faults = random.Random(f"size {seed}").choice((3, managers)), _drawn(seed, faults)
    return World(seed, managers, faults, say)


def run(seed: int, scenario: str, say: Callable[[str], None] | None = None) -> Result:
    """One run; never raises."""
    result = Result(seed, scenario)

    def note(line: str) -> None:
        result.lines.append(line)
        if say is not None:
            say(line)

    world = _world(seed, scenario, note)
    try:
        world.run()
    except AssertionError as error:
        result.violation = str(error) or traceback.format_exc()
    except Exception:
        result.violation = traceback.format_exc()
    verdict = "VIOLATION" if result.violation else "ok"
    result.summary = f"seed {seed} {scenario}: {verdict}; {world.summary()}"
    return result
