"""Fixtures that more than one module uses."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

import swarm  # noqa: F401 - first: it pins TLS 1.3, which must happen before grpc is imported
from tests.labs import LAB_PREFIX, Lab, keep_logs, lab_up, load_web_image

# Machines that run tests are shared: how long one example takes says nothing about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ[LAB_PREFIX] = f"{os.environ.get(LAB_PREFIX, '')}{worker}-"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the kernel is skipped, with the reason, where there is no root."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root") or item.get_closest_marker("lab"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(scope="session")
def web_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The web image in the machine's store; returns its name."""
    load_web_image(tmp_path_factory.mktemp("image"))
    return "pyswarm/web:1"


@pytest.fixture(scope="module")
def cluster(web_image: str, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Three managers and two workers, shared by the tests of one module."""
    failed_before = request.session.testsfailed
    with lab_up("test", 3, 2) as made:
        yield made
        if request.session.testsfailed > failed_before:
            print(f"logs of the hosts: {keep_logs(made)}")
