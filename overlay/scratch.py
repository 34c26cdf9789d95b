"""A network namespace that is thrown away, to try or to prepare something in."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def in_scratch(action: Callable[[], T]) -> T:
    """What it returns or raises. It runs in a thread of its own, with which the namespace ends: a few milliseconds.
    Raises OSError without the right to make namespaces."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            if _libc.unshare(_CLONE_NEWNET) < 0:
                raise OSError(ctypes.get_errno(), f"make a network namespace: {os.strerror(ctypes.get_errno())}")
            results.append(action())
        except Exception as error:  # raised again, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="scratch")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
