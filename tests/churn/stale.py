"""How long hosts went on to serve what was over, or did not serve yet what was new (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.endpoints import Change, delay_s
from tests.serving import Key, Sight, Spans


@dataclass(frozen=True, slots=True)
class Seen:
    """What one host was seen to serve."""

    sights: Mapping[Key, Sequence[Sight]]
    disturbed: Spans
    """It was cut off, or had no agent."""
    blind: Spans
    silent: Spans

    def excuses(self, kind: str) -> list[tuple[float, float]]:
        """When nothing could be expected, or seen, of its answers of this kind."""
        spans = (*self.disturbed.ended, *(self.blind.ended if kind != "published" else ()))
        return [*spans, *(self.silent.ended if kind == "name" else ())]


@dataclass(slots=True)
class Staleness:
    """Longest delays in s, by what was asked ("published", "vip", "name")."""

    changes: int = 0
    longest_s: dict[str, float] = field(default_factory=dict)
    """From the manager's commit, on hosts that nothing was done to meanwhile."""
    mended_s: dict[str, float] = field(default_factory=dict)
    """On hosts that were cut off, or had no agent or name server: from when that was over."""
    late: int = 0
    """Delays of more than LATE_S among the former."""
    worst: str = ""
    """The longest of the former, in words."""
    silent_s: float = 0.0
    """Longest time without an answer of a host's name server, while nothing else was done to the host."""

    def __str__(self) -> str:
        def told(longest: Mapping[str, float]) -> str:
            return ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in sorted(longest.items())) or "none"

        return (
            f"{self.changes} changes; longest delay in s: {told(self.longest_s)} ({self.late} over {LATE_S:g} s);"
            f" on hosts disturbed, from the disturbance's end: {told(self.mended_s)};"
            f" names silent for {self.silent_s:.2f}; worst: {self.worst or 'none'}"
        )


LATE_S = 1.0
"""The aim."""


def staleness(
    changes: Sequence[Change],
    addresses: Mapping[str, str],
    keys: Mapping[str, Sequence[Key]],
    hosts: Mapping[str, Seen],
) -> Staleness:
    """Of every change, on every host. A task whose address nobody knows was gone before anyone could look."""
    found = Staleness(silent_s=max((longest_silence_s(seen) for seen in hosts.values()), default=0.0))
    next_at: dict[str, float] = {}
    for change in reversed(changes):
        until = next_at.get(change.task_id)
        next_at[change.task_id] = change.at
        address = addresses.get(change.task_id)
        if address is None:
            continue
        found.changes += 1
        for host, seen in hosts.items():
            for key in keys[change.service]:
                delay = delay_s(seen.sights.get(key, ()), address, change, until)
                if delay:
                    _count(found, change, delay, f"{host} {key[1]}", key[0], seen.excuses(key[0]))
    return found


def longest_silence_s(seen: Seen) -> float:
    """Of a name server whose agent was there to start it again."""
    disturbed = seen.disturbed.ended
    alone = [
        end - start
        for start, end in seen.silent.ended
        if not any(begun < end and start < over for begun, over in disturbed)
    ]
    return max(alone, default=0.0)


def _count(  # noqa: PLR0917  # one observation
    found: Staleness, change: Change, delay: float, where: str, kind: str, excuses: Sequence[tuple[float, float]]
) -> None:
    at = change.at
    ends = [end for start, end in excuses if start < at + delay and end > at]
    if ends:
        found.mended_s[kind] = max(found.mended_s.get(kind, 0.0), at + delay - max(ends))
        return
    if delay > max(found.longest_s.values(), default=0.0):
        what = "serves" if change.serves else "serves no more"
        found.worst = f"{change.service}'s task {change.task_id} {what} at {at:.3f}, {where} {delay:.2f} s later"
    found.longest_s[kind] = max(found.longest_s.get(kind, 0.0), delay)
    found.late += delay > LATE_S
