"""Health checks: what a container's answers to its probes mean. Pure; `node/prober.py` asks.

Docker's words and defaults (https://docs.docker.com/reference/dockerfile/#healthcheck). A container that is starting
is also asked at once and often, so that it serves as soon as it can, but it is judged no more strictly: a
failure counts only after the start period, and at most once per interval.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto.objects_pb2 import HealthConfig

INTERVAL_S = 30.0
TIMEOUT_S = 30.0
START_INTERVAL_S = 5.0
RETRIES = 3
"""Docker's defaults; its start period is 0 s."""
FIRST_PAUSE_S = 0.1
"""Between the first two probes of a container that is starting; each later pause is twice as long, up to its start
interval. Most servers listen within a second."""
OUTPUT_CHARS_MAX = 200
"""Of a probe's output in an error of `service ps`: its end, where programs say why."""

STARTING, HEALTHY, UNHEALTHY = "starting", "healthy", "unhealthy"


@dataclass(frozen=True, slots=True)
class Check:
    argv: tuple[str, ...]
    interval_s: float = INTERVAL_S
    timeout_s: float = TIMEOUT_S
    start_period_s: float = 0.0
    start_interval_s: float = START_INTERVAL_S
    retries: int = RETRIES


@dataclass(frozen=True, slots=True)
class Probe:
    passed: bool
    output: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    status: str = STARTING
    failures: int = 0
    """Counted ones, one after the other."""
    probes: int = 0
    counted_at: float | None = None
    """Unix s of the last failure that counted."""
    output: str = ""
    """Of the last probe, if it failed."""


def merged(spec: HealthConfig, image: HealthConfig) -> HealthConfig:
    """The service's check; what it leaves open is the image's."""
    result = HealthConfig()
    result.CopyFrom(image)
    if spec.test:
        result.test[:] = spec.test
    for name in ("interval_s", "timeout_s", "start_period_s", "start_interval_s", "retries"):
        if value := getattr(spec, name):
            setattr(result, name, value)
    return result


def check_of(config: HealthConfig) -> Check | None:
    """None: the container is not asked."""
    kind, *words = list(config.test) or ["NONE"]
    if kind == "NONE" or not words:
        return None
    return Check(
        ("/bin/sh", "-c", *words) if kind == "CMD-SHELL" else tuple(words),
        config.interval_s or INTERVAL_S,
        config.timeout_s or TIMEOUT_S,
        config.start_period_s,
        config.start_interval_s or START_INTERVAL_S,
        config.retries or RETRIES,
    )


def judged(check: Check, health: Health, probe: Probe, started_at: float, now: float) -> Health:
    """What is known after one more probe. `started_at`: Unix s when the container was started."""
    probes = health.probes + 1
    if probe.passed:
        return Health(HEALTHY, probes=probes)
    since = health.counted_at if health.counted_at is not None else started_at
    if health.status == STARTING and (now < started_at + check.start_period_s or now < since + check.interval_s):
        return Health(STARTING, health.failures, probes, health.counted_at, probe.output)
    failures = health.failures + 1
    status = UNHEALTHY if failures >= check.retries else health.status
    return Health(status, failures, probes, now, probe.output)


def pause_s(check: Check, health: Health) -> float:
    """Until the next probe."""
    if health.status != STARTING:
        return check.interval_s
    if health.probes == 0:
        return 0.0
    often = min(check.start_interval_s, check.interval_s)
    return min(often, FIRST_PAUSE_S * 2.0 ** min(health.probes - 1, 16))


def complaint(check: Check, health: Health) -> str:
    """For the task's error."""
    shown = " ".join(health.output.split())[-OUTPUT_CHARS_MAX:] or "the command failed without a word"
    if health.status == UNHEALTHY:
        return f"task: unhealthy: its health check failed {health.failures} times: {shown}"
    return f"health check failed ({health.failures} of {check.retries}): {shown}"
