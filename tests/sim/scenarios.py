"""What goes wrong in which scenario, and one run of it."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from tests.sim.world import Faults, World

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


@dataclass
class Result:
    seed: int
    scenario: str
    lines: list[str] = field(default_factory=list)
    """What happened, in order."""
    violation: str = ""
    summary: str = ""


def _drawn(seed: int) -> tuple[int, Faults]:
    """Of each fault none, little or much: if all were always there, some would hide what others bring about
    (Groce et al., "Swarm testing", 2012)."""
    chance = random.Random(f"mixture {seed}")
    size, faults = SCENARIOS["mixed"]
    drawn = {each.name: getattr(faults, each.name) * chance.choice((0, 0, 1, 1, 3)) for each in fields(faults)}
    return chance.choice((3, size)), Faults(**drawn)


def run(seed: int, scenario: str, say: Callable[[str], None] | None = None) -> Result:
    """One run; never raises."""
    size, faults = _drawn(seed) if scenario == "mixed" else SCENARIOS[scenario]
    result = Result(seed, scenario)

    def note(line: str) -> None:
        result.lines.append(line)
        if say is not None:
            say(line)

    world = World(seed, size, faults, note)
    try:
        world.run()
    except AssertionError as error:
        result.violation = str(error) or traceback.format_exc()
    except Exception:
        result.violation = traceback.format_exc()
    swaps = sum(client.acknowledged for client in world.clients)
    reads = sum(client.reads for client in world.clients)
    counts = "".join(f", {count} {what}" for what, count in sorted(world.counts.items()))
    is_open = sum(operation.is_open for operation in world.history)
    verdict = "VIOLATION" if result.violation else "ok"
    result.summary = (
        f"seed {seed} {scenario}: {verdict}; {world.checks.highest} entries committed, {swaps} swaps, {reads} reads,"
        f" {is_open} open{counts}; {world.net.now_s - 1000:.2f} simulated s"
    )
    return result
