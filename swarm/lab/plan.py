"""Pure: what a lab consists of. Names of links and namespaces follow from the lab's and the host's name,
so that everything of a lab can be found again from its name alone."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

STATE_ROOT = Path("/var/lib/pyswarm/lab")
RUN_ROOT = Path("/run/pyswarm/lab")
CGROUP_ROOT = "/pyswarm-lab"
SUBNETS = tuple(ipaddress.ip_network(f"192.168.{third}.0/24") for third in range(200, 250))
"""One per lab; the first that nothing on the machine uses."""
FIRST_HOST = 11
HOSTS_MAX = 200
NAME = re.compile(r"[a-z][a-z0-9-]{0,19}\Z")
DEFAULT_NAME = "lab"


def _short(*parts: str) -> str:
    """Eight hex digits: interface names hold 15 characters, names of labs and hosts do not fit."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class Host:
    lab: str
    name: str
    address: str
    """On the underlay, no prefix length."""
    manager: bool

    @property
    def netns(self) -> str:
        return f"pyl-{self.lab}-{self.name}"

    @property
    def netns_path(self) -> Path:
        return Path("/run/netns") / self.netns

    @property
    def link(self) -> str:
        """The machine's end of the host's cable."""
        return f"pyl{_short(self.lab, self.name)}"

    @property
    def state_dir(self) -> Path:
        return STATE_ROOT / self.lab / self.name

    @property
    def run_dir(self) -> Path:
        return RUN_ROOT / self.lab / self.name

    @property
    def uts_path(self) -> Path:
        return RUN_ROOT / self.lab / f"{self.name}.uts"

    @property
    def socket(self) -> Path:
        return self.run_dir / "pyswarm.sock"

    @property
    def log(self) -> Path:
        return self.state_dir / "daemon.log"

    @property
    def cgroup(self) -> str:
        return f"{CGROUP_ROOT}/{self.lab}/{self.name}"


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    subnet: str
    hosts: tuple[Host, ...]
    insecure_registries: tuple[str, ...] = ()
    """What every daemon gets as --insecure-registry."""
    generic_resources: tuple[str, ...] = ()
    """What every daemon gets as --node-generic-resource."""

    @property
    def bridge(self) -> str:
        return f"pyl{_short(self.name)}"

    @property
    def gateway(self) -> str:
        """The machine's own address on the underlay."""
        return str(next(ipaddress.ip_network(self.subnet).hosts()))

    @property
    def prefix_bits(self) -> int:
        return ipaddress.ip_network(self.subnet).prefixlen

    @property
    def nft_table(self) -> str:
        return f"pyl_{_short(self.name)}"

    @property
    def state_dir(self) -> Path:
        return STATE_ROOT / self.name

    @property
    def run_dir(self) -> Path:
        return RUN_ROOT / self.name

    def host(self, name: str) -> Host | None:
        return next((host for host in self.hosts if host.name == name), None)


def wanted_hosts(lab: str, subnet: str, managers: int, workers: int) -> tuple[Host, ...]:
    """m1, m2, ... then w1, w2, ...; workers' addresses start at .101, so that a lab can grow."""
    base = ipaddress.ip_network(subnet).network_address
    names = [(f"m{i}", FIRST_HOST + i - 1, True) for i in range(1, managers + 1)]
    names += [(f"w{i}", 100 + i, False) for i in range(1, workers + 1)]
    return tuple(Host(lab, name, str(base + offset), manager) for name, offset, manager in names)


def free_subnet(used: Iterable[str]) -> str | None:
    """The first of SUBNETS that overlaps none of the machine's routes and addresses."""
    taken = [ipaddress.ip_network(item, strict=False) for item in used]
    for subnet in SUBNETS:
        if not any(subnet.overlaps(other) for other in taken if other.version == 4 and other.prefixlen):
            return str(subnet)
    return None


def partition_rules(host: Host, others: Sequence[Host]) -> str:
    """An nftables table that makes `host` deaf and mute towards `others`."""
    addresses = ", ".join(other.address for other in others)
    return f"""
table ip pyl_partition {{
  chain in {{ type filter hook prerouting priority -350; ip saddr {{ {addresses} }} drop; }}
  chain out {{ type filter hook output priority -350; ip daddr {{ {addresses} }} drop; }}
}}
"""
