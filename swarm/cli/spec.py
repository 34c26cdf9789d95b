"""Flags of `service create` to a ServiceSpec. Pure: the environment and files come in as arguments.

`Flags` holds only what the user gave (name without dashes -> text, tuple of texts, or bool); what is
absent stays unset in the spec, so that defaults live in one place, the managers.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from google.protobuf.message import Message

from proto.objects_pb2 import (
    CONTINUE,
    DNSRR,
    LEAST_CONNECTIONS,
    PAUSE,
    RESTART_ANY,
    RESTART_NONE,
    RESTART_ON_FAILURE,
    ROLLBACK,
    ROUND_ROBIN,
    SOURCE_HASH,
    START_FIRST,
    STOP_FIRST,
    VIP,
    ContainerSpec,
    NetworkAttachmentConfig,
    ServiceSpec,
    Ulimit,
)
from swarm.cli.generic import parse_wanted
from swarm.cli.mounts import csv_fields, parse_device, parse_mount, parse_volume_per_slot
from swarm.cli.ports import parse_publish
from swarm.cli.units import parse_bytes, parse_duration_s, parse_nano_cpus, parse_uint
from swarm.errors import Invalid

Flags = Mapping[str, Any]
Parse = Callable[[str], Any]

REPLICAS_MAX = 1_000_000
"""A typing error should not make managers create tasks until memory ends."""
RATIO_MAX = 1.0
MODES = ("replicated", "global", "replicated-job", "global-job")


def choice(**known: Any) -> Parse:
    """A parser of one of these words; an underscore stands for the dash."""
    words = {word.replace("_", "-"): value for word, value in known.items()}

    def parse(text: str) -> Any:
        if text not in words:
            raise Invalid(f"choose one of {', '.join(words)}")
        return words[text]

    return parse


def _ratio(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?|\.\d+", text) or float(text) > RATIO_MAX:
        raise Invalid("it must be a number from 0 to 1")
    return float(text)


def _score(text: str) -> int:
    return parse_uint(text, -1000, 1000)


def _swap(text: str) -> int:
    return -1 if text == "-1" else parse_bytes(text)


def _percent(text: str) -> int:
    return parse_uint(text, 0, 100)


def _uint32(text: str) -> int:
    return parse_uint(text, 0, 2**32 - 1)


def _deadline(text: str) -> float:
    return parse_duration_s(text) or -1.0  # in a spec 0 stands for the default, and a negative number for "never"


def _rollout(prefix: str, **actions: int) -> dict[str, tuple[str, Parse]]:
    return {
        f"{prefix}-parallelism": (f"{prefix}.parallelism", parse_uint),
        f"{prefix}-delay": (f"{prefix}.delay_s", parse_duration_s),
        f"{prefix}-monitor": (f"{prefix}.monitor_s", parse_duration_s),
        f"{prefix}-failure-action": (f"{prefix}.failure_action", choice(**actions)),
        f"{prefix}-max-failure-ratio": (f"{prefix}.max_failure_ratio", _ratio),
        f"{prefix}-progress-deadline": (f"{prefix}.progress_deadline_s", _deadline),
        f"{prefix}-order": (f"{prefix}.order", choice(start_first=START_FIRST, stop_first=STOP_FIRST)),
    }


SCALARS: dict[str, tuple[str, Parse]] = {
    "name": ("annotations.name", str),
    "endpoint-mode": ("endpoint.mode", choice(vip=VIP, dnsrr=DNSRR)),
    "balance": (
        "endpoint.balance",
        choice(round_robin=ROUND_ROBIN, least_connections=LEAST_CONNECTIONS, source=SOURCE_HASH),
    ),
    "balance-weight": ("endpoint.weight_label", str),
    "max-unavailable": ("max_unavailable", parse_uint),
    "replicas-max-per-node": ("task.placement.max_replicas_per_node", _uint32),
    "limit-cpu": ("task.resources.limits.nano_cpus", parse_nano_cpus),
    "limit-memory": ("task.resources.limits.memory_bytes", parse_bytes),
    "limit-pids": ("task.resources.limits.pids", parse_uint),
    "reserve-cpu": ("task.resources.reservations.nano_cpus", parse_nano_cpus),
    "reserve-memory": ("task.resources.reservations.memory_bytes", parse_bytes),
    "restart-condition": (
        "task.restart.condition",
        choice(any=RESTART_ANY, on_failure=RESTART_ON_FAILURE, none=RESTART_NONE),
    ),
    "restart-delay": ("task.restart.delay_s", parse_duration_s),
    "restart-max-attempts": ("task.restart.max_attempts", parse_uint),
    "restart-window": ("task.restart.window_s", parse_duration_s),
    **_rollout("update", pause=PAUSE, **{"continue": CONTINUE}, rollback=ROLLBACK),
    **_rollout("rollback", pause=PAUSE, **{"continue": CONTINUE}),
    "hostname": ("task.container.hostname", str),
    "user": ("task.container.user", str),
    "workdir": ("task.container.dir", str),
    "tty": ("task.container.tty", bool),
    "read-only": ("task.container.read_only", bool),
    "init": ("task.container.init", bool),
    "stop-signal": ("task.container.stop_signal", str),
    "stop-grace-period": ("task.container.stop_grace_period_s", parse_duration_s),
    "memory-swap": ("task.resources.limits.memory_swap_bytes", _swap),
    "memory-swappiness": ("task.resources.limits.memory_swappiness", _percent),
    "health-interval": ("task.container.health.interval_s", parse_duration_s),
    "health-timeout": ("task.container.health.timeout_s", parse_duration_s),
    "health-retries": ("task.container.health.retries", _uint32),
    "health-start-period": ("task.container.health.start_period_s", parse_duration_s),
    "health-start-interval": ("task.container.health.start_interval_s", parse_duration_s),
    "oom-score-adj": ("task.container.oom_score_adj", _score),
}
"""Flag -> (field of ServiceSpec, parser): the same for create and update."""

MAPS = {
    "label": "annotations.labels",
    "container-label": "task.container.labels",
    "sysctl": "task.container.sysctls",
}


def build_spec(
    image: str, command: Iterable[str], flags: Flags, environ: Mapping[str, str], read_file: Callable[[str], str]
) -> ServiceSpec:
    """The spec that `service create` asks for. Raises Invalid, naming the flag."""
    spec = ServiceSpec()
    container = spec.task.container
    container.image = image
    container.args.extend(command)
    _set_mode(spec, flags)
    apply_scalars(spec, flags)
    env: dict[str, str] = {}
    for path in flags.get("env-file", ()):
        env |= parse_env(parse_env_file(read_file(path)), environ, "--env-file")
    env |= parse_env(flags.get("env", ()), environ)
    container.env.extend(f"{key}={value}" for key, value in env.items())
    for name, path in MAPS.items():
        getattr_path(spec, path).update(parse_pairs(flags.get(name, ()), name))
    spec.task.log_options.update(parse_pairs(flags.get("log-opt", ()), "log-opt"))
    spec.task.networks.extend(parse_network(text) for text in flags.get("network", ()))
    for text in flags.get("publish", ()):
        spec.endpoint.ports.extend(parse_publish(text))
    container.mounts.extend(parse_mount(text) for text in flags.get("mount", ()))
    container.mounts.extend(parse_volume_per_slot(text) for text in flags.get("volume-per-slot", ()))
    container.devices.extend(parse_device(text) for text in flags.get("device", ()))
    spec.task.placement.constraints.extend(check_constraint(text) for text in flags.get("constraint", ()))
    spec.task.placement.spread.extend(parse_preference(text) for text in flags.get("placement-pref", ()))
    if wanted := parse_wanted(flags.get("generic-resource", ()), "generic-resource"):
        spec.task.resources.reservations.generic.extend(wanted)
    container.hosts.extend(parse_host(text) for text in flags.get("host", ()))
    container.dns_nameservers.extend(flags.get("dns", ()))
    container.dns_search.extend(flags.get("dns-search", ()))
    container.dns_options.extend(flags.get("dns-option", ()))
    container.groups.extend(flags.get("group", ()))
    container.ulimits.extend(parse_ulimit(text) for text in flags.get("ulimit", ()))
    container.capability_add.extend(capability(text) for text in flags.get("cap-add", ()))
    container.capability_drop.extend(capability(text) for text in flags.get("cap-drop", ()))
    return spec


def _set_mode(spec: ServiceSpec, flags: Flags) -> None:
    mode = flags.get("mode", "replicated")
    if mode not in MODES:
        raise Invalid(f'unknown mode "{mode}" for --mode: choose one of {", ".join(MODES)}')
    if mode.startswith("global") and "replicas" in flags:
        raise Invalid("--replicas can only be used with a replicated mode: a global service runs on every node")
    if mode != "replicated-job" and "max-concurrent" in flags:
        raise Invalid("--max-concurrent can only be used with --mode replicated-job")
    if mode.endswith("job") and flags.get("restart-condition") == "any":
        raise Invalid("--restart-condition any cannot be used with a job, which ends when it completes: use on-failure")
    # `global` is a keyword, so the field is reached by name.
    getattr(spec, mode.replace("-", "_")).SetInParent()
    if mode.startswith("replicated"):
        set_replicas(spec, flag_value("replicas", parse_replicas, flags.get("replicas", "1")))
    if "max-concurrent" in flags:
        set_max_concurrent(spec, flag_value("max-concurrent", parse_replicas, flags["max-concurrent"]))


def set_replicas(spec: ServiceSpec, replicas: int) -> None:
    """Raises Invalid for a global service."""
    match spec.WhichOneof("mode"):
        case "replicated":
            spec.replicated.replicas = replicas
        case "replicated_job":
            spec.replicated_job.total_completions = replicas
        case _:
            raise Invalid(
                f"{spec.annotations.name}: scale can only be used with replicated or replicated-job mode: "
                "a global service runs on every node"
            )


def set_max_concurrent(spec: ServiceSpec, count: int) -> None:
    """Raises Invalid for what is not a replicated job."""
    if spec.WhichOneof("mode") != "replicated_job":
        raise Invalid("--max-concurrent can only be used with replicated-job mode")
    spec.replicated_job.max_concurrent = count


def parse_replicas(text: str) -> int:
    return parse_uint(text, 0, REPLICAS_MAX)


def flag_value(name: str, parse: Parse, text: Any) -> Any:
    """The parsed value; a refusal names the flag."""
    try:
        return parse(text)
    except Invalid as error:
        raise Invalid(f'invalid value "{text}" for --{name}: {error}') from None


def apply_scalars(spec: ServiceSpec, flags: Flags) -> None:
    """Set every single-valued field that was given. Raises Invalid, naming the flag."""
    container = spec.task.container
    _set_health_test(container, flags)
    for name, (path, parse) in SCALARS.items():
        if name in flags:
            parent, _, field = path.rpartition(".")
            setattr(getattr_path(spec, parent), field, flag_value(name, parse, flags[name]))
    if "entrypoint" in flags:
        container.command[:] = flag_value("entrypoint", split_words, flags["entrypoint"])


def _set_health_test(container: ContainerSpec, flags: Flags) -> None:
    """As Docker: --no-healthcheck clears all, any other health flag ends it, an empty command is the image's."""
    asked = sorted(name for name in flags if name.startswith("health-"))
    if flags.get("no-healthcheck"):
        if asked:
            raise Invalid(f"--no-healthcheck conflicts with --{asked[0]}: give one of them")
        container.ClearField("health")
        container.health.test[:] = ["NONE"]
    elif asked:
        container.health.SetInParent()
        if list(container.health.test) == ["NONE"]:
            del container.health.test[:]
        if "health-cmd" in flags:
            container.health.test[:] = ["CMD-SHELL", flags["health-cmd"]] if flags["health-cmd"] else []


