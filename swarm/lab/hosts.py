"""One host of a lab: its namespaces, its cable to the underlay, its daemon, and every process of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from swarm.lab.plan import Host, Plan
from swarm.lab.shell import LabError, ip_batch, run, succeeds

MNT_DETACH = 2  # linux/fs.h
GONE_TIMEOUT_S = 10.0
POLL_S = 0.02
IMAGE_STORE = "/var/lib/containers/storage"
"""The machine's image store (podman's, buildah's, skopeo's): every host reads it, none writes it."""

_libc = ctypes.CDLL(None, use_errno=True)


def plug_in(plan: Plan, host: Host) -> None:
    """Namespace, cable and address; what exists stays."""
    if host.netns_path.exists():
        return
    run("ip", "netns", "add", host.netns)
    ip_batch(
        [
            f"link add {host.link} type veth peer name eth0 netns {host.netns}",
            f"link set {host.link} master {plan.bridge} up",
        ]
    )
    ip_batch(
        [
            "link set lo up",
            f"addr add {host.address}/{plan.prefix_bits} dev eth0",
            "link set eth0 up",
            f"route add default via {plan.gateway}",
        ],
        "-n",
        host.netns,
    )
    host.run_dir.mkdir(parents=True, exist_ok=True)
    host.state_dir.mkdir(parents=True, exist_ok=True)
    host.uts_path.touch()
    run("unshare", f"--uts={host.uts_path}", "hostname", host.name)


def entering(host: Host) -> list[str]:
    """The words that run what follows as if on that host."""
    return ["nsenter", f"--net={host.netns_path}", f"--uts={host.uts_path}", "--"]


def start_daemon(plan: Plan, host: Host) -> None:
    """Start the host's daemon, detached, unless it runs; a manager that outlived its agent is left alone."""
    if any(_is_agent(host, _words(pid)) for pid in host_pids(host)):
        return
    argv = [sys.executable, "-m", "swarm.cli.main", "daemon"]
    argv += ["--state-dir", str(host.state_dir), "--run-dir", str(host.run_dir)]
    argv += ["--cgroup-parent", host.cgroup, "--image-store", IMAGE_STORE]
    argv += [word for registry in plan.insecure_registries for word in ("--insecure-registry", registry)]
    argv += [word for resource in plan.generic_resources for word in ("--node-generic-resource", resource)]
    host.state_dir.mkdir(parents=True, exist_ok=True)
    with open(host.log, "ab") as log:
        subprocess.Popen(
            [*entering(host), *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def host_pids(host: Host) -> list[int]:
    """Every process in the host's network namespace, and every process in its tasks' cgroups."""
    try:
        inode = host.netns_path.stat().st_ino
    except FileNotFoundError:
        inode = -1
    found = []
    for pid in _processes():
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}/ns/net").st_ino == inode or f"{host.cgroup}/" in _read(f"/proc/{pid}/cgroup"):
                found.append(pid)
    return [pid for pid in found if pid != os.getpid()]


def daemon_pids(host: Host) -> list[int]:
    """The agent's and the manager's process, as `lab kill` means "the daemon"."""
    found = []
    for pid in host_pids(host):
        words = _words(pid)
        if _is_agent(host, words) or "swarm.manager" in words:
            found.append(pid)
    return found


def _is_agent(host: Host, words: Sequence[str]) -> bool:
    return "daemon" in words and str(host.run_dir) in words


def _words(pid: int) -> list[str]:
    """The command line; empty once the process has ended."""
    try:
        return _read(f"/proc/{pid}/cmdline").split("\0")
    except OSError:
        return []


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def kill(pids: Sequence[int], number: signal.Signals) -> None:
    """Signal them and, for a signal that ends processes, wait until all are gone. Raises LabError."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    if number not in (signal.SIGKILL, signal.SIGTERM):
        return
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise LabError(f"processes {[pid for pid in pids if _alive(pid)]} did not end within {GONE_TIMEOUT_S:g} s")
        time.sleep(POLL_S)


def _alive(pid: int) -> bool:
    try:
        return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pull_plug(host: Host) -> None:
    """What loss of power does: every process, mount, namespace and rule of the host is gone; its disk stays."""
    for _ in range(20):  # a conmon may just be forking: look again until nobody is left
        pids = host_pids(host)
        if not pids:
            break
        kill(pids, signal.SIGKILL)
    unmount_below(host.run_dir)
    shutil.rmtree(host.run_dir, ignore_errors=True)
    if host.netns_path.exists():
        run("ip", "netns", "del", host.netns)
    succeeds("ip", "link", "del", host.link)  # usually gone with its other end, which was in the namespace
    if host.uts_path.exists():
        _libc.umount2(str(host.uts_path).encode(), MNT_DETACH)
        host.uts_path.unlink()
    remove_cgroups(host.cgroup)


def unmount_below(directory: Path) -> None:
    """Every mount at or below the directory, deepest first."""
    points = [line.split()[4].replace("\\040", " ") for line in _read("/proc/self/mountinfo").splitlines()]
    below = [point for point in points if point == str(directory) or point.startswith(f"{directory}/")]
    for point in reversed(below):
        _libc.umount2(point.encode(), MNT_DETACH)


def remove_cgroups(path: str) -> None:
    """The cgroup and all below it, in every hierarchy of v1 and in v2."""
    for root in Path("/sys/fs/cgroup").glob("*"):
        top = root / path.lstrip("/")
        if top.is_dir() and not root.is_symlink():
            _remove_tree(top)
    top = Path("/sys/fs/cgroup") / path.lstrip("/")
    if top.is_dir():
        _remove_tree(top)


def _remove_tree(top: Path) -> None:
    for directory, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
