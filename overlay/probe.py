"""What this machine's kernel can do for balancing, found by trying it in a namespace that is thrown away."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import lru_cache

from overlay import ipvs, nfnl, nft
from overlay.interface import Balancer, NetworkError
from overlay.netlink import NETLINK_GENERIC, NETLINK_NETFILTER, Netlink
from overlay.ruleset import layouts_text, task_layouts

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


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
    """Whether it raises nothing, in a namespace of its own."""
    found: list[bool] = []

    def run() -> None:
        try:
            if _libc.unshare(_CLONE_NEWNET) < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            attempt()
        except (NetworkError, OSError):
            found.append(False)
        else:
            found.append(True)

    thread = threading.Thread(target=run)  # its namespace ends with it
    thread.start()
    thread.join()
    return found[0]


def _load_egress_rule() -> None:
    (layout,) = task_layouts("nftables", ("127.0.0.11", 53), (), ("lo",))
    nft.run(layouts_text([layout], replace=False))
    with Netlink(NETLINK_NETFILTER) as netlink:
        rules = [
            nfnl.add_rule(layout.family, layout.table, chain.name, rule)
            for chain in layout.chains
            for rule in chain.raw
        ]
        netlink.transaction(nfnl.transaction(rules))


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
