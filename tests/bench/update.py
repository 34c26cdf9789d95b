"""Requests lost while a service of 20 tasks is updated again and again, under load.

A lab of one manager and two workers. wrk asks the published port for as long as it takes; meanwhile the service is
updated without a pause, stop-first and start-first by turns, until enough requests were made. A request fails when its
connection is refused, reset or times out, or when it is answered by anything but 2xx.

    python -m tests.bench.update [--requests 50000] [--json]
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench import measure
from tests.labs import WEB_IMAGE, Lab, lab_up, load_web_image, wait_for

TASKS = 20
CONNECTIONS = 16
"""Bounds the load: each asks again once it is answered."""
ORDERS = ("stop-first", "start-first")
LOAD_S = 60
ROUNDS_MAX = 10


@dataclass(frozen=True, slots=True)
class Round:
    requests: int
    failed: int
    updates_s: list[float]
    """How long each update took."""


def failures(report: str) -> int:
    """Of wrk's report: socket errors of every kind, and answers that are not 2xx or 3xx."""
    socket_errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", report)
    others = re.search(r"Non-2xx or 3xx responses: (\d+)", report)
    counted = [*socket_errors.groups()] if socket_errors else []
    return sum(map(int, [*counted, *(others.groups() if others else [])]))


def update(cluster: Lab, order: str) -> float:
    started_at = time.monotonic()
    flags = ["--force", "--quiet", "--update-order", order, "--update-parallelism", "2", "--update-monitor", "1s"]
    cluster.pyswarm("m1", "service", "update", *flags, "web")
    return time.monotonic() - started_at


def one_round(cluster: Lab) -> Round:
    """Load from the machine, and one update after the other for as long as it lasts."""
    url = f"http://{cluster.host('m1').address}:8000/"
    words = ["wrk", "-t", "1", "-c", str(CONNECTIONS), "-d", f"{LOAD_S}s", "--timeout", "5s", url]
    load = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    updates_s: list[float] = []
    try:
        while load.poll() is None:
            updates_s.append(update(cluster, ORDERS[len(updates_s) % 2]))
        report, _ = load.communicate(timeout=30)
    finally:
        load.kill()
        load.wait()
    print(*(line for line in report.splitlines() if "errors" in line or "Non-2xx" in line), sep="\n", file=sys.stderr)
    asked = re.search(r"(\d+) requests in", report)
    return Round(int(asked[1]) if asked else 0, failures(report), updates_s)


def measured(cluster: Lab, wanted: int) -> list[Round]:
    cluster.pyswarm("m1", "service", "create", "--name", "web", "--replicas", str(TASKS), "-p", "8000:80", WEB_IMAGE)
    wait_for(lambda: len(cluster.running("web")) == TASKS, 60, "running")
    rounds: list[Round] = []
    while len(rounds) < ROUNDS_MAX and sum(r.requests for r in rounds) < wanted:
        rounds.append(one_round(cluster))
    return rounds


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--requests", type=int, default=50_000, help="go on until so many were made")
    chosen = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="pyswarm-update-"))
    try:
        load_web_image(scratch)
        with lab_up("update", 1, 2) as cluster:
            rounds = measured(cluster, chosen.requests)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    requests, failed = sum(r.requests for r in rounds), sum(r.failed for r in rounds)
    updates_s = sorted(each for r in rounds for each in r.updates_s)
    measure.table(
        [
            (f"updates of {TASKS} tasks", str(len(updates_s)), ""),
            ("  each, median", f"{statistics.median(updates_s):.1f} s", ""),
            ("requests meanwhile", str(requests), f">= {chosen.requests}"),
            ("failed", str(failed), "0"),
        ]
    )
    figures = {"requests": requests, "failed": failed, "updates": len(updates_s)}
    measure.finish(chosen.json, {**figures, "update_s": statistics.median(updates_s)})


if __name__ == "__main__":
    main()
