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


async def test_a_restarted_agent_finds_its_tables_as_it_left_them(lab: OverlayLab) -> None:
    places = [lab.hosts[0].netns, lab.path("c1"), lab.path("a2")]

    def listed() -> list[str]:
        """With handles: a table that was laid anew has others."""
        return [lab.sockets.run(netns, "nft", "-a", "list", "ruleset").stdout for netns in places]

    before = listed()
    for host in lab.hosts:
        host.again()
    await lab.apply(VIPS, PORTS)
    assert listed() == before


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