def getattr_path(message: Message, path: str) -> Any:
    found: Any = message
    for name in path.split(".") if path else ():
        found = getattr(found, name)
    return found


def split_words(text: str) -> list[str]:
    """As a shell would. Raises Invalid."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise Invalid(f"it cannot be split into words ({error})") from None


def parse_pairs(texts: Iterable[str], flag: str) -> dict[str, str]:
    """KEY=VALUE of labels and the like; a missing value is empty."""
    pairs: dict[str, str] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not key.strip():
            raise Invalid(f'invalid value "{text}" for --{flag}: write KEY=VALUE')
        pairs[key] = value
    return pairs


def parse_env(texts: Iterable[str], environ: Mapping[str, str], flag: str = "--env") -> dict[str, str]:
    """KEY=VALUE; KEY alone takes the caller's value and is left out when the caller has none."""
    env: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or re.search(r"\s", key):
            raise Invalid(f'invalid value "{text}" for {flag}: write KEY=VALUE, the key without spaces')
        if equals:
            env[key] = value
        elif key in environ:
            env[key] = environ[key]
    return env


def parse_env_file(text: str) -> list[str]:
    """One variable a line; blank lines and lines that begin with # do not count."""
    lines = (line.strip() for line in text.lstrip("\ufeff").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def parse_network(text: str, flag: str = "--network") -> NetworkAttachmentConfig:
    """NAME, or name=NAME,alias=A,alias=B. Raises Invalid."""
    if "=" not in text:
        return NetworkAttachmentConfig(network_id=text)
    attachment = NetworkAttachmentConfig()
    for key, value in csv_fields(text):
        match key:
            case "name":
                attachment.network_id = value
            case "alias":
                attachment.aliases.append(value)
            case "driver-opt":
                raise Invalid(f'invalid value "{text}" for {flag}: driver-opt is not supported; the driver has none')
            case _:
                raise Invalid(f'invalid value "{text}" for {flag}: unknown field "{key}"; known: name, alias')
    if not attachment.network_id:
        raise Invalid(f'invalid value "{text}" for {flag}: name=NETWORK is missing')
    return attachment


def check_constraint(text: str, flag: str = "--constraint") -> str:
    """The constraint as it was written, once the scheduler's own parser accepts it. Raises Invalid."""
    from swarm.schedule.constraints import parse_constraint

    try:
        parse_constraint(text)
    except Invalid as error:
        raise Invalid(f"{flag}: {error}") from None
    return text


def parse_preference(text: str, flag: str = "--placement-pref") -> str:
    """ "spread=node.labels.zone" -> "node.labels.zone". Raises Invalid."""
    from swarm.schedule.constraints import parse_spread

    strategy, _, value = text.partition("=")
    if strategy.strip() != "spread" or not value.strip():
        raise Invalid(f'invalid value "{text}" for {flag}: write spread=node.labels.LABEL')
    try:
        parse_spread(value.strip())
    except Invalid as error:
        raise Invalid(f"{flag}: {error}") from None
    return value.strip()


def parse_host(text: str, flag: str = "--host") -> str:
    """ "name:ip" -> "ip name", the order of /etc/hosts. Raises Invalid."""
    from ipaddress import ip_address

    name, _, address = text.partition("=" if "=" in text else ":")
    try:
        return f"{ip_address(address.strip('[]'))} {name}" if name else _refuse_host(text, flag)
    except ValueError:
        return _refuse_host(text, flag)


def _refuse_host(text: str, flag: str) -> str:
    raise Invalid(f'invalid value "{text}" for {flag}: write NAME:IP, such as db:10.0.0.5')


def parse_ulimit(text: str, flag: str = "--ulimit") -> Ulimit:
    """ "nofile=1024:2048"; one number stands for both; -1 = unlimited. Raises Invalid."""
    match = re.fullmatch(r"([a-z]+)=(-1|\d+)(?::(-1|\d+))?", text)
    if match is None:
        raise Invalid(f'invalid value "{text}" for {flag}: write NAME=SOFT[:HARD], such as nofile=1024:2048')
    soft, hard = int(match[2]), int(match[3] or match[2])
    if hard != -1 and (soft > hard or soft == -1):
        raise Invalid(f'invalid value "{text}" for {flag}: the soft limit exceeds the hard limit')
    return Ulimit(name=match[1], soft=soft, hard=hard)


def capability(text: str) -> str:
    """ "net_admin" -> "CAP_NET_ADMIN"; ALL stays."""
    name = text.strip().upper()
    return name if name == "ALL" or name.startswith("CAP_") else f"CAP_{name}"
