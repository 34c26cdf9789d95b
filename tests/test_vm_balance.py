"""Balancing by IPVS, between three hosts, in the virtual machine: `make test-vm`."""

from __future__ import annotations

import os

import pytest

from overlay import ipvs
from overlay.interface import Balancer
from overlay.probe import has_ipvs
from tests.overlay_lab import OverlayLab

pytest.register_assert_rewrite("tests.balance_cases")
from tests.balance_cases import *  # noqa: E402, F403
from tests.balance_cases import PORTS, VIPS, audit, without, works  # noqa: E402

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(900),
    pytest.mark.skipif("PYSWARM_VM" not in os.environ, reason="runs inside the virtual machine: make test-vm"),
]


@pytest.fixture(scope="module")
def balancer() -> Balancer:
    assert has_ipvs()
    return "ipvs"


@pytest.mark.parametrize("place", ["task", "host"])
async def test_flushed_virtual_services_are_back_with_the_next_audit(lab: OverlayLab, place: str) -> None:
    lab.sockets.inside(lab.path("c1") if place == "task" else lab.hosts[0].netns, ipvs.flush)
    assert not works(lab)
    await audit(lab)
    assert works(lab)


async def test_a_change_right_after_a_flush_by_hand_is_made(lab: OverlayLab) -> None:
    for netns in (lab.path("c1"), lab.hosts[0].netns):
        lab.sockets.inside(netns, ipvs.flush)
    await lab.apply(*without("a2"))
    await lab.apply(VIPS, PORTS)
    assert works(lab)


async def test_a_daemon_with_the_other_balancer_takes_over(lab: OverlayLab) -> None:
    host = lab.hosts[0]
    balancers: tuple[Balancer, ...] = ("nftables", "ipvs")
    for balancer in balancers:
        host.balancer = balancer
        host.again()
        await lab.apply(VIPS, PORTS)
        assert works(lab)
        for netns in (host.netns, lab.path("c1")):
            assert lab.sockets.inside(netns, ipvs.any_here) == (balancer == "ipvs")
