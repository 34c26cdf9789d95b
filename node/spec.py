"""CreateRequest -> OCI config.json, with Docker's defaults. Pure: what must be looked up comes in as `Facts`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node.interface import CreateRequest, ImageConfig, RuntimeFault
from node.rootfs import Account
from proto.objects_pb2 import ContainerSpec, Mount, Resources

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHM_SIZE_BYTES = 64 << 20
CPU_PERIOD_US = 100_000
CPU_QUOTA_US_MIN = 1_000
"""The kernel refuses less."""
INIT_TARGET = "/sbin/docker-init"

_DEFAULT_CAPS_NAMES = """
    CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL
    AUDIT_WRITE
"""
DEFAULT_CAPS = tuple("CAP_" + name for name in _DEFAULT_CAPS_NAMES.split())
_ALL_CAPS_NAMES = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
    NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT
    SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP
    MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
ALL_CAPS = tuple("CAP_" + name for name in _ALL_CAPS_NAMES.split())
"""In the order of their numbers: bit n of /proc/self/status is ALL_CAPS[n]."""

_MASKED = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
]
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_DEVICES: list[dict[str, Any]] = [
    {"allow": False, "access": "rwm"},
    *({"allow": True, "type": "c", "major": 1, "minor": minor, "access": "rwm"} for minor in (3, 5, 7, 8, 9)),
    *({"allow": True, "type": "c", "major": 5, "minor": minor, "access": "rwm"} for minor in (0, 1, 2)),
    {"allow": True, "type": "c", "major": 136, "access": "rwm"},
    {"allow": True, "type": "c", "access": "m"},
    {"allow": True, "type": "b", "access": "m"},
]
_PROPAGATIONS = ("", "rprivate", "private", "rshared", "shared", "rslave", "slave")
RLIMITS = [
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
]


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """A device of the host that the container may use."""

    path: str
    """In the container."""
    kind: str
    """c | b"""
    major: int
    minor: int
    mode: int
    uid: int
    gid: int
    access: str
    """Of "rwm": read, write, make."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the shell found out for this container."""

    rootfs: Path
    account: Account
    cgroups_path: str
    seccomp: Mapping[str, Any]
    annotations: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[tuple[Mount, Path], ...] = ()
    """Binds and volumes of the spec with the host directory of each."""
    files: tuple[tuple[Path, str], ...] = ()
    """(host file, target): /etc/hosts and its like."""
    init: Path | None = None
    cgroup_v2: bool = False
    swap_limit: bool = False
    devices: tuple[DeviceNode, ...] = ()
    available_caps: frozenset[str] = frozenset(ALL_CAPS)


def arguments(spec: ContainerSpec, image: ImageConfig) -> list[str]:
    """The process's argv. `command` replaces the entrypoint and drops the image's command, as in Docker."""
    args = list(spec.args)
    entrypoint = list(spec.command) or list(image.entrypoint)
    if not spec.command and not args:
        args = list(image.cmd)
    argv = entrypoint + args
    if not argv:
        raise RuntimeFault(f"no command specified: image {spec.image} has none; give the service a command")
    return argv


def environment(spec: ContainerSpec, image: ImageConfig, hostname: str, home: str) -> list[str]:
    """PATH, HOSTNAME, TERM, then the image's, then the spec's; a later one replaces the value in place.
    A bare "K" in the spec removes K."""
    values = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname}
    if spec.tty:
        values["TERM"] = "xterm"
    for entry in (*image.env, *spec.env):
        key, equals, value = entry.partition("=")
        if equals:
            values[key] = value
        else:
            values.pop(key, None)
    values.setdefault("HOME", home)
    return [f"{key}={value}" for key, value in values.items()]


def capabilities(add: Iterable[str], drop: Iterable[str], available: frozenset[str]) -> tuple[str, ...]:
    """Docker's default set, less `drop`, plus `add`; "ALL" in either. Raises RuntimeFault for an unknown name."""

    def names(given: Iterable[str]) -> set[str]:
        result = {cap if cap == "ALL" or cap.startswith("CAP_") else "CAP_" + cap for cap in map(str.upper, given)}
        for cap in result - {"ALL"} - set(ALL_CAPS):
            raise RuntimeFault(f"invalid capability {cap}: see capabilities(7) for the names")
        return result

    adding, dropping = names(add), names(drop)
    held = set(DEFAULT_CAPS)
    if "ALL" in adding:
        # What this host's agent may not do itself (an agent in a container), it cannot give either.
        held = set(ALL_CAPS) & available
    if "ALL" in dropping:
        held = set()
    held = (held - dropping) | (adding - {"ALL"})
    return tuple(cap for cap in ALL_CAPS if cap in held)


