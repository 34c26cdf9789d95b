"""Python runs this at its start when the directory is on PYTHONPATH: the time of day is then off by what a file says.

What libfaketime does would reach OpenSSL as well, but it breaks the sleeping of Python 3.11 (clock_nanosleep).
"""

import os
import time

_FILE = os.environ["CHAOS_CLOCK"]
_real = time.time
_EVERY_S = 0.2
_read_at = float("-inf")
_offset = 0.0


def _time() -> float:
    global _read_at, _offset  # noqa: PLW0603  # it stands for the machine's clock
    if time.monotonic() - _read_at > _EVERY_S:
        _read_at = time.monotonic()
        with open(_FILE) as file:
            _offset = float(file.read() or 0)
    return _real() + _offset


time.time = _time
