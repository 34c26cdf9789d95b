"""Generic resources as text: what a node offers, what a service asks for. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from proto.objects_pb2 import GenericResource
from swarm.cli.units import parse_uint
from swarm.errors import Invalid

OFFERED_MAX = 1_000
"""Of one node: every manager holds each node's description in memory."""
NAME_LENGTH_MAX = 255
COUNT_MAX = 1_000_000_000


def parse_offered(texts: Iterable[str], flag: str) -> list[GenericResource]:
    """ "gpu=GPU1", "gpu=GPU2", "licences=4": a number alone counts, else each is named. Raises Invalid."""
    values: dict[str, list[str]] = {}
    for kind, value in _pairs(texts, flag):
        values.setdefault(kind, []).append(value)
    offered: list[GenericResource] = []
    for kind, names in values.items():
        if len(names) == 1 and names[0].isdecimal():
            offered.append(GenericResource(kind=kind, count=_count(names[0], flag)))
        elif any(name.isdecimal() for name in names):
            raise Invalid(f"--{flag}: {kind} is either counted ({kind}=2) or named ({kind}=A, {kind}=B), not both")
        elif len(set(names)) < len(names):
            raise Invalid(f"--{flag}: {kind} has the same name twice: each is given to one task at a time")
        else:
            offered.extend(GenericResource(kind=kind, count=1, id=name) for name in names)
    if len(offered) > OFFERED_MAX:
        raise Invalid(f"--{flag}: {len(offered)} resources: a node offers at most {OFFERED_MAX}")
    return offered


def parse_wanted(texts: Iterable[str], flag: str) -> list[GenericResource]:
    """ "gpu=2,licences=1". Raises Invalid."""
    wanted = []
    for kind, value in _pairs(texts, flag):
        if not value.isdecimal():
            raise Invalid(f'invalid value "{kind}={value}" for --{flag}: write KIND=NUMBER: which ones, a node chooses')
        wanted.append(GenericResource(kind=kind, count=_count(value, flag)))
    return wanted


def _count(text: str, flag: str) -> int:
    try:
        return parse_uint(text, 0, COUNT_MAX)
    except Invalid as error:
        raise Invalid(f"--{flag}: {error}") from None


def _pairs(texts: Iterable[str], flag: str) -> Iterable[tuple[str, str]]:
    from swarm.schedule.generic import is_kind

    for text in texts:
        for part in text.split(","):
            kind, _, value = part.strip().partition("=")
            if not is_kind(kind) or not value or len(value) > NAME_LENGTH_MAX or not value.isprintable():
                raise Invalid(f'invalid value "{text}" for --{flag}: write KIND=VALUE, such as gpu=2')
            yield kind, value


def shown(resources: Iterable[GenericResource]) -> str:
    """ "gpu=GPU1, gpu=GPU2, licences=4"."""
    return ", ".join(f"{resource.kind}={resource.id or resource.count}" for resource in resources)
