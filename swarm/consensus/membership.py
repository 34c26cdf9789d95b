"""Who belongs to the quorum. The log alone decides: members at its base, then every change in it, committed or not.

A member is written as "<node_id>@<host:port>", so the log itself holds the addresses.
"""

from __future__ import annotations

from collections.abc import Iterable

from swarm.consensus.interface import Member

MemberId = str
"""`"<node_id>@<host:port>"`: the kernel's name of a member."""


def member_id(member: Member) -> MemberId:
    return f"{member.node_id}@{member.addr}"


def member(name: MemberId) -> Member:
    """Raises ValueError when it has no node ID or no address."""
    node_id, at, addr = name.partition("@")
    if not (node_id and at and addr):
        raise ValueError(f"{name!r} is not <node_id>@<host:port>")
    return Member(node_id, addr)


def node_id_of(name: MemberId) -> str:
    return name.partition("@")[0]


def after(base: tuple[MemberId, ...], changes: Iterable[tuple[str, MemberId]]) -> tuple[MemberId, ...]:
    """The members after `changes`, each ("add" | "rem", member), in order of joining."""
    members = dict.fromkeys(base)
    for operation, name in changes:
        if operation == "add":
            members[name] = None
        else:
            members.pop(name, None)
    return tuple(members)
