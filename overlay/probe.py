"""What this machine's kernel can do for balancing, found by trying it in a namespace that is thrown away."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from overlay import ipvs
from overlay.interface import Balancer, NetworkError
from overlay.netlink import NETLINK_GENERIC, Netlink
from overlay.ruleset import task_layouts
from overlay.scratch import in_scratch
from overlay.template import make_template


@lru_cache(maxsize=1)
def answers_through_ingress() -> bool:
    """Whether tasks here can answer a published connection by the host that it came through: needs nf_tables' egress
    hook (Linux 5.16)."""
    return _works(_load_egress_rule)


@lru_cache(maxsize=1)
def has_ipvs() -> bool:
    """Asking makes the kernel load its module, if it has one."""
    return _works(_find_ipvs)


def _works(attempt: Callable[[], None]) -> bool:
    try:
        in_scratch(attempt)
    except (NetworkError, OSError):
        return False
    return True


def _load_egress_rule() -> None:
    make_template(task_layouts("nftables", ("127.0.0.11", 53), (), ("lo",)))


def _find_ipvs() -> None:
    with Netlink(NETLINK_GENERIC) as netlink:
        ipvs.family_id(netlink)


def choose_balancer(asked: str, has_ipvs: bool) -> Balancer:
    """Of "auto", "ipvs" or "nftables". Raises NetworkError when this kernel lacks what is asked."""
    if asked == "ipvs" and not has_ipvs:
        raise NetworkError(
            "--lb ipvs: this kernel has no IPVS (no module ip_vs); load it, or start the daemon with --lb nftables"
        )
    return "ipvs" if has_ipvs and asked != "nftables" else "nftables"
