"""The only encoding between pysyncobj and bytes. It replaces the module `pickle` inside pysyncobj.

pysyncobj stores a command as one byte of type followed by a pickle. Here that pickle is a tag and plain bytes, for
exactly the two shapes that occur; everything else, above all a real pickle, is refused. `loads` never builds
anything but bytes, strings, lists and tuples of them.
"""

from __future__ import annotations

from typing import Any, NoReturn

from swarm.consensus import membership
from swarm.consensus.membership import MemberId

REGULAR, NO_OP, MEMBERSHIP = b"\x00", b"\x01", b"\x02"
_ENTRY, _ADD, _REMOVE = b"E", b"A", b"R"
_OPERATIONS = {_ADD: "add", _REMOVE: "rem"}
APPLY_METHOD = 0
"""pysyncobj's number of the one replicated method."""


class Refused(ValueError):
    """Bytes or an object that consensus never produces."""


def entry_command(payload: bytes) -> bytes:
    """A log entry that carries `payload` to the state machine."""
    return REGULAR + _ENTRY + payload


def membership_command(operation: str, name: MemberId) -> bytes:
    """A log entry that adds ("add") or removes ("rem") a member."""
    return MEMBERSHIP + dumps([operation, name])


def membership_change(command: bytes) -> tuple[str, MemberId] | None:
    """The change that a log entry makes, or None if it makes none."""
    if command[:1] != MEMBERSHIP:
        return None
    operation, name = loads(command[1:])
    return operation, name


def check_command(command: bytes) -> None:
    """Raises Refused unless every member could apply this command: nothing else may enter the log."""
    if command == NO_OP:
        return
    if command[:1] == REGULAR and command[1:2] == _ENTRY:
        return
    if command[:1] == MEMBERSHIP:
        loads(command[1:])
        return
    raise Refused(f"a log entry that starts with {command[:8]!r} is none of this program's")


def dumps(value: Any, protocol: object = None) -> bytes:
    """In pysyncobj's place for pickle.dumps: ["add" | "rem", member, ...]. Raises Refused for other shapes."""
    match value:
        case ["add", str(name), *_]:
            return _ADD + name.encode()
        case ["rem", str(name), *_]:
            return _REMOVE + name.encode()
    raise Refused(f"refusing to encode {type(value).__name__}: not a shape of the log")


def loads(data: bytes) -> Any:
    """In pysyncobj's place for pickle.loads: (method, [payload]) or ["add" | "rem", member].
    Raises Refused for anything else."""
    tag, rest = bytes(data[:1]), bytes(data[1:])
    if tag == _ENTRY:
        return APPLY_METHOD, [rest]
    if tag in _OPERATIONS:
        try:
            name = rest.decode()
            membership.member(name)
        except ValueError as error:
            raise Refused(f"membership entry names no member: {error}") from None
        return [_OPERATIONS[tag], name]
    raise Refused(f"refusing to decode bytes that start with {data[:8]!r}")


def dump(value: Any, file: Any, protocol: object = None) -> NoReturn:
    raise Refused("pysyncobj's own snapshots are not used")


def load(file: Any) -> NoReturn:
    raise Refused("pysyncobj's own snapshots are not used")


def to_bytes(data: bytes) -> bytes:
    return data
