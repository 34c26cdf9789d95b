"""Generic resources: what a node offers under a name (GPUs, licences) and tasks reserve, only counted ("licences=4") or
named one by one ("gpu=UUID1"). A task gets the first that are free, in the order in which its node tells them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from proto.objects_pb2 import GenericResource

Claim = tuple[str, str]
"""Kind, and which one of it; "" = they are only counted."""
_KIND = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def is_kind(text: str) -> bool:
    """The name can stand in that of an environment variable, where containers find what they were given."""
    return _KIND.fullmatch(text) is not None


def left_of(offered: Iterable[GenericResource], held: Mapping[Claim, int]) -> dict[Claim, int]:
    """What of the offer is free; below 0 where more is held than there is."""
    left = {(resource.kind, resource.id): resource.count for resource in offered}
    for claim, count in held.items():
        left[claim] = left.get(claim, 0) - count
    return left


def free(left: Mapping[Claim, int], kind: str) -> int:
    return sum(max(0, count) for claim, count in left.items() if claim[0] == kind)


def covers(left: Mapping[Claim, int], wanted: Iterable[GenericResource]) -> bool:
    return all(free(left, resource.kind) >= resource.count for resource in wanted)


def take(left: dict[Claim, int], wanted: Iterable[GenericResource]) -> list[GenericResource]:
    """Take what is wanted off what is left, which covers it; returns what was taken."""
    taken: list[GenericResource] = []
    for resource in wanted:
        missing = resource.count
        for (kind, which), count in left.items():
            if kind == resource.kind and (some := min(missing, count)) > 0:
                left[kind, which] -= some
                missing -= some
                taken.append(GenericResource(kind=kind, count=some, id=which))
    return taken
