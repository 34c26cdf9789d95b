"""Is what a service says about its process something that a kernel knows? Nodes would reject it as well (node/spec.py,
node/monitor.py), but only task after task. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterable

from proto.objects_pb2 import ContainerSpec
from swarm.errors import Invalid

_CAPABILITIES = """
    AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER
    FSETID IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE MKNOD NET_ADMIN NET_BIND_SERVICE
    NET_BROADCAST NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID SYSLOG SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE
    SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG WAKE_ALARM
"""
CAPABILITIES = frozenset("CAP_" + name for name in _CAPABILITIES.split())
"""capabilities(7)"""
_ULIMITS = """
    as core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack
"""
ULIMITS = tuple(_ULIMITS.split())
"""getrlimit(2)"""
_SYSCTL = re.compile(
    r"net\.\S+|fs\.mqueue\.\w+|kernel\.(msg(max|mnb|mni)|sem|shm(all|max|mni|_rmid_forced)|domainname)"
)
"""Those that a container has of its own: network and IPC namespaces (those that Docker allows)."""
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
HOSTNAME_LENGTH_MAX = 64
"""sethostname(2)"""


def process(spec: ContainerSpec) -> None:
    """Raises Invalid for the first thing that is wrong."""
    if spec.stop_signal and not is_signal(spec.stop_signal):
        raise Invalid(f"stop signal {spec.stop_signal!r} is not known: use a name such as SIGTERM, or a number")
    _all_known("capability", (*spec.capability_add, *spec.capability_drop), _is_capability, "see capabilities(7)")
    _all_known("ulimit", (u.name for u in spec.ulimits), lambda name: name.lower() in ULIMITS, ", ".join(ULIMITS))
    _all_known("sysctl", spec.sysctls, _is_sysctl, "a container has net.*, fs.mqueue.* and kernel's msg*, sem, shm*")
    _all_known("supplementary group", spec.groups, bool, "write a name or a number")
    if spec.dir and not spec.dir.startswith("/"):
        raise Invalid(f"working directory {spec.dir!r}: it must be an absolute path in the container")
    if spec.hostname and "{{" not in spec.hostname and not _is_hostname(spec.hostname):
        raise Invalid(f"hostname {spec.hostname!r}: use up to {HOSTNAME_LENGTH_MAX} letters, digits, '.', '_' and '-'")


def is_signal(name: str) -> bool:
    """ "SIGTERM", "TERM", "15" or "SIGRTMIN+3"."""
    text = name.upper().removeprefix("SIG")
    if text.isdigit():
        return 0 < int(text) <= signal.SIGRTMAX
    base, plus, offset = text.partition("+")
    if plus:
        return base == "RTMIN" and offset.isdigit() and signal.SIGRTMIN + int(offset) <= signal.SIGRTMAX
    return "SIG" + base in signal.Signals.__members__


def _all_known(what: str, names: Iterable[str], is_known: Callable[[str], bool], remedy: str) -> None:
    for name in names:
        if not is_known(name):
            raise Invalid(f"{what} {name!r} is not known: {remedy}")


def _is_capability(name: str) -> bool:
    full = name.upper()
    return full == "ALL" or (full if full.startswith("CAP_") else "CAP_" + full) in CAPABILITIES


def _is_sysctl(name: str) -> bool:
    return _SYSCTL.fullmatch(name) is not None


def _is_hostname(text: str) -> bool:
    return len(text) <= HOSTNAME_LENGTH_MAX and _HOSTNAME.fullmatch(text) is not None