def resources(limits: Resources, reservations: Resources, facts: Facts) -> dict[str, Any]:
    """The OCI field linux.resources. As Docker, what the kernel cannot do about swap is left out."""
    allowed = [
        {"allow": True, "type": device.kind, "major": device.major, "minor": device.minor, "access": device.access}
        for device in facts.devices
    ]
    result: dict[str, Any] = {"devices": [*_DEVICES, *allowed]}
    memory: dict[str, int] = {}
    if limits.memory_bytes:
        memory["limit"] = limits.memory_bytes
        if facts.swap_limit:
            memory["swap"] = limits.memory_swap_bytes or 2 * limits.memory_bytes  # as Docker: as much swap as memory
    if reservations.memory_bytes:
        memory["reservation"] = reservations.memory_bytes
    if limits.HasField("memory_swappiness") and not facts.cgroup_v2:  # cgroup v2 has no such thing
        memory["swappiness"] = limits.memory_swappiness
    if memory:
        result["memory"] = memory
    if limits.nano_cpus:
        quota_us = max(CPU_QUOTA_US_MIN, limits.nano_cpus * CPU_PERIOD_US // 1_000_000_000)
        result["cpu"] = {"quota": quota_us, "period": CPU_PERIOD_US}
    if limits.pids:
        result["pids"] = {"limit": limits.pids}
    return result


def _mount(destination: str, fstype: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": fstype, "source": source, "options": list(options)}


def _system_mounts(cgroup_v2: bool) -> list[dict[str, Any]]:
    safe = ("nosuid", "noexec", "nodev")
    mounts = [
        _mount("/proc", "proc", "proc", *safe),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
        ),
        _mount("/sys", "sysfs", "sysfs", *safe, "ro"),
        _mount("/dev/mqueue", "mqueue", "mqueue", *safe),
        _mount("/dev/shm", "tmpfs", "shm", *safe, "mode=1777", f"size={SHM_SIZE_BYTES}"),
    ]
    if cgroup_v2:
        mounts.insert(4, _mount("/sys/fs/cgroup", "cgroup", "cgroup", "ro", *safe))
    return mounts


def _tmpfs(mount: Mount) -> dict[str, Any]:
    options = ["noexec", "nosuid", "nodev", f"mode={mount.tmpfs_mode or 0o1777:o}"]
    if mount.tmpfs_size_bytes:
        options.append(f"size={mount.tmpfs_size_bytes}")
    if mount.read_only:
        options.append("ro")
    return _mount(mount.target, "tmpfs", "tmpfs", *options)


def _bind(mount: Mount, source: Path) -> dict[str, Any]:
    if mount.propagation not in _PROPAGATIONS:
        raise RuntimeFault(f"invalid propagation {mount.propagation!r} of mount {mount.target}: use rprivate or rslave")
    options = ["rbind", "ro" if mount.read_only else "rw", mount.propagation or "rprivate"]
    return _mount(mount.target, "bind", str(source), *options)


def _depth(target: str) -> int:
    return len([part for part in target.split("/") if part])


def user_mounts(spec: ContainerSpec, facts: Facts) -> list[dict[str, Any]]:
    """The spec's mounts and our files, shallow targets first so that none hides another."""
    mounts = [_bind(mount, source) for mount, source in facts.mounts]
    mounts += [_tmpfs(mount) for mount in spec.mounts if mount.type == Mount.TMPFS]
    own_targets = {str(mount["destination"]).rstrip("/") for mount in mounts}
    mounts += [
        _mount(target, "bind", str(source), "rbind", "rprivate")
        for source, target in facts.files
        if target not in own_targets
    ]
    if facts.init is not None:
        mounts.append(_mount(INIT_TARGET, "bind", str(facts.init), "bind", "ro"))
    return sorted(mounts, key=lambda mount: _depth(str(mount["destination"])))


def rootfs_propagation(mounts: Sequence[Mount]) -> str:
    """Shared or slave binds need a root mount that lets events through."""
    kinds = {mount.propagation.removeprefix("r") for mount in mounts if mount.type == Mount.BIND}
    return "shared" if "shared" in kinds else "slave" if "slave" in kinds else ""


def rlimits(spec: ContainerSpec) -> list[dict[str, Any]]:
    """The OCI field process.rlimits. Raises RuntimeFault for an unknown name."""
    result: list[dict[str, Any]] = []
    for limit in spec.ulimits:
        if limit.name.lower() not in RLIMITS:
            raise RuntimeFault(f"invalid ulimit type {limit.name}: use one of {', '.join(RLIMITS)}")
        unlimited = (1 << 64) - 1
        soft, hard = (unlimited if value < 0 else value for value in (limit.soft, limit.hard or limit.soft))
        result.append({"type": "RLIMIT_" + limit.name.upper(), "soft": soft, "hard": hard})
    return result


def _device(device: DeviceNode) -> dict[str, Any]:
    return {
        "path": device.path,
        "type": device.kind,
        "major": device.major,
        "minor": device.minor,
        "fileMode": device.mode,
        "uid": device.uid,
        "gid": device.gid,
    }


def _namespaces(netns: Path | None, cgroup_v2: bool) -> list[dict[str, str]]:
    kinds = ["mount", "pid", "ipc", "uts", *(["cgroup"] if cgroup_v2 else [])]
    namespaces = [{"type": kind} for kind in kinds]
    if netns is not None:
        namespaces.append({"type": "network", "path": str(netns)})
    return namespaces


def _process(request: CreateRequest, facts: Facts, caps: Sequence[str]) -> dict[str, Any]:
    spec, image, account = request.spec, request.image.config, facts.account
    args = arguments(spec, image)
    user: dict[str, Any] = {"uid": account.uid, "gid": account.gid}
    if account.additional_gids:
        user["additionalGids"] = list(account.additional_gids)
    # Other users hold none until they run a file that grants some, as execve(2) would do.
    sets = ("bounding", "effective", "permitted") if account.uid == 0 else ("bounding",)
    process: dict[str, Any] = {
        "terminal": spec.tty,
        "user": user,
        "args": [INIT_TARGET, "--", *args] if facts.init else args,
        "env": environment(spec, image, request.hostname, account.home),
        "cwd": spec.dir or image.dir or "/",
        "capabilities": {name: list(caps) for name in sets},
        "oomScoreAdj": spec.oom_score_adj,
    }
    if spec.ulimits:
        process["rlimits"] = rlimits(spec)
    return process


def build(request: CreateRequest, facts: Facts) -> dict[str, Any]:
    """The whole config.json. Raises RuntimeFault (permanent) for what the spec gets wrong."""
    spec = request.spec
    caps = capabilities(spec.capability_add, spec.capability_drop, facts.available_caps)
    linux: dict[str, Any] = {
        "namespaces": _namespaces(request.netns, facts.cgroup_v2),
        "resources": resources(request.limits, request.reservations, facts),
        "cgroupsPath": facts.cgroups_path,
        "maskedPaths": _MASKED,
        "readonlyPaths": _READ_ONLY,
        "seccomp": dict(facts.seccomp),
    }
    sysctls = dict(spec.sysctls)
    if request.netns is not None:
        # As Docker: any user may bind low ports and ping inside a network namespace of its own.
        sysctls.setdefault("net.ipv4.ip_unprivileged_port_start", "0")
        sysctls.setdefault("net.ipv4.ping_group_range", "0 2147483647")
    if sysctls:
        linux["sysctl"] = sysctls
    if facts.devices:
        linux["devices"] = [_device(device) for device in facts.devices]
    if propagation := rootfs_propagation(spec.mounts):
        linux["rootfsPropagation"] = propagation
    config: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": _process(request, facts, caps),
        "root": {"path": str(facts.rootfs), "readonly": spec.read_only},
        "hostname": request.hostname,
        "mounts": _system_mounts(facts.cgroup_v2) + user_mounts(spec, facts),
        "linux": linux,
    }
    if facts.annotations:
        config["annotations"] = dict(facts.annotations)
    return config
