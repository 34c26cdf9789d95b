"""Balancing by nftables, between three hosts."""

from __future__ import annotations

import pytest

from overlay.interface import Balancer
from tests.balance_cases import *  # noqa: F403

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def balancer() -> Balancer:
    return "nftables"
