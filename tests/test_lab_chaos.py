"""Faults on real managers under load: no acknowledged change is lost, none takes place twice, no read is stale."""

from __future__ import annotations

import pytest

from tests.chaos.run import make_registers, run
from tests.labs import keep_logs, lab_up

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]

WITH_FIVE = ("kill_leader", "cut_majority_from_minority", "kill_all", "cut_one_way", "demote_and_promote")
"""What differs with the number; the rest is a matter of one host."""


@pytest.mark.parametrize(("managers", "only"), [(3, ()), (5, WITH_FIVE)])
def test_no_fault_loses_or_repeats_a_change(web_image: str, managers: int, only: tuple[str, ...]) -> None:
    with lab_up("chaos", managers, 0) as cluster:
        make_registers(cluster, web_image)
        try:
            verdict = run(cluster, managers, print, only=only)
        except Exception:
            print(f"logs: {keep_logs(cluster)}")
            raise
    assert not verdict.contradiction, verdict
    assert verdict.faults == (len(only) or 11)
    assert verdict.acknowledged > 100, verdict
