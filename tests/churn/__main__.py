"""`python -m tests.churn --seed 7`: exit status 0 only if after each pause every host served what the store said."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from node.priority import prefer_this
from tests.churn.model import start
from tests.churn.run import begin, run
from tests.labs import keep_logs, lab_up, load_web_image

MANAGERS = 3


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.churn", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--services", type=int, default=50)
    parser.add_argument("--tasks", type=int, default=10, help="of each service at the beginning")
    parser.add_argument("--hosts", type=int, default=5, help=f"{MANAGERS} of them managers")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end at the first pause after so long")
    parser.add_argument("--verbose", action="store_true", help="tell each step")
    chosen = parser.parse_args()
    if chosen.hosts < MANAGERS:
        parser.error(f"--hosts {chosen.hosts}: at least {MANAGERS}, so that one manager can be cut off")
    began = time.monotonic()
    prefer_this()  # what is seen late because the observer had no processor would look like a host that is late

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} {line}", flush=True)

    with tempfile.TemporaryDirectory() as directory:
        load_web_image(Path(directory))
    with lab_up("churn", MANAGERS, chosen.hosts - MANAGERS) as cluster, ExitStack() as stack:
        try:
            churn = begin(cluster, chosen.seed, start(chosen.services, chosen.tasks), say, stack)
            verdict = run(churn, chosen.tasks, chosen.steps, chosen.seconds, chosen.verbose)
        except Exception as error:
            print(f"FAILED {error}\nlogs: {keep_logs(cluster)}")
            raise
    print(f"seed {chosen.seed}, {churn.done} steps, {churn.slow} slow connections: {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
