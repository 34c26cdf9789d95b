"""Balancing by IPVS, between three hosts, in the virtual machine: `make test-vm`."""

from __future__ import annotations

import os

import pytest

from overlay.interface import Balancer
from overlay.probe import has_ipvs

pytest.register_assert_rewrite("tests.balance_cases")
from tests.balance_cases import *  # noqa: E402, F403

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(900),
    pytest.mark.skipif("PYSWARM_VM" not in os.environ, reason="runs inside the virtual machine: make test-vm"),
]


@pytest.fixture(scope="module")
def balancer() -> Balancer:
    assert has_ipvs()
    return "ipvs"
