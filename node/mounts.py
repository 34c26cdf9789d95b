"""Mounts through the C library: overlay root filesystems, and the mount namespace that the agent lives in.

On a hybrid cgroup host (v1 beside a cgroup2 tree that owns controllers) crun refuses to run as long as it
sees that tree. The agent then moves into a mount namespace of its own without it. Its run directory is a
shared mount of both namespaces, so that what it mounts is seen outside, and by the next agent, which can
unmount it there as well.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

from node.cgroups import UNIFIED, CgroupLayout, read_layout

MS_NODEV, MS_NOSUID, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MS_SHARED = 4, 2, 8, 4096, 16384, 1 << 18, 1 << 20
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
CLONE_NEWNS = 0x20000

MOUNT_OPTIONS_BYTES_MAX = 4095
"""The kernel copies one page of mount options; a longer string is cut off silently."""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str | Path, fstype: str, flags: int, options: str = "") -> None:
    """mount(2). Raises OSError that names the target."""
    result = _libc.mount(
        source.encode(), os.fsencode(target), fstype.encode(), ctypes.c_ulong(flags), options.encode() or None
    )
    _check(result, f"mounting {fstype or source} on {target}")


def unmount(target: str | Path) -> None:
    """Unmount everything stacked on `target`; a busy one is detached lazily. Not mounted is fine."""
    path = os.fsencode(target)
    while True:
        if _libc.umount2(path, UMOUNT_NOFOLLOW) == 0:
            continue
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOENT):
            return
        if number != errno.EBUSY:
            raise OSError(number, f"unmounting {target}: {os.strerror(number)}")
        # Something still looks into a dead container (a shell in /proc/PID/root): let it, and move on.
        _check(_libc.umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW), f"detaching {target}")


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def mount_points(mountinfo: str) -> list[str]:
    """The mount points of a /proc/<pid>/mountinfo, in mounting order."""
    return [_unescape(line.split(" ")[4]) for line in mountinfo.splitlines() if line]


def is_shared(mountinfo: str, path: str) -> bool:
    """Whether the topmost mount on exactly `path` propagates to other namespaces."""
    found = [line for line in mountinfo.splitlines() if line and _unescape(line.split(" ")[4]) == path]
    return bool(found) and " shared:" in found[-1].partition(" - ")[0]


def own_mountinfo() -> str:
    # thread-self: a thread may live in another mount namespace than the process's first one.
    return Path("/proc/thread-self/mountinfo").read_text()


def unmount_tree(path: Path) -> None:
    """Unmount all below `path` and `path` itself, deepest first: the end of a host of the lab."""
    root = str(path.resolve())
    points = [point for point in mount_points(own_mountinfo()) if point == root or point.startswith(root + "/")]
    for point in reversed(points):
        unmount(point)


def needs_private_namespace(layout: CgroupLayout, runtime: str) -> bool:
    """Only crun minds a hybrid host; runc and pure v1 or v2 hosts need nothing."""
    return layout.unified_owns_controllers and runtime != "runc"


def prepare_mount_namespace(run_dir: Path, runtime: str = "crun") -> bool:
    """Call once when the agent starts, before it has threads. Returns whether a namespace was made.
    On pure v1 or v2 hosts it does nothing. A restarted agent calls it again and sees the mounts of the last one."""
    if not needs_private_namespace(read_layout(), runtime):
        return False
    run_dir.mkdir(parents=True, exist_ok=True)
    path = str(run_dir.resolve())
    if not is_shared(own_mountinfo(), path):
        mount(path, path, "", MS_BIND)
        mount("none", path, "", MS_SHARED)
    _check(_libc.unshare(CLONE_NEWNS), "making a mount namespace")
    # Private first: where the host shares it (systemd), unmounting would take it from the host too.
    mount("none", UNIFIED, "", MS_PRIVATE)
    _check(_libc.umount2(UNIFIED.encode(), MNT_DETACH), f"unmounting {UNIFIED}")
    return True


def _escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def overlay_options(layers: Sequence[str], upper: str, work: str) -> str:
    """Mount options of an overlay; `layers` topmost first."""
    lower = ":".join(map(_escape, layers))
    return f"lowerdir={lower},upperdir={_escape(upper)},workdir={_escape(work)}"


def mount_overlay(target: Path, layers: Sequence[Path], upper: Path, work: Path) -> None:
    """Mount a root filesystem. Raises OSError; ENAMETOOLONG when the layers' names do not fit in a page."""
    options = overlay_options([str(layer) for layer in layers], str(upper), str(work))
    if len(options) + len(",volatile") <= MOUNT_OPTIONS_BYTES_MAX:
        _mount_volatile(target, options)
        return
    # Descriptors have short names, whatever the layers are called.
    descriptors: list[int] = []
    try:
        descriptors.extend(os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for layer in layers)
        options = overlay_options([f"/proc/self/fd/{fd}" for fd in descriptors], str(upper), str(work))
        if len(options) + len(",volatile") > MOUNT_OPTIONS_BYTES_MAX:
            raise OSError(errno.ENAMETOOLONG, f"the image has {len(layers)} layers: more than one mount takes")
        _mount_volatile(target, options)
    finally:
        for fd in descriptors:
            os.close(fd)


def _mount_volatile(target: Path, options: str) -> None:
    # volatile: the writable layer never outlives its task, so nothing is gained by syncing it to the
    # disk, and unmounting a hundred of them does not wait for the disk.
    try:
        mount("overlay", target, "overlay", 0, options + ",volatile")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        mount("overlay", target, "overlay", 0, options)  # kernels before 5.10
