"""Placement constraints: `node.labels.zone==a`, `node.role!=manager`. Exact comparison without regard to case;
a label that a node does not have equals the empty text; `node.ip` also takes a subnet (`10.0.0.0/8`)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from proto import objects_pb2 as pb
from proto.objects_pb2 import Node
from swarm.errors import Invalid

_FORM = re.compile(r"^\s*(?P<key>[^=!\s]+)\s*(?P<operator>==|!=)\s*(?P<value>.+?)\s*$")
_VALUE = re.compile(r"^[a-zA-Z0-9:\-_\s.*()?+\[\]\\^$|/]+$")
_LABEL = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9._\-/]*$")

_READERS: dict[str, Callable[[Node], str]] = {
    "node.id": lambda node: node.id,
    "node.hostname": lambda node: node.description.hostname,
    "node.ip": lambda node: node.status.addr or node.advertise_host,
    "node.role": lambda node: "manager" if node.role == pb.MANAGER else "worker",
    "node.platform.os": lambda node: node.description.platform.os,
    "node.platform.arch": lambda node: node.description.platform.architecture,
}
_LABEL_READERS: dict[str, Callable[[Node, str], str]] = {
    "node.labels.": lambda node, name: node.spec.annotations.labels.get(name, ""),
    "engine.labels.": lambda node, name: node.description.engine_labels.get(name, ""),
}
_KNOWN = ", ".join((*_READERS, *(prefix + "<label>" for prefix in _LABEL_READERS)))
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
"""Go's names of architectures, which Docker's users write, as uname -m says them."""


@dataclass(frozen=True, slots=True)
class Constraint:
    key: str
    equal: bool
    """True for `==`, False for `!=`."""
    value: str

    def matches(self, node: Node) -> bool:
        actual = read_key(self.key, node)
        if self.key == "node.ip":
            return _same_address(actual, self.value) is self.equal
        wanted = self.value.lower()
        if self.key == "node.platform.arch":
            actual, wanted = machine(actual), machine(wanted)
        return (actual.lower() == wanted) is self.equal


@lru_cache(maxsize=4096)  # expressions are few and the same ones are asked for with each node
def parse_constraint(text: str) -> Constraint:
    """The constraint in `text`. Raises Invalid, which names the expression, what is wrong and what is known."""
    found = _FORM.match(text)
    if found is None:
        raise Invalid(f"invalid constraint '{text}': write it as key==value or key!=value, e.g. node.role==worker")
    key, value = found["key"], found["value"]
    _check_key(text, key)
    if not _VALUE.match(value) or value.startswith("="):
        raise Invalid(f"invalid constraint '{text}': '{value}' is not a valid value")
    if key == "node.role" and value.lower() not in ("manager", "worker"):
        raise Invalid(f"invalid constraint '{text}': node.role is manager or worker")
    if key == "node.ip":
        try:
            ipaddress.ip_network(value, strict=False)
        except ValueError:
            raise Invalid(f"invalid constraint '{text}': '{value}' is neither an IP address nor a subnet") from None
    return Constraint(key, found["operator"] == "==", value)


def parse_spread(text: str) -> str:
    """The label key of a spread preference, `node.labels.zone` or `engine.labels.rack`. Raises Invalid."""
    for prefix in _LABEL_READERS:
        if text.startswith(prefix) and _LABEL.match(text[len(prefix) :]):
            return text
    raise Invalid(f"invalid placement preference '{text}': spread over node.labels.<label> or engine.labels.<label>")


def read_key(key: str, node: Node) -> str:
    """What the node has under a constraint's key; "" for a label it does not have."""
    reader = _READERS.get(key)
    if reader is not None:
        return reader(node)
    for prefix, label_reader in _LABEL_READERS.items():
        if key.startswith(prefix):
            return label_reader(node, key[len(prefix) :])
    return ""


def machine(architecture: str) -> str:
    """One name per architecture, whoever wrote it."""
    return _MACHINES.get(architecture.lower(), architecture.lower())


def _check_key(text: str, key: str) -> None:
    if key in _READERS:
        return
    for prefix in _LABEL_READERS:
        if key.startswith(prefix) and _LABEL.match(key[len(prefix) :]):
            return
    raise Invalid(f"invalid constraint '{text}': unknown key '{key}'; known keys are {_KNOWN}")


def _same_address(actual: str, wanted: str) -> bool:
    try:
        return ipaddress.ip_address(actual) in ipaddress.ip_network(wanted, strict=False)
    except ValueError:
        return False
