"""Small checks that every kind of spec uses. Each raises Invalid, naming the field and the remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping

from swarm.errors import Invalid

NAME_MAX = 63
"""Names become DNS labels."""
LABELS_MAX = 1_000
_NAME = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]*[a-zA-Z0-9])?")


def name(kind: str, value: str) -> None:
    """A name as Docker allows it: it has to work as a part of a DNS name."""
    if not value:
        raise Invalid(f"{kind} name is empty: give it a name")
    if len(value) > NAME_MAX:
        raise Invalid(f"{kind} name {value!r} has {len(value)} characters: use at most {NAME_MAX}")
    if not _NAME.fullmatch(value):
        raise Invalid(
            f"invalid {kind} name {value!r}: use letters, digits, '_', '.' and '-', "
            "with a letter or digit at both ends (it becomes a DNS name)"
        )


def labels(field: str, values: Mapping[str, str]) -> None:
    """Keys are not empty, and there is an end to them."""
    if len(values) > LABELS_MAX:
        raise Invalid(f"{field}: {len(values)} labels: use at most {LABELS_MAX}")
    if any(not key.strip() for key in values):
        raise Invalid(f"{field}: a label has an empty name: write name=value")


def duration(field: str, seconds: float) -> None:
    """Not negative, and a number at all."""
    if not 0 <= seconds < float("inf"):
        raise Invalid(f"{field}: {seconds:g} s is not a duration: it must be 0 or more")


def choice(field: str, value: int, allowed: Mapping[str, int]) -> None:
    """Enumerations of protobuf let any number pass."""
    if value not in allowed.values():
        raise Invalid(f"{field}: unknown value {value}: use one of {', '.join(sorted(allowed))}")
