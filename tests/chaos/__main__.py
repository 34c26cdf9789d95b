"""`python -m tests.chaos --managers 3 --seed 7 --seconds 120`: exit status 0 only if nothing was lost or stale."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.run import make_registers, run
from tests.labs import WEB_IMAGE, keep_logs, lab_up, load_web_image


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--managers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.0, help="at least for this long; 0: each fault once")
    parser.add_argument("--only", action="append", default=[], metavar="FAULT")
    arguments = parser.parse_args()
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} {line}", flush=True)

    with tempfile.TemporaryDirectory() as directory:
        load_web_image(Path(directory))
    with lab_up("chaos", arguments.managers, 0) as cluster:
        make_registers(cluster, WEB_IMAGE)
        try:
            verdict = run(cluster, arguments.seed, say, arguments.seconds, arguments.only)
        except Exception:
            print(f"logs: {keep_logs(cluster)}")
            raise
        if verdict.contradiction:
            print(f"logs: {keep_logs(cluster)}")
    print(verdict)
    return 1 if verdict.contradiction else 0


if __name__ == "__main__":
    sys.exit(main())
