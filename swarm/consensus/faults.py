"""Ends that are better than going on: damaged state at the start, and a disk that cannot be trusted while running."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from swarm.errors import SwarmError

EXIT_STATUS = 74
"""EX_IOERR of sysexits.h."""

Fatal = Callable[[str], NoReturn]
"""Ends the process at once, without clean-up: what is in memory may be a lie."""


class Damaged(SwarmError):
    """The files of consensus on this host cannot be trusted; the message says which and how to recover."""

    def __init__(self, where: object, why: str) -> None:
        super().__init__(
            f"{where}: {why}. This manager does not start, because it could break promises that it made to the"
            " others. If other managers hold a quorum, demote this node there, remove this directory here and promote"
            " it again; if it is the only manager, restore the directory from a copy"
        )


def exit_process(reason: str) -> NoReturn:
    """The default `Fatal`."""
    sys.stderr.write(f"consensus stops this process: {reason}\n")
    sys.stderr.flush()
    os._exit(EXIT_STATUS)
