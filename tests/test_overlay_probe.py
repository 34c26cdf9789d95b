"""What the kernel is found to be able to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from overlay import probe
from overlay.interface import NetworkError


@pytest.mark.parametrize(
    ("asked", "has_ipvs", "chosen"),
    [
        ("auto", True, "ipvs"),
        ("auto", False, "nftables"),
        ("nftables", True, "nftables"),
        ("nftables", False, "nftables"),
        ("ipvs", True, "ipvs"),
    ],
)
def test_the_balancer_is_what_was_asked_or_the_kernel_has(asked: str, has_ipvs: bool, chosen: str) -> None:
    assert probe.choose_balancer(asked, has_ipvs) == chosen


def test_ipvs_is_refused_where_the_kernel_has_none() -> None:
    with pytest.raises(NetworkError, match=r"--lb ipvs: this kernel has no IPVS.*--lb nftables"):
        probe.choose_balancer("ipvs", has_ipvs=False)


@pytest.mark.root
def test_probing_finds_the_egress_hook_and_leaves_nothing() -> None:
    before = Path("/proc/self/ns/net").readlink()
    assert probe.answers_through_ingress()
    assert probe.has_ipvs() == Path("/proc/net/ip_vs").exists()
    assert Path("/proc/self/ns/net").readlink() == before
