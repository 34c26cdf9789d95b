"""Is a history of reads and compare-and-swaps one that a single register could have had?

The search of Wing and Gong (1993) with Lowe's memory of configurations that were tried ("Testing for linearizability",
2017): own code, because no kept Python package does it. Registers are independent, so each is searched by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Operation:
    """Times in any unit. `returned` is infinite while nobody knows what became of it; a read nobody was answered is
    no operation."""

    key: str
    called: float
    returned: float
    expected: str | None
    """What a compare-and-swap expected; None: a read."""
    value: str
    """What the swap would write, or what the read saw."""
    succeeded: bool = True

    @property
    def is_open(self) -> bool:
        return math.isinf(self.returned)


def contradiction(history: Sequence[Operation], initial: str = "") -> str:
    """The first register, in words, whose operations fit no order; "" if all do."""
    for key in sorted({operation.key for operation in history}):
        operations = sorted((each for each in history if each.key == key), key=lambda each: each.called)
        if not _fits(operations, initial):
            lines = "\n".join(f"  {operation}" for operation in operations)
            return f"the operations on {key} fit no order:\n{lines}"
    return ""


def _after(state: str, operation: Operation) -> list[str]:
    """The states that the operation may leave, if it can happen in this one."""
    if operation.expected is None:
        return [state] if operation.value == state else []
    if operation.is_open:
        return [operation.value] if operation.expected == state else []
    if operation.succeeded:
        return [operation.value] if operation.expected == state else []
    return [state] if operation.expected != state else []


def _fits(operations: list[Operation], initial: str) -> bool:
    must = sum(1 << number for number, operation in enumerate(operations) if not operation.is_open)
    tried: set[tuple[int, str]] = set()
    stack = [(0, initial)]
    while stack:
        done, state = stack.pop()
        if done & must == must:
            return True
        if (done, state) in tried:
            continue
        tried.add((done, state))
        for number in _next(operations, done):
            stack.extend((done | 1 << number, after) for after in _after(state, operations[number]))
    return False


def _next(operations: list[Operation], done: int) -> list[int]:
    """Those that may come next: called before any other that is left has returned."""
    first_return = math.inf
    candidates: list[int] = []
    for number, operation in enumerate(operations):
        if operation.called > first_return:
            break  # sorted by call
        if not done >> number & 1:
            candidates.append(number)
            first_return = min(first_return, operation.returned)
    return [number for number in candidates if operations[number].called <= first_return]
