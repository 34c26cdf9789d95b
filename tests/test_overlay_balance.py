"""Balancing by nftables, between three hosts."""

from __future__ import annotations

import pytest

from overlay.interface import Balancer

pytest.register_assert_rewrite("tests.balance_cases")
from tests.balance_cases import *  # noqa: E402, F403

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def balancer() -> Balancer:
    return "nftables"
