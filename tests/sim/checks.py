"""What must hold at every step, whatever fails."""

from __future__ import annotations

import zlib
from typing import Any

from tests.sim.net import Net


class Checks:
    """Raises AssertionError from `step`."""

    def __init__(self, net: Net) -> None:
        self._net = net
        self._committed: dict[int, tuple[int, int, str]] = {}
        """Index -> term, checksum of the command, and who had it committed first."""
        self._digests: dict[int, tuple[str, str]] = {}
        """Applied index -> digest, and whose it was first."""
        self._seen: dict[str, tuple[Any, int]] = {}
        """How far each running member's log has been compared."""

    @property
    def highest(self) -> int:
        return max(self._committed, default=0)

    def step(self) -> None:
        for term, leaders in self._net.leaders_of_terms.items():
            assert len(leaders) == 1, f"{sorted(leaders)} all led in term {term}"
        for name, engine in self._net.engines.items():
            self._compare_log(name, engine)
            self._compare_state(name, engine)
            assert not engine.digests.difference, engine.digests.difference

    def _compare_log(self, name: str, engine: Any) -> None:
        known, checked = self._seen.get(name, (None, 0))
        if known is not engine:
            checked = 0
        wal, commit = engine.wal, engine.kernel.commit()
        for index in range(max(checked + 1, wal.first_index), min(commit, wal.last_index) + 1):
            command, _, term = wal.entry_at(index)
            mine = (term, zlib.crc32(command))
            first = self._committed.setdefault(index, (*mine, name))
            assert first[:2] == mine, f"entry {index} is committed at {name} and at {first[2]}, but they differ"
        self._seen[name] = (engine, max(checked, commit))

    def _compare_state(self, name: str, engine: Any) -> None:
        applied = engine.kernel.applied()
        digest = self._net.machines[name].digest()
        first = self._digests.setdefault(applied, (digest, name))
        assert first[0] == digest, f"after entry {applied} the states of {name} and {first[1]} differ"
