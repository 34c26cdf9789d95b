"""What the operator decides about one daemon: read once at start, passed down as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line starts without protobuf
    from proto.objects_pb2 import GenericResource

DEFAULT_STATE_DIR = Path("/var/lib/pyswarm")
DEFAULT_RUN_DIR = Path("/run/pyswarm")
DEFAULT_CGROUP_PARENT = "/pyswarm"


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """Options of `pyswarm daemon`. Two daemons on one machine need different state and run directories."""

    state_dir: Path = DEFAULT_STATE_DIR
    """Survives a reboot: certificates, the Raft log, volumes, writable layers."""
    run_dir: Path = DEFAULT_RUN_DIR
    """Sockets, mounts and namespaces: meaningless after a reboot."""
    hostname: str = ""
    """"" = the kernel's host name."""
    cgroup_parent: str = DEFAULT_CGROUP_PARENT
    """Containers' cgroups are made below this path of each hierarchy."""
    image_stores: tuple[Path, ...] = ()
    """Further containers-storage directories, read-only, searched after the daemon's own."""
    insecure_registries: tuple[str, ...] = ()
    """host[:port] of registries spoken to over plain HTTP or with an unverified certificate."""
    generic_resources: tuple[GenericResource, ...] = ()
    """What tasks may reserve here, beside CPU and memory."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Told to the managers as engine.labels.KEY, for constraints and spread preferences."""
    runtime: str = "crun"
    """Name or path of the OCI runtime."""
    balancer: str = "auto"
    """auto | ipvs | nftables: what shares out connections to services. auto = IPVS where the kernel has it."""
    log_level: str = "info"
    """debug | info | warning | error"""
