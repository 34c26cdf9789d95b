"""Make a task's bundle: directories, the mounted root filesystem, its /etc files, config.json; and unmake it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from node import etcfiles, spec
from node.interface import CreateRequest, RuntimeFault
from node.mounts import mount_overlay, unmount
from node.resolvers import search_domains
from node.rootfs import Account, find_account, make_directory, read_small_file
from node.taskdir import TaskPaths
from proto.objects_pb2 import Device

_INIT_PROGRAMS = ("docker-init", "tini-static", "tini", "catatonit")
_INIT_PLACES = ("/usr/bin", "/usr/sbin", "/usr/libexec/docker", "/usr/libexec/podman", "/usr/local/bin")
TRANSIENT_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.EIO}
)


def fault_of(error: OSError, what: str) -> RuntimeFault:
    """Lack of something on the host may pass; the rest will not."""
    why = str(error) if not error.filename else f"{error.filename}: {error.strerror}"
    return RuntimeFault(f"{what}: {why}", permanent=error.errno not in TRANSIENT_ERRNOS)


def find_init() -> Path:
    """The init program to run as PID 1. Raises RuntimeFault when the host has none."""
    for place in _INIT_PLACES:
        for name in _INIT_PROGRAMS:
            if os.access(Path(place, name), os.X_OK):
                return Path(place, name)
    raise RuntimeFault(
        "the service wants an init process, but this host has none of docker-init, tini, catatonit: "
        "install one (apt install tini) or drop --init"
    )


def find_devices(devices: Iterable[Device]) -> tuple[spec.DeviceNode, ...]:
    """The host's device nodes of a spec. Raises RuntimeFault for one that this host does not have."""
    found: list[spec.DeviceNode] = []
    for device in devices:
        try:
            status = os.stat(device.host_path)
        except OSError as error:
            raise RuntimeFault(f"device {device.host_path}: {error.strerror} on this node") from None
        if not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise RuntimeFault(f"device {device.host_path}: it is no device on this node")
        found.append(
            spec.DeviceNode(
                path=device.container_path or device.host_path,
                kind="c" if stat.S_ISCHR(status.st_mode) else "b",
                major=os.major(status.st_rdev),
                minor=os.minor(status.st_rdev),
                mode=stat.S_IMODE(status.st_mode),
                uid=status.st_uid,
                gid=status.st_gid,
                access=device.permissions or "rwm",
            )
        )
    return tuple(found)


def available_caps() -> frozenset[str]:
    """What this process may give away."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            bits = int(line.split()[1], 16)
            return frozenset(name for number, name in enumerate(spec.ALL_CAPS) if bits >> number & 1)
    return frozenset()


def mount_rootfs(paths: TaskPaths, request: CreateRequest) -> None:
    """Mount the image with the task's writable layer. Repeating it is safe."""
    for directory in (paths.upper, paths.work, paths.etc, paths.logs, paths.rootfs, paths.exit_file.parent):
        directory.mkdir(parents=True, exist_ok=True)
    missing = [layer for layer in request.image.layers if not layer.is_dir()]
    if missing:
        raise RuntimeFault(
            f"image {request.spec.image}: layer {missing[0]} is gone from the store: pull the image again",
            permanent=False,
        )
    unmount(paths.rootfs)
    mount_overlay(paths.rootfs, request.image.layers, paths.upper, paths.work)


def write_etc(paths: TaskPaths, request: CreateRequest) -> tuple[tuple[Path, str], ...]:
    """Write /etc/hosts and its like; returns (host file, target)."""
    wanted = request.spec
    search = search_domains(wanted.dns_search)
    options = etcfiles.merge_options(tuple(wanted.dns_options), request.dns_options)
    if request.netns is None:
        # The host's network: its names and resolvers are the ones that work there.
        hosts = etcfiles.hosts_file(request.hostname, (), tuple(wanted.hosts), _host_file("/etc/hosts"))
        servers = tuple(wanted.dns_nameservers)
        resolv = etcfiles.resolv_conf(servers, search, options) if servers else _host_file("/etc/resolv.conf")
    else:
        hosts = etcfiles.hosts_file(request.hostname, request.addresses, tuple(wanted.hosts))
        resolv = etcfiles.resolv_conf(request.nameservers, search, options)
    files = {"hosts": hosts, "hostname": request.hostname + "\n", "resolv.conf": resolv}
    for name, text in files.items():
        (paths.etc / name).write_text(text)
    return tuple((paths.etc / name, f"/etc/{name}") for name in files)


def _host_file(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def account_of(paths: TaskPaths, request: CreateRequest) -> Account:
    """Who the process runs as. Raises RuntimeFault for an unknown name."""
    user = request.spec.user or request.image.config.user
    passwd = read_small_file(paths.rootfs, "/etc/passwd")
    group = read_small_file(paths.rootfs, "/etc/group")
    try:
        return find_account(user, tuple(request.spec.groups), passwd, group)
    except ValueError as error:
        raise RuntimeFault(f"image {request.spec.image}: {error}") from None


def write_config(paths: TaskPaths, request: CreateRequest, facts: spec.Facts) -> None:
    """config.json and the working directory."""
    config = spec.build(request, facts)
    cwd = str(config["process"]["cwd"])
    if not cwd.startswith("/"):
        raise RuntimeFault(f"working directory {cwd!r} must be an absolute path")
    try:
        make_directory(paths.rootfs, cwd)
    except OSError as error:
        raise fault_of(error, f"working directory {cwd}") from None
    paths.config.write_text(json.dumps(config))


def clear(paths: TaskPaths) -> None:
    """Unmount and delete all that belongs to a task. Repeating it is safe."""
    unmount(paths.rootfs)
    shutil.rmtree(paths.rootfs.parent, ignore_errors=True)
    paths.exit_file.unlink(missing_ok=True)
    if paths.state.is_dir():
        # The record goes last: until then an interrupted clearing is found and finished.
        for entry in paths.state.iterdir():
            if entry == paths.record:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        shutil.rmtree(paths.state)
