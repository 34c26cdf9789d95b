"""What a host remembers of its membership, and where everything of it lies.

`node.json` is small, holds no secret, and is replaced atomically: a host that lost power in the middle
of joining either is a member or is not.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Membership:
    node_id: str
    cluster_id: str
    advertise_host: str
    """Host or address without port that other nodes reach this one by."""
    listen_addr: str = "0.0.0.0:2377"
    """Join listener; the mTLS listener is on the next port."""
    data_path_addr: str = ""
    manager_addrs: tuple[str, ...] = ()
    """mTLS listeners of the managers, as last heard."""

    @property
    def listen_port(self) -> int:
        return int(self.listen_addr.rpartition(":")[2])

    @property
    def listen_host(self) -> str:
        return self.listen_addr.rpartition(":")[0]

    @property
    def manager_addr(self) -> str:
        """This node's own mTLS listener, as others dial it."""
        return f"{self.advertise_host}:{self.listen_port + 1}"

    @property
    def join_addr(self) -> str:
        return f"{self.advertise_host}:{self.listen_port}"

    def knowing(self, managers: tuple[str, ...]) -> Membership:
        return replace(self, manager_addrs=managers)


@dataclass(frozen=True, slots=True)
class HostPaths:
    state: Path
    run: Path

    @property
    def membership(self) -> Path:
        return self.state / "node.json"

    @property
    def certificates(self) -> Path:
        return self.state / "certificates"

    @property
    def raft(self) -> Path:
        return self.state / "raft"

    @property
    def daemon_socket(self) -> Path:
        return self.run / "pyswarm.sock"

    @property
    def manager_socket(self) -> Path:
        return self.run / "manager.sock"

    @property
    def manager_log(self) -> Path:
        return self.state / "manager.log"

    @property
    def dns_log(self) -> Path:
        return self.state / "dns.log"

    def make(self) -> None:
        """The directories, closed to other users: below them lie keys and writable layers."""
        for directory in (self.state, self.run):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o711)
        self.certificates.mkdir(mode=0o700, exist_ok=True)

    def load_membership(self) -> Membership | None:
        try:
            raw = json.loads(self.membership.read_text())
        except FileNotFoundError:
            return None
        return Membership(**{**raw, "manager_addrs": tuple(raw["manager_addrs"])})

    def save_membership(self, membership: Membership) -> None:
        write_atomically(self.membership, json.dumps(asdict(membership), indent=1).encode())

    def forget_membership(self) -> None:
        self.membership.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """The file has either its old or its new content after a crash at any instant."""
    temporary = path.with_name(f".{path.name}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
