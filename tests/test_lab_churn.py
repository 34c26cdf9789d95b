"""A short walk of the churn: after each pause every host serves what the store says, asked from inside its tasks."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.churn.model import start
from tests.churn.run import begin, run
from tests.labs import keep_logs, lab_up

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


def test_whatever_comes_and_goes_every_host_serves_what_the_store_says(web_image: str) -> None:
    with lab_up("churn", 3, 2) as cluster, ExitStack() as stack:
        try:
            churn = begin(cluster, 4, start(services=4, tasks=3), print, stack)
            verdict = run(churn, tasks=3, steps=40)
        except Exception:
            print(f"logs: {keep_logs(cluster)}")
            raise
    assert verdict.changes > 30, verdict
