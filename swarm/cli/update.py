"""Flags of `service update` applied to an existing spec. Pure: the new spec is a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message

from proto.objects_pb2 import ContainerSpec, ServiceSpec
from swarm.cli.generic import parse_wanted
from swarm.cli.mounts import parse_device, parse_mount, parse_volume_per_slot
from swarm.cli.ports import add_ports, parse_publish, remove_ports
from swarm.cli.spec import (
    MAPS,
    Flags,
    apply_scalars,
    capability,
    check_constraint,
    flag_value,
    getattr_path,
    parse_env,
    parse_host,
    parse_network,
    parse_pairs,
    parse_preference,
    parse_replicas,
    parse_ulimit,
    set_max_concurrent,
    set_replicas,
    split_words,
)
from swarm.errors import Invalid

M = TypeVar("M", bound=Message)
NetworkId = Callable[[str], str]
"""Name or ID of a network -> its ID."""


def updated_spec(current: ServiceSpec, flags: Flags, environ: Mapping[str, str], network_id: NetworkId) -> ServiceSpec:
    """The spec that `service update` asks for; `--image` is set by the caller once it is pinned.
    Raises Invalid, naming the flag."""
    spec = ServiceSpec()
    spec.CopyFrom(current)
    apply_scalars(spec, flags)
    if "replicas" in flags:
        set_replicas(spec, flag_value("replicas", parse_replicas, flags["replicas"]))
    if "max-concurrent" in flags:
        set_max_concurrent(spec, flag_value("max-concurrent", parse_replicas, flags["max-concurrent"]))
    if "args" in flags:
        spec.task.container.args[:] = flag_value("args", split_words, flags["args"])
    if flags.get("force"):
        spec.task.force_update += 1
    for name, path in MAPS.items():
        pairs = getattr_path(spec, path)
        for key in flags.get(f"{name}-rm", ()):
            pairs.pop(key, None)
        pairs.update(parse_pairs(flags.get(f"{name}-add", ()), f"{name}-add"))
    spec.task.log_options.update(parse_pairs(flags.get("log-opt", ()), "log-opt"))
    _update_placement(spec, flags)
    _update_generic_resources(spec, flags)
    _update_container(spec.task.container, flags, environ)
    _update_networks(spec, flags, network_id)
    _update_ports(spec, flags)
    return spec


def _update_placement(spec: ServiceSpec, flags: Flags) -> None:
    placement = spec.task.placement
    added = [check_constraint(text, "--constraint-add") for text in flags.get("constraint-add", ())]
    placement.constraints[:] = _merge(placement.constraints, flags.get("constraint-rm", ()), added)
    removed = [parse_preference(text, "--placement-pref-rm") for text in flags.get("placement-pref-rm", ())]
    preferred = [parse_preference(text, "--placement-pref-add") for text in flags.get("placement-pref-add", ())]
    placement.spread[:] = _merge(placement.spread, removed, preferred)


def _update_generic_resources(spec: ServiceSpec, flags: Flags) -> None:
    added = parse_wanted(flags.get("generic-resource-add", ()), "generic-resource-add")
    removed = flags.get("generic-resource-rm", ())
    if not added and not removed:
        return
    wanted = spec.task.resources.reservations.generic
    for kind in removed:
        if all(resource.kind != kind for resource in wanted):
            raise Invalid(f'invalid value "{kind}" for --generic-resource-rm: the service asks for no {kind}')
    _replace(wanted, added, lambda resource: resource.kind, removed)


def _update_container(container: ContainerSpec, flags: Flags, environ: Mapping[str, str]) -> None:
    env = dict(item.partition("=")[::2] for item in container.env)
    for key in flags.get("env-rm", ()):
        env.pop(key, None)
    env |= parse_env(flags.get("env-add", ()), environ, "--env-add")
    container.env[:] = [f"{key}={value}" for key, value in env.items()]

    mounts = [parse_mount(text, "--mount-add") for text in flags.get("mount-add", ())]
    mounts += [parse_volume_per_slot(text, "--volume-per-slot-add") for text in flags.get("volume-per-slot-add", ())]
    removed = (*flags.get("mount-rm", ()), *flags.get("volume-per-slot-rm", ()))
    _replace(container.mounts, mounts, lambda mount: mount.target, removed)
    devices = [parse_device(text, "--device-add") for text in flags.get("device-add", ())]
    _replace(
        container.devices, devices, lambda device: device.container_path or device.host_path, flags.get("device-rm", ())
    )
    ulimits = [parse_ulimit(text, "--ulimit-add") for text in flags.get("ulimit-add", ())]
    _replace(container.ulimits, ulimits, lambda ulimit: ulimit.name, flags.get("ulimit-rm", ()))

    hosts = [parse_host(text, "--host-add") for text in flags.get("host-add", ())]
    gone = [parse_host(text, "--host-rm") for text in flags.get("host-rm", ())]
    container.hosts[:] = _merge(container.hosts, gone, hosts)
    for name, field in (
        ("dns", container.dns_nameservers),
        ("dns-search", container.dns_search),
        ("dns-option", container.dns_options),
        ("group", container.groups),
    ):
        field[:] = _merge(field, flags.get(f"{name}-rm", ()), flags.get(f"{name}-add", ()))
    # The later word wins: adding what was dropped lifts the drop, and the other way round.
    gained = [capability(text) for text in flags.get("cap-add", ())]
    lost = [capability(text) for text in flags.get("cap-drop", ())]
    container.capability_add[:] = _merge(container.capability_add, lost, gained)
    container.capability_drop[:] = _merge(container.capability_drop, gained, lost)


def _update_networks(spec: ServiceSpec, flags: Flags, network_id: NetworkId) -> None:
    removed = {network_id(text) for text in flags.get("network-rm", ())}
    attached = [attachment for attachment in spec.task.networks if attachment.network_id not in removed]
    for text in flags.get("network-add", ()):
        attachment = parse_network(text, "--network-add")
        name, attachment.network_id = attachment.network_id, network_id(attachment.network_id)
        if any(other.network_id == attachment.network_id for other in attached):
            raise Invalid(f'invalid value "{text}" for --network-add: the service is already attached to {name}')
        attached.append(attachment)
    _assign(spec.task.networks, attached)


def _update_ports(spec: ServiceSpec, flags: Flags) -> None:
    ports = list(spec.endpoint.ports)
    for text in flags.get("publish-rm", ()):
        ports = remove_ports(ports, text)
    for text in flags.get("publish-add", ()):
        ports = add_ports(ports, parse_publish(text, "--publish-add"))
    _assign(spec.endpoint.ports, ports)


def _merge(current: Iterable[str], removed: Iterable[str], added: Iterable[str]) -> list[str]:
    gone = set(removed)
    kept = [item for item in current if item not in gone]
    return kept + [item for item in dict.fromkeys(added) if item not in kept]


def _replace(field: Any, added: Iterable[M], key: Callable[[M], str], removed: Iterable[str]) -> None:
    """Keyed entries of a repeated message field: take away, then add or replace by key."""
    items = {key(item): item for item in field}
    for name in removed:
        items.pop(name, None)
    items |= {key(item): item for item in added}
    _assign(field, items.values())


def _assign(field: Any, items: Iterable[Message]) -> None:
    # Copies first: clearing a repeated field invalidates the messages that were read from it.
    copies = []
    for item in items:
        copy = type(item)()
        copy.CopyFrom(item)
        copies.append(copy)
    del field[:]
    field.extend(copies)
