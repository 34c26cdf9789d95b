"""Which cgroups this host has, and where a task's lies: v1, v2, or both (hybrid)."""

from __future__ import annotations

import contextlib
import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = "/sys/fs/cgroup"
UNIFIED = "/sys/fs/cgroup/unified"

Driver = Literal["cgroupfs", "systemd"]


class CgroupMode(enum.Enum):
    V1 = "v1"
    HYBRID = "hybrid"
    V2 = "v2"


@dataclass(frozen=True, slots=True)
class CgroupLayout:
    mode: CgroupMode
    hierarchies: tuple[str, ...]
    """Mount points: one per v1 controller, or the one of v2."""
    unified_owns_controllers: bool = False
    """Hybrid, and some controllers can only be used through cgroup2: crun refuses such hosts."""
    swap_limit: bool = False
    """Whether swap can be limited; setting a limit that the kernel does not know is an error."""


def parse_layout(mountinfo: str, unified_controllers: str, swap_limit: bool) -> CgroupLayout:
    """`unified_controllers` is the text of cgroup.controllers in the hybrid host's cgroup2 tree ("" = none)."""
    v1: list[str] = []
    v2: list[str] = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4] if before else ""
        match after.split(" ")[:1]:
            case ["cgroup"]:
                v1.append(point)
            case ["cgroup2"]:
                v2.append(point)
    if ROOT in v2:
        return CgroupLayout(CgroupMode.V2, (ROOT,), swap_limit=swap_limit)
    if UNIFIED in v2:
        owns = bool(unified_controllers.split())
        return CgroupLayout(CgroupMode.HYBRID, (*v1, UNIFIED), owns, swap_limit)
    return CgroupLayout(CgroupMode.V1, tuple(v1), swap_limit=swap_limit)


def read_layout() -> CgroupLayout:
    """The layout in this thread's mount namespace."""
    controllers = Path(UNIFIED, "cgroup.controllers")
    layout = parse_layout(
        Path("/proc/thread-self/mountinfo").read_text(),
        controllers.read_text() if controllers.exists() else "",
        swap_limit=False,
    )
    if layout.mode is CgroupMode.V2:
        # The root cgroup has no memory.swap.max; the kernel has it exactly when it accounts for swap.
        swap = Path("/proc/swaps").exists()
    else:
        swap = Path(ROOT, "memory/memory.memsw.limit_in_bytes").exists()
    return CgroupLayout(layout.mode, layout.hierarchies, layout.unified_owns_controllers, swap)


def default_driver(layout: CgroupLayout, asked: str) -> Driver:
    """The driver for `asked` ("", "cgroupfs" or "systemd"). Raises ValueError with the remedy."""
    match asked:
        case "" | "cgroupfs":
            return "cgroupfs"
        case "systemd" if Path("/run/systemd/system").exists() or layout.mode is CgroupMode.V2:
            return "systemd"
        case "systemd":
            raise ValueError("cgroup driver systemd: systemd does not run this host; use --cgroup-driver cgroupfs")
    raise ValueError(f"cgroup driver {asked!r} is unknown: use cgroupfs or systemd")


def cgroups_path(driver: Driver, parent: str, task_id: str) -> str:
    """The OCI field linux.cgroupsPath. With systemd, `parent` becomes a slice: /pyswarm/a -> pyswarm-a.slice."""
    if driver == "systemd":
        return f"{_slice(parent)}:pyswarm:{task_id}"
    return f"/{parent.strip('/')}/{task_id}"


def _slice(parent: str) -> str:
    return parent.strip("/").removesuffix(".slice").replace("/", "-") + ".slice"


def relative_dir(driver: Driver, parent: str, task_id: str) -> str:
    """The task's cgroup below each hierarchy's mount point."""
    if driver == "cgroupfs":
        return f"{parent.strip('/')}/{task_id}"
    # systemd nests a-b.slice inside a.slice.
    parts = _slice(parent).removesuffix(".slice").split("-")
    slices = ["-".join(parts[: count + 1]) + ".slice" for count in range(len(parts))]
    return "/".join([*slices, f"pyswarm-{task_id}.scope"])


def runtime_args(runtime: str, driver: Driver) -> tuple[str, ...]:
    """How the OCI runtime is told the driver."""
    if Path(runtime).name == "runc":
        return ("--systemd-cgroup",) if driver == "systemd" else ()
    return (f"--cgroup-manager={driver}",)


def oom_kills(layout: CgroupLayout, relative: str) -> int:
    """Processes of the cgroup that the kernel killed for want of memory; 0 when it is gone."""
    files = ("memory.events",) if layout.mode is CgroupMode.V2 else ("memory.oom_control",)
    for hierarchy in layout.hierarchies:
        for name in files:
            with contextlib.suppress(OSError):
                for line in Path(hierarchy, relative, name).read_text().splitlines():
                    key, _, value = line.partition(" ")
                    if key == "oom_kill":
                        return int(value)
    return 0


def remove(layout: CgroupLayout, relative: str) -> None:
    """Remove a task's cgroups that the runtime left behind; processes must be gone."""
    for hierarchy in layout.hierarchies:
        directory = Path(hierarchy, relative)
        if not directory.exists():
            continue
        for child in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                child.rmdir()
        with contextlib.suppress(OSError):
            directory.rmdir()
