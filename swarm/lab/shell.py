"""The commands of the machine that a lab is built with, run to completion with a deadline."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any

from swarm.errors import SwarmError

COMMAND_TIMEOUT_S = 20.0
"""ip, nft and nsenter answer within milliseconds; this bounds a hung kernel lock."""


class LabError(SwarmError):
    """A lab could not be built, changed or removed; the message says what to do."""


def run(*argv: str, text: str | None = None) -> str:
    """Standard output of a command that must succeed. Raises LabError with its words otherwise."""
    try:
        done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise LabError(f"{argv[0]} is not installed: `apt-get install iproute2 nftables util-linux`") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(argv)} did not finish within {COMMAND_TIMEOUT_S:g} s") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise LabError(f"{' '.join(argv)}: {words[-1] if words else f'exit status {done.returncode}'}")
    return done.stdout


def run_json(*argv: str) -> Any:
    return json.loads(run(*argv) or "[]")


def succeeds(*argv: str) -> bool:
    """Whether a probing command exits with 0."""
    return subprocess.run(argv, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=False).returncode == 0


def ip_batch(commands: Sequence[str], *options: str) -> None:
    """Many `ip` commands in one process."""
    run("ip", *options, "-batch", "-", text="\n".join(commands) + "\n")
