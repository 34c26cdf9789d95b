"""The benchmark of a thousand nodes, small: real manager process, real joins, mTLS sessions, real log."""

from __future__ import annotations

from pathlib import Path

from tests.bench.swarm3k import ENTRIES_MAX, RSS_MIB_MAX, measured

AGENTS, TASKS = 20, 200
STORED_MIN = 4
"""Creation, PENDING, ASSIGNED and RUNNING of each task are written one after the other, whatever is merged between."""


def test_many_tasks_on_many_nodes_cost_few_log_entries(tmp_path: Path) -> None:
    found = measured(tmp_path, AGENTS, TASKS, processes=2)
    assert found["transitions"] >= STORED_MIN * TASKS
    assert 0 < found["entries_per_100_transitions"] <= ENTRIES_MAX
    assert found["leader_rss_mib"] < RSS_MIB_MAX
