"""--mount, Docker's comma-separated form. Pure."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable

from proto.objects_pb2 import Device, Mount, ServiceSpec
from swarm.cli.units import parse_bool, parse_bytes
from swarm.errors import Invalid

TYPES: dict[str, Mount.Type.ValueType] = {"bind": Mount.BIND, "volume": Mount.VOLUME, "tmpfs": Mount.TMPFS}
PROPAGATIONS = ("rprivate", "private", "rshared", "shared", "rslave", "slave")
UNSUPPORTED = {
    "volume-driver": "only the built-in driver exists",
    "volume-opt": "only the built-in driver exists, and it has no options",
    "volume-label": "volumes have no labels yet",
    "volume-subpath": "a volume is mounted whole",
    "bind-nonrecursive": "binds are recursive",
    "bind-recursive": "binds are recursive",
    "bind-create-host-path": "the path must exist on the node",
    "tmpfs-options": "use tmpfs-size and tmpfs-mode",
}
_ONLY_FOR = {
    "bind-propagation": Mount.BIND,
    "volume-nocopy": Mount.VOLUME,
    "volume-per-slot": Mount.VOLUME,
    "tmpfs-size": Mount.TMPFS,
    "tmpfs-mode": Mount.TMPFS,
}


def csv_fields(text: str) -> list[tuple[str, str]]:
    """ "a=b,c" -> [("a", "b"), ("c", "")], quoting as in CSV; keys in lower case."""
    fields = next(csv.reader([text], strict=True), [])
    return [(key.strip().lower(), value) for key, _, value in (field.partition("=") for field in fields)]


def parse_mount(text: str, flag: str = "--mount") -> Mount:
    """ "type=bind,source=/srv,target=/data,readonly". The type is volume unless given. Raises Invalid."""
    try:
        return _parse(text)
    except (Invalid, csv.Error) as error:
        raise Invalid(f'invalid value "{text}" for {flag}: {error}') from None


def parse_volume_per_slot(text: str, flag: str = "--volume-per-slot") -> Mount:
    """ "data:/var/lib/data": slot 3 has the volume data.3 there. Raises Invalid."""
    source, _, target = text.partition(":")
    if not source or "/" in source or not target.startswith("/"):
        raise Invalid(f'invalid value "{text}" for {flag}: write NAME:TARGET, such as data:/var/lib/data')
    return Mount(type=Mount.VOLUME, source=source, target=target, per_slot=True)


def parse_device(text: str, flag: str = "--device") -> Device:
    """ "/dev/fuse", "/dev/sda:/dev/disk" or "/dev/sda:/dev/disk:r". Raises Invalid."""
    host, _, rest = text.partition(":")
    container, _, permissions = rest.partition(":")
    if re.fullmatch("[rwm]+", container):
        container, permissions = "", container
    if not host.startswith("/") or container[:1] not in ("", "/") or not re.fullmatch("[rwm]*", permissions):
        raise Invalid(f'invalid value "{text}" for {flag}: write HOST[:CONTAINER[:rwm]], such as /dev/fuse')
    return Device(host_path=host, container_path=container, permissions=permissions)


def refuse_missing_binds(spec: ServiceSpec, exists: Callable[[str], bool]) -> None:
    """A bind's source must exist where its tasks run, or they are all rejected. Without a constraint tasks run
    anywhere, so also here, where `exists` can look; with one, only the node can tell. Raises Invalid."""
    if spec.task.placement.constraints:
        return
    for mount in spec.task.container.mounts:
        if mount.type == Mount.BIND and not exists(mount.source):
            raise Invalid(
                f'invalid mount config for type "bind": bind source path does not exist: {mount.source} on this host '
                "(create it on every node, or say with --constraint which nodes have it)"
            )


def _parse(text: str) -> Mount:
    mount = Mount(type=Mount.VOLUME)
    given: set[str] = set()
    for key, value in csv_fields(text):
        given.add(key)
        _set_field(mount, key, value)
    if not mount.target:
        raise Invalid("target=PATH is missing")
    if not mount.target.startswith("/"):
        raise Invalid(f"the target {mount.target} must be an absolute path")
    if mount.type == Mount.BIND and not mount.source.startswith("/"):
        raise Invalid("a bind needs source=PATH, an absolute path on the node")
    if mount.type == Mount.TMPFS and mount.source:
        raise Invalid("a tmpfs has no source")
    for key, kind in _ONLY_FOR.items():
        if key in given and mount.type != kind:
            raise Invalid(f"{key} is only for type={Mount.Type.Name(kind).lower()}")
    return mount


def _set_field(mount: Mount, key: str, value: str) -> None:
    match key:
        case "type":
            if value not in TYPES:
                raise Invalid(f'type "{value}" is not known; choose {", ".join(TYPES)}')
            mount.type = TYPES[value]
        case "source" | "src":
            mount.source = value
        case "target" | "dst" | "destination":
            mount.target = value
        case "readonly" | "ro":
            mount.read_only = parse_bool(value or "true")
        case "volume-nocopy":
            mount.no_copy = parse_bool(value or "true")
        case "volume-per-slot":
            mount.per_slot = parse_bool(value or "true")
        case "bind-propagation":
            if value not in PROPAGATIONS:
                raise Invalid(f'bind-propagation "{value}" is not known; choose {", ".join(PROPAGATIONS)}')
            mount.propagation = value
        case "tmpfs-size":
            mount.tmpfs_size_bytes = parse_bytes(value)
        case "tmpfs-mode":
            try:
                mount.tmpfs_mode = int(value, 8)
            except ValueError:
                raise Invalid(f'tmpfs-mode "{value}" is not an octal number such as 1770') from None
        case "consistency":
            pass  # a Docker Desktop hint: without meaning on Linux, where dockerd ignores it too
        case _ if key in UNSUPPORTED:
            raise Invalid(f"{key} is not supported: {UNSUPPORTED[key]}")
        case _:
            raise Invalid(f'unknown field "{key}"')
