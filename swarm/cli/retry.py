"""When a failed call is tried again. Pure: the clock and the randomness are the caller's."""

from __future__ import annotations

TOTAL_S = 15.0
"""An election takes about a second; a rolling restart of managers a few. Beyond this a person should know."""
ATTEMPT_S = 12.0
"""Deadline of one attempt: longer than a manager's own commit timeout of 10 s, so that its words reach us."""
FIRST_DELAY_S = 0.1
DELAY_MAX_S = 1.0

RETRYABLE = frozenset({"UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED"})


def delay_s(code: str, attempt: int, elapsed_s: float, total_s: float = TOTAL_S) -> float | None:
    """Pause before the next attempt, or None to give up. `attempt` counts from 1."""
    if code not in RETRYABLE:
        return None
    pause_s = float(min(DELAY_MAX_S, FIRST_DELAY_S * 2 ** min(attempt - 1, 10)))
    return pause_s if elapsed_s + pause_s < total_s else None


def keeps_request_id(code: str) -> bool:
    """ABORTED says that nothing was written, and managers remember that verdict under the request's ID:
    trying again needs a new one. After the others the same ID makes sure that it is applied once."""
    return code != "ABORTED"
