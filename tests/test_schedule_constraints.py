"""Placement constraints: what they accept, what they refuse and how they say so."""

from __future__ import annotations

import pytest

from proto import objects_pb2 as pb
from swarm.errors import Invalid
from swarm.schedule import fits, parse_constraint, parse_spread
from tests.simulated import node


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("node.role==manager", False),
        ("node.role == worker", True),
        ("node.role!=manager", True),
        ("node.hostname==N1", True),  # without regard to case
        ("node.id!=n1", False),
        ("node.labels.zone==east", True),
        ("node.labels.zone!=east", False),
        ("node.labels.rack!=7", True),  # a missing label is the empty text
        ("engine.labels.disk==ssd", True),
        ("node.platform.os==linux", True),
        ("node.platform.arch==amd64", True),  # Go's name for x86_64
        ("node.platform.arch==aarch64", False),
        ("node.ip==192.168.9.4", True),
        ("node.ip==192.168.0.0/16", True),
        ("node.ip!=192.168.9.0/24", False),
    ],
)
def test_a_constraint_matches(text: str, matches: bool) -> None:
    at = node("n1", labels={"zone": "east"})
    at.description.engine_labels["disk"] = "ssd"
    at.status.addr = "192.168.9.4"
    assert parse_constraint(text).matches(at) is matches


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("node.rol==x", "unknown key 'node.rol'; known keys are node.id, node.hostname"),
        ("node.role=worker", "write it as key==value"),
        ("node.role==", "write it as key==value"),
        ("", "write it as key==value"),
        ("node.role==boss", "node.role is manager or worker"),
        ("node.labels.==x", "unknown key"),
        ("node.ip==10.0.0.300", "neither an IP address nor a subnet"),
        ("node.hostname===x", "not a valid value"),
    ],
)
def test_a_refusal_names_the_expression(text: str, says: str) -> None:
    with pytest.raises(Invalid) as refused:
        parse_constraint(text)
    assert f"'{text}'" in str(refused.value)
    assert says in str(refused.value)


def test_spread_preferences_are_labels() -> None:
    assert parse_spread("node.labels.zone") == "node.labels.zone"
    with pytest.raises(Invalid, match=r"'node\.hostname'"):
        parse_spread("node.hostname")


def test_an_unreadable_constraint_in_the_store_fits_nowhere() -> None:
    assert not fits(node("n1"), pb.TaskSpec(placement=pb.Placement(constraints=["nonsense"])))


@pytest.mark.parametrize(
    ("os", "architecture", "fitting"),
    [
        ("linux", "amd64", True),
        ("", "x86_64", True),
        ("linux", "", True),
        ("linux", "arm64", False),
        ("windows", "", False),
    ],
)
def test_platforms(os: str, architecture: str, fitting: bool) -> None:
    """The reference's Platform."""
    spec = pb.TaskSpec(placement=pb.Placement(platforms=[pb.Platform(os=os, architecture=architecture)]))
    assert fits(node("n1"), spec) is fitting
