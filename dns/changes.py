"""Pure: what turns one picture into the next, and a digest by which agent and server know that they have the same.

The digest is the sum of the hashes of all parts, so that a change costs what it changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from dns.interface import NetworkNames, Picture, Sandbox, ServiceNames, TaskNames

DIGEST_BYTES = 16
_WRAP = 1 << 8 * DIGEST_BYTES

Part = NetworkNames | ServiceNames | TaskNames | Sandbox | tuple[str, ...]
T = TypeVar("T", ServiceNames, TaskNames)


@dataclass(frozen=True, slots=True)
class NetworkChange:
    network_id: str
    names: NetworkNames
    """New or changed services and tasks only; each replaces the one with the same first name."""
    gone_services: tuple[str, ...] = ()
    gone_tasks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    base: int | None
    """Digest of the picture on top of which they are; None = of nothing, everything known is replaced."""
    digest: int
    """Of the picture after them."""
    networks: tuple[NetworkChange, ...] = ()
    gone_networks: tuple[str, ...] = ()
    sandboxes: tuple[Sandbox, ...] = ()
    gone_sandboxes: tuple[str, ...] = ()
    upstreams: tuple[str, ...] = ()


def fields_of(part: Part) -> tuple[object, ...]:
    """Of a network only what is its own: services and tasks are parts of their own."""
    match part:
        case ServiceNames():
            return part.names, part.vip, part.task_addresses, part.vip6, part.ports
        case TaskNames():
            return part.names, part.address, part.address6
        case NetworkNames():
            return part.network_id, part.name, part.internal
        case Sandbox():
            return part.task_id, part.netns_path, part.network_ids, part.upstreams, part.search
    return part


def hash_of(part: Part, network_id: str = "") -> int:
    text = f"{type(part).__name__} {network_id} {fields_of(part)}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest(), "big")


EMPTY_DIGEST = hash_of(Picture().upstreams)


def moved(digest: int, gone: Iterable[int], come: Iterable[int]) -> int:
    return (digest + sum(come) - sum(gone)) % _WRAP


def digest_of(picture: Picture) -> int:
    return difference(Picture(), picture, EMPTY_DIGEST).digest


def whole(picture: Picture, digest: int) -> Changes:
    """`digest`: of this picture."""
    networks = tuple(NetworkChange(network.network_id, network) for network in picture.networks)
    return Changes(None, digest, networks, sandboxes=picture.sandboxes, upstreams=picture.upstreams)


def difference(before: Picture, after: Picture, digest: int) -> Changes:
    """`digest`: of the picture before."""
    known = {network.network_id: network for network in before.networks}
    boxes = {box.task_id: box for box in before.sandboxes}
    networks: list[NetworkChange] = []
    gone: list[int] = [hash_of(before.upstreams)]
    come: list[int] = [hash_of(after.upstreams)]
    for network in after.networks:
        old = known.pop(network.network_id, None)
        if old is network:
            continue
        if old is None or (old.name, old.internal) != (network.name, network.internal):
            if old is not None:
                gone += _all_hashes(old)
            come += _all_hashes(network)
            networks.append(NetworkChange(network.network_id, network))
            continue
        services, gone_services = _moves(old.services, network.services, network.network_id, gone, come)
        tasks, gone_tasks = _moves(old.tasks, network.tasks, network.network_id, gone, come)
        if services or tasks or gone_services or gone_tasks:
            changed = replace(network, services=services, tasks=tasks)
            networks.append(NetworkChange(network.network_id, changed, gone_services, gone_tasks))
    for network in known.values():
        gone += _all_hashes(network)
    # Identity first: comparing hundreds of boxes that are the same would take most of the time.
    sandboxes = tuple(
        box for box in after.sandboxes if (old_box := boxes.get(box.task_id)) is not box and old_box != box
    )
    left = boxes.keys() - {box.task_id for box in after.sandboxes}
    come += map(hash_of, sandboxes)
    gone += (hash_of(boxes[task_id]) for task_id in left | (boxes.keys() & {box.task_id for box in sandboxes}))
    return Changes(
        base=digest,
        digest=moved(digest, gone, come),
        networks=tuple(networks),
        gone_networks=tuple(known),
        sandboxes=sandboxes,
        gone_sandboxes=tuple(sorted(left)),
        upstreams=after.upstreams,
    )


def _all_hashes(network: NetworkNames) -> list[int]:
    parts: tuple[Part, ...] = (network, *network.services, *network.tasks)
    return [hash_of(part, network.network_id) for part in parts]


def _moves(
    before: Iterable[T], after: Iterable[T], network_id: str, gone: list[int], come: list[int]
) -> tuple[tuple[T, ...], tuple[str, ...]]:
    """(new or changed, first names of those gone); their hashes are appended to `gone` and `come`."""
    left = {part.names[0]: part for part in before}
    changed: list[T] = []
    for part in after:
        old = left.pop(part.names[0], None)
        if old is not part and old != part:
            changed.append(part)
            come.append(hash_of(part, network_id))
            if old is not None:
                gone.append(hash_of(old, network_id))
    gone += (hash_of(part, network_id) for part in left.values())
    return tuple(changed), tuple(left)
