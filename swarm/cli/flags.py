"""The flags of `service create` and `service update` as data: names, help, and those that are refused.

Values stay text here; swarm/cli/spec.py gives them meaning. Lists get an -add and an -rm form in update.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.Enum):
    VALUE = "value"
    LIST = "list"
    BOOL = "bool"


@dataclass(frozen=True, slots=True)
class Flag:
    name: str
    kind: Kind
    metavar: str
    help: str
    short: str = ""
    removal: str = ""
    """Lists: what the -rm form in `service update` takes; "" = the list has no such form."""


def _value(name: str, metavar: str, text: str, short: str = "") -> Flag:
    return Flag(name, Kind.VALUE, metavar, text, short)


def _list(name: str, metavar: str, text: str, short: str = "", removal: str = "VALUE") -> Flag:
    return Flag(name, Kind.LIST, metavar, text, short, removal)


def _bool(name: str, text: str, short: str = "") -> Flag:
    return Flag(name, Kind.BOOL, "", text, short)


def _rollout(prefix: str, word: str, actions: str) -> tuple[Flag, ...]:
    return (
        _value(f"{prefix}-parallelism", "N", f"Tasks {word} at the same time; 0 = all at once (default 1)"),
        _value(f"{prefix}-delay", "DURATION", f"Pause between tasks being {word} (default 0s)"),
        _value(f"{prefix}-monitor", "DURATION", f"How long each task {word} is watched for failure (default 5s)"),
        _value(f"{prefix}-failure-action", actions, "What to do when too many tasks fail (default pause)"),
        _value(f"{prefix}-max-failure-ratio", "RATIO", "Share of tasks that may fail, 0 to 1 (default 0)"),
        _value(
            f"{prefix}-progress-deadline",
            "DURATION",
            "Fails when no task got ahead for so long (default 10m; 0s = never)",
        ),
        _value(f"{prefix}-order", "start-first|stop-first", "Which comes first, new or old task (default stop-first)"),
    )


COMMON: tuple[Flag, ...] = (
    _value("replicas", "N", "Number of tasks, or of a job's completions (default 1)"),
    _value("max-concurrent", "N", "Tasks of a replicated job at the same time (default: all)"),
    _value("max-unavailable", "N", "Most tasks that a drain may move at a time (default: a quarter of the replicas)"),
    _value("replicas-max-per-node", "N", "Most tasks on one node; 0 = unlimited"),
    _value("endpoint-mode", "vip|dnsrr", "How the service's name resolves (default vip)"),
    _value("balance", "round-robin|least-connections|source", "How connections are shared out (default round-robin)"),
    _value("balance-weight", "LABEL", "Nodes' label with their tasks' share, 1 to 100: node.labels.capacity"),
    _value("limit-cpu", "CPUS", "Most CPU a task may use, such as 0.5"),
    _value("limit-memory", "BYTES", "Most memory a task may use, such as 64m"),
    _value("memory-swap", "BYTES", "Most memory and swap together; -1 = unlimited (default: twice --limit-memory)"),
    _value("memory-swappiness", "N", "How readily the kernel swaps the task out, 0 to 100 (cgroup v1)"),
    _value("limit-pids", "N", "Most processes of a task; 0 = unlimited"),
    _value("reserve-cpu", "CPUS", "CPU that a node must have free for a task"),
    _value("reserve-memory", "BYTES", "Memory that a node must have free for a task"),
    _value("restart-condition", "none|on-failure|any", "When a task that ended is replaced (default any)"),
    _value("restart-delay", "DURATION", "Pause before a replacement starts (default 5s)"),
    _value("restart-max-attempts", "N", "Replacements before giving up; 0 = no limit"),
    _value("restart-window", "DURATION", "Time within which attempts are counted; 0s = ever"),
    *_rollout("update", "updated", "pause|continue|rollback"),
    *_rollout("rollback", "rolled back", "pause|continue"),
    _value("hostname", "NAME", "Containers' host name; may hold {{.Task.Slot}} and the like"),
    _value("user", "USER[:GROUP]", "Who the process runs as", "u"),
    _value("workdir", "DIR", "Working directory inside the container", "w"),
    _value("entrypoint", "COMMAND", "Replaces the image's entrypoint; split as a shell would"),
    _bool("tty", "Give the process a terminal", "t"),
    _bool("read-only", "Mount the root file system read-only"),
    _bool("init", "Run a small init that forwards signals and reaps processes"),
    _value("stop-signal", "SIGNAL", "Signal that stops the process"),
    _value("stop-grace-period", "DURATION", "Time between that signal and SIGKILL (default 10s)"),
    _value("oom-score-adj", "N", "The kernel's out-of-memory preference, -1000 to 1000"),
    _value("health-cmd", "COMMAND", 'Run in the container by its shell to see whether it serves; "" = the image\'s'),
    _value("health-interval", "DURATION", "Pause between checks (default 30s)"),
    _value("health-timeout", "DURATION", "A check that takes longer has failed (default 30s)"),
    _value("health-retries", "N", "Failures one after the other that make a task unhealthy (default 3)"),
    _value("health-start-period", "DURATION", "Time to start up, in which failures do not count (default 0s)"),
    _value("health-start-interval", "DURATION", "Longest pause between checks while it starts (default 5s)"),
    _bool("no-healthcheck", "Do not use the image's health check"),
    _list("log-opt", "KEY=VALUE", "Log option: max-size, max-file", removal=""),
    _list("cap-add", "CAP", "Add a capability", removal=""),
    _list("cap-drop", "CAP", "Drop a capability", removal=""),
)

LISTS: tuple[Flag, ...] = (
    _list("network", "NETWORK", "Attach to a network: NAME or name=NAME,alias=ALIAS", removal="NETWORK"),
    _list(
        "publish",
        "PORT",
        "Publish a port: [IP:]8000:80/tcp or published=,target=,protocol=,mode=,host_ip=,name=",
        "p",
        "TARGET",
    ),
    _list("env", "KEY=VALUE", "Environment variable; KEY alone takes this shell's value", "e", "KEY"),
    _list("label", "KEY=VALUE", "Label of the service", "l", "KEY"),
    _list("container-label", "KEY=VALUE", "Label of its containers", removal="KEY"),
    _list("constraint", "EXPRESSION", "Where tasks may run: node.role==worker"),
    _list("placement-pref", "PREFERENCE", "Spread tasks over values: spread=node.labels.zone"),
    _list("mount", "MOUNT", "type=bind|volume|tmpfs,source=,target=,readonly", removal="TARGET"),
    _list("volume-per-slot", "NAME:TARGET", "Mount a volume of its own in each slot: NAME.1, ...", removal="TARGET"),
    _list("generic-resource", "KIND=N", "What a node must have free for a task: gpu=2,licences=1", removal="KIND"),
    _list("device", "PATH", "Give access to a device of the node: HOST[:CONTAINER[:rwm]]", removal="PATH"),
    _list("host", "NAME:IP", "Line for /etc/hosts"),
    _list("dns", "IP", "Name server used instead of the node's"),
    _list("dns-search", "DOMAIN", "DNS search domain (default: the node's; . for none)"),
    _list("dns-option", "OPTION", "DNS option, such as timeout:3"),
    _list("group", "GROUP", "Supplementary group of the process"),
    _list("ulimit", "NAME=SOFT[:HARD]", "Resource limit of the process, such as nofile=1024", removal="NAME"),
    _list("sysctl", "KEY=VALUE", "Namespaced kernel parameter", removal="KEY"),
)

SWITCHES: tuple[Flag, ...] = (
    _bool("with-registry-auth", "Send this user's registry credentials to the nodes"),
    _bool("no-resolve-image", "Do not ask for the image's digest; nodes look it up by name"),
    _bool("detach", "Return at once instead of waiting until the service has converged", "d"),
    _bool("quiet", "Print no progress", "q"),
)

CREATE: tuple[Flag, ...] = (
    _value("name", "NAME", "Name of the service (default: made from the image's)"),
    _value("mode", "replicated|global|replicated-job|global-job", "A number of tasks, or one per node; jobs complete"),
    *COMMON,
    *LISTS,
    _list("env-file", "FILE", "Read environment variables from a file, one KEY=VALUE a line"),
    *SWITCHES,
)


def _update_forms(flag: Flag) -> tuple[Flag, Flag]:
    removal = f"Remove: {flag.help[0].lower()}{flag.help[1:].partition(':')[0]}"
    return (
        Flag(f"{flag.name}-add", Kind.LIST, flag.metavar, f"Add or change: {flag.help}"),
        Flag(f"{flag.name}-rm", Kind.LIST, flag.removal, removal),
    )


UPDATE: tuple[Flag, ...] = (
    _value("image", "IMAGE", "New image"),
    _value("args", "COMMAND", 'New arguments, split as a shell would; "" = the image\'s own'),
    _bool("force", "Replace all tasks even if nothing changed"),
    _bool("rollback", "Return to the previous specification"),
    *COMMON,
    *(form for flag in LISTS for form in _update_forms(flag)),
    *SWITCHES,
)

_SECRETS = "secrets do not exist in this version of pyswarm; use a bind mount or an environment variable"
_CONFIGS = "configs do not exist in this version of pyswarm; use a bind mount"
_WINDOWS = "it is for Windows containers only"

_REFUSED_BOTH: dict[str, str] = {
    "credential-spec": _WINDOWS,
    "isolation": _WINDOWS,
    "log-driver": "logs are always kept in files on the node; --log-opt max-size and max-file set how much",
}
REFUSED_CREATE: dict[str, str] = {
    **_REFUSED_BOTH,
    "secret": _SECRETS,
    "config": _CONFIGS,
}
REFUSED_UPDATE: dict[str, str] = {
    **_REFUSED_BOTH,
    **{f"secret-{form}": _SECRETS for form in ("add", "rm")},
    **{f"config-{form}": _CONFIGS for form in ("add", "rm")},
}
"""Docker's flags that take a value and are refused by name, with the reason: never silently ignored."""
