"""Durations, sizes and CPU shares as Docker's command line reads and writes them. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation

from swarm.errors import Invalid

NANO = 1_000_000_000
KIB = 1024
HOUR_S = 3600

_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgtp]?)i?b?", re.IGNORECASE)
_SIZE_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_TRUE = frozenset({"1", "t", "true"})
_FALSE = frozenset({"0", "f", "false"})


def parse_duration_s(text: str) -> float:
    """ "1m30s" -> 90.0. Units ns, us, ms, s, m, h; "0" needs none. Raises Invalid."""
    if text == "0":
        return 0.0
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise Invalid(f'"{text}" is not a duration: write a number with a unit, such as 500ms, 10s or 1m30s')
    return float(sum(float(number) * _UNIT_S[unit] for number, unit in parts))


def parse_bytes(text: str) -> int:
    """ "64m" -> 67108864: multiples of 1024, as Docker. Raises Invalid."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise Invalid(f'"{text}" is not a size: write a number with an optional unit b, k, m or g, such as 64m')
    return int(Decimal(match[1]) * KIB ** _SIZE_POWER[match[2].lower()])


def parse_nano_cpus(text: str) -> int:
    """ "0.5" -> 500000000 (nano-CPUs). Raises Invalid."""
    try:
        nano = Decimal(text) * NANO
    except InvalidOperation:
        raise Invalid(f'"{text}" is not a number of CPUs: write a decimal such as 0.5 or 2') from None
    if not nano.is_finite() or nano < 0:
        raise Invalid(f'"{text}" is not a number of CPUs: it must not be negative')
    if nano != int(nano):
        raise Invalid(f'"{text}" is too precise: CPUs have at most nine decimals')
    return int(nano)


def parse_bool(text: str) -> bool:
    """Go's spellings of true and false. Raises Invalid."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise Invalid(f'"{text}" is not true or false')


def parse_uint(text: str, least: int = 0, most: int = 2**63 - 1) -> int:
    """A whole number within limits. Raises Invalid."""
    if not re.fullmatch(r"[+-]?\d+", text) or not least <= int(text) <= most:
        upper = "" if most == 2**63 - 1 else f" and at most {most}"
        raise Invalid(f'"{text}" is not valid: it must be a whole number of at least {least}{upper}')
    return int(text)


def parse_since_s(text: str, now: float) -> float:
    """A point in time (Unix s) from "10m" (ago), Unix seconds, or RFC 3339. Raises Invalid."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    try:
        return now - parse_duration_s(text)
    except Invalid:
        pass
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except ValueError:
        raise Invalid(
            f'"{text}" is not a time: write 10m (ago), Unix seconds, or a date such as 2026-11-23T21:00:00Z'
        ) from None


def format_duration(seconds: float) -> str:
    """90.0 -> "1m30s", as Go prints durations."""
    if seconds == 0:
        return "0s"
    if seconds < 1:
        for unit, size in (("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
            if seconds >= size:
                return f"{seconds / size:.6g}{unit}"
    hours, rest = divmod(seconds, HOUR_S)
    minutes, rest = divmod(rest, 60)
    text = f"{rest:.9f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{int(hours)}h{int(minutes)}m{text}"
    return f"{int(minutes)}m{text}" if minutes else text


def human_duration(seconds: float) -> str:
    """ "5 minutes", "About an hour", as docker ps writes an age."""
    if seconds < 1:
        return "Less than a second"
    whole = int(seconds)
    minutes, hours = whole // 60, int(seconds / HOUR_S + 0.5)
    if whole < 60:
        return "1 second" if whole == 1 else f"{whole} seconds"
    if minutes < 60:
        return "About a minute" if minutes == 1 else f"{minutes} minutes"
    if hours < 48:
        return "About an hour" if hours == 1 else f"{hours} hours"
    days = hours // 24
    for limit_days, divisor, unit in ((14, 1, "days"), (60, 7, "weeks"), (730, 30, "months")):
        if days < limit_days:
            return f"{days // divisor} {unit}"
    return f"{days // 365} years"


def human_size(size_bytes: float) -> str:
    """Decimal units as `docker image ls`: 4260000 -> "4.26MB"."""
    return _scaled(size_bytes, 1000, ("B", "kB", "MB", "GB", "TB", "PB"), 3)


def human_memory(size_bytes: float) -> str:
    """Binary units as `docker service inspect --pretty`: 67108864 -> "64MiB"."""
    return _scaled(size_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), 4)


def _scaled(value: float, base: int, units: tuple[str, ...], digits: int) -> str:
    step = 0
    while value >= base and step < len(units) - 1:
        value /= base
        step += 1
    return f"{value:.{digits}g}{units[step]}"


def format_time(unix_s: float) -> str:
    """RFC 3339 in UTC with nanosecond digits, as Docker's JSON."""
    if not unix_s:
        return "0001-01-01T00:00:00Z"
    whole, nanos = divmod(round(unix_s * NANO), NANO)
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%dT%H:%M:%S}.{nanos:09d}Z"
