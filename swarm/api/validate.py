"""Is this service spec right in itself? Pure; every refusal names the field and the remedy.

What depends on other objects (names, networks, ports in use) is in `services.py`.
"""

from __future__ import annotations

import ipaddress
import math
import posixpath
import re
from collections.abc import Iterable

from proto import objects_pb2 as pb
from proto.objects_pb2 import (
    ContainerSpec,
    Device,
    EndpointSpec,
    GenericResource,
    HealthConfig,
    Mount,
    PortConfig,
    Resources,
    RestartPolicy,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
)
from swarm.allocate.ports import share_address
from swarm.api import check, templates
from swarm.api.validate_process import process
from swarm.errors import Invalid
from swarm.schedule.constraints import parse_constraint, parse_spread
from swarm.schedule.generic import is_kind
from swarm.store import states

REPLICAS_MAX = 100_000
"""More is a slip of the finger, and the state of that many tasks is more than the managers should hold."""
NANO_CPUS_MIN = 1_000_000
MEMORY_BYTES_MIN = 4 << 20
"""As in the reference: the kernel refuses less, or the container cannot start in it."""
HEALTH_DURATION_MIN_S = 0.001
"""As in the reference."""
HEALTH_RETRIES_MAX = 10_000
SWAPPINESS_MAX = 100
PORT_MAX = 65_535
LIST_MAX = 1_000
"""Entries of one list of a spec."""
SPEC_BYTES_MAX = 400_000
"""Of a whole service: it is stored beside the one before it (for a rollback) in one entry of the log."""

_ENV_NAME = re.compile(r"[^=\x00]+(=[^\x00]*)?")
_IMAGE = re.compile(r"[^\s\x00]+")
_LOG_OPTIONS = {
    "max-size": (re.compile(r"0*[1-9]\d*\s*[kmg]?b?", re.IGNORECASE), "a size such as 10m"),
    "max-file": (re.compile(r"0*[1-9]\d*"), "a number of files, 1 or more"),
}
"""As the nodes understand them (node/inputs.py): what they would refuse, task after task, is refused here at once."""
_WEIGHT_LABEL = re.compile(r"node\.labels\.\S+")
_HEALTH_TESTS = ("CMD", "CMD-SHELL", "NONE")
_PROPAGATIONS = ("", "private", "rprivate", "shared", "rshared", "slave", "rslave")
_PROTOCOL = {pb.TCP: "tcp", pb.UDP: "udp", pb.SCTP: "sctp"}

EMBEDDED_NAME_SERVER = "127.0.0.11"
_DOMAIN = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)


def service_spec(spec: ServiceSpec) -> None:
    """Raises Invalid for the first thing that is wrong."""
    if (size := spec.ByteSize()) > SPEC_BYTES_MAX:
        raise Invalid(
            f"the service's specification has {size} bytes: use at most {SPEC_BYTES_MAX}, and hand large values"
            " to its tasks by a file of their image or of a volume"
        )
    check.name("service", spec.annotations.name)
    check.labels("labels", spec.annotations.labels)
    if spec.WhichOneof("mode") == "replicated" and spec.replicated.replicas > REPLICAS_MAX:
        raise Invalid(
            f"replicas: {spec.replicated.replicas} is out of range: use a number from 0 to {REPLICAS_MAX} "
            "(a negative number is not a number of replicas)"
        )
    if states.is_job(spec):
        _job(spec)
    task_spec(spec.task)
    if spec.HasField("update"):
        update_config("update", spec.update)
    if spec.HasField("rollback"):
        update_config("rollback", spec.rollback)
        if spec.rollback.failure_action == pb.ROLLBACK:
            raise Invalid("rollback failure action: a rollback cannot be rolled back: use pause or continue")
    endpoint_spec(spec.endpoint)
    if spec.max_unavailable and spec.WhichOneof("mode") != "replicated":
        raise Invalid("max unavailable has a meaning for replicated services only: leave it out")
    if spec.max_unavailable > REPLICAS_MAX:
        raise Invalid(f"max unavailable {spec.max_unavailable}: use a number up to {REPLICAS_MAX}")
    if states.is_global(spec) and any(mount.per_slot for mount in spec.task.container.mounts):
        raise Invalid(
            "volume per slot has no meaning for a global service, whose tasks have no slots: use a plain volume"
        )
    if states.is_global(spec) and spec.task.placement.max_replicas_per_node:
        raise Invalid("max replicas per node has no meaning for a global service: leave it out")


def _job(spec: ServiceSpec) -> None:
    if spec.update.ByteSize() or spec.rollback.ByteSize():
        raise Invalid(
            "update and rollback config have no meaning for a job, which begins anew when it is updated: leave them out"
        )
    for field in ("total_completions", "max_concurrent"):
        if (count := getattr(spec.replicated_job, field)) > REPLICAS_MAX:
            raise Invalid(f"{field.replace('_', ' ')}: {count} is out of range: use a number up to {REPLICAS_MAX}")


def task_spec(spec: TaskSpec) -> None:
    container_spec(spec.container)
    limits, reservations = spec.resources.limits, spec.resources.reservations
    resources("limit", limits)
    resources("reserve", reservations)
    if reservations.pids:
        raise Invalid("reserve pids: processes can only be limited, not reserved")
    if limits.generic:
        raise Invalid("limit generic resources: they can only be reserved, not limited")
    for resource in reservations.generic:
        _generic_resource(resource)
    _unique("generic resource", (resource.kind for resource in reservations.generic), "ask once for each kind")
    if limits.nano_cpus and reservations.nano_cpus > limits.nano_cpus:
        raise Invalid("reserve cpu is higher than limit cpu: lower it or raise the limit")
    if limits.memory_bytes and reservations.memory_bytes > limits.memory_bytes:
        raise Invalid("reserve memory is higher than limit memory: lower it or raise the limit")
    for option, value in spec.log_options.items():
        log_option(option, value)
    restart_policy(spec.restart)
    for text in spec.placement.constraints:
        parse_constraint(text)
    for descriptor in spec.placement.spread:
        parse_spread(descriptor)
    _unique("network", (config.network_id for config in spec.networks), "attach a network once")


def _generic_resource(resource: GenericResource) -> None:
    if not is_kind(resource.kind):
        raise Invalid(f"generic resource {resource.kind!r}: a kind has up to 63 letters, digits, '-', '_' and '.'")
    if resource.id:
        raise Invalid(f"generic resource {resource.kind}={resource.id}: a service can only ask for a number of them")
    if resource.count < 1:
        raise Invalid(f"generic resource {resource.kind}={resource.count}: use a number of 1 or more")


def log_option(option: str, value: str) -> None:
    if option not in _LOG_OPTIONS:
        raise Invalid(f"log option {option} is not known: use one of {', '.join(_LOG_OPTIONS)}")
    pattern, wanted = _LOG_OPTIONS[option]
    if not pattern.fullmatch(value.strip()):
        raise Invalid(f'log option {option}="{value}" is not {wanted}')


def container_spec(spec: ContainerSpec) -> None:
    if not spec.image:
        raise Invalid("image is missing: name the image to run")
    if not _IMAGE.fullmatch(spec.image):
        raise Invalid(f"image {spec.image!r} is not an image name: it contains white space")
    check.labels("container labels", spec.labels)
    for entry in spec.env:
        if not _ENV_NAME.fullmatch(entry):
            raise Invalid(f"env {entry!r}: write NAME=value, with a name before the '='")
    if spec.HasField("stop_grace_period_s"):
        check.duration("stop grace period", spec.stop_grace_period_s)
    resolving = (spec.dns_nameservers, spec.dns_search, spec.dns_options)
    for values in (spec.env, spec.mounts, spec.command, spec.args, spec.ulimits, spec.hosts, *resolving):
        if len(values) > LIST_MAX:
            raise Invalid(f"a list of the container spec has {len(values)} entries: use at most {LIST_MAX}")
    for mount in spec.mounts:
        _mount(mount)
    _unique("mount target", (_clean(mount.target) for mount in spec.mounts), "mount one thing per target")
    for ulimit in spec.ulimits:
        if not ulimit.name or (ulimit.hard >= 0 and ulimit.soft > ulimit.hard):
            raise Invalid(f"ulimit {ulimit.name or '(no name)'}: soft {ulimit.soft} must not exceed hard {ulimit.hard}")
    if spec.HasField("health"):
        health(spec.health)
    for device in spec.devices:
        _device(device)
    _unique(
        "device", (device.container_path or device.host_path for device in spec.devices), "give each a path of its own"
    )
    process(spec)
    _templates(spec)
    _name_resolution(spec)
    for host in spec.hosts:
        if len(host.split()) < 2:
            raise Invalid(f"host {host!r}: write an address and a name")


def health(config: HealthConfig) -> None:
    kind, *words = list(config.test) or ["NONE"]
    if kind not in _HEALTH_TESTS:
        raise Invalid(f"health test {kind!r}: it begins with one of {', '.join(_HEALTH_TESTS)}")
    if kind != "NONE" and not any(words):
        raise Invalid(f"health test {kind}: the command is missing")
    for field in ("interval", "timeout", "start_period", "start_interval"):
        seconds = getattr(config, f"{field}_s")
        name = f"health {field.replace('_', ' ')}"
        check.duration(name, seconds)
        if 0 < seconds < HEALTH_DURATION_MIN_S:
            raise Invalid(f"{name}: {seconds:g} s is too short: use at least 1ms, or 0 for the default")
    if config.retries > HEALTH_RETRIES_MAX:
        raise Invalid(f"health retries {config.retries}: use a number up to {HEALTH_RETRIES_MAX}")


def _device(device: Device) -> None:
    for path in (device.host_path, device.container_path or "/dev"):
        if not path.startswith("/"):
            raise Invalid(f"device {path!r}: it must be an absolute path")
    if not re.fullmatch("[rwm]*", device.permissions):
        raise Invalid(f"device {device.host_path}: permissions {device.permissions!r}: use letters of rwm")


def _name_resolution(spec: ContainerSpec) -> None:
    for server in spec.dns_nameservers:
        try:
            ipaddress.ip_address(server)
        except ValueError:
            raise Invalid(f"dns {server!r} is not an IP address: name servers are asked by address") from None
        if server == EMBEDDED_NAME_SERVER:
            raise Invalid(f"dns {server}: this is the server that tasks ask already: leave it out")
    for domain in spec.dns_search:
        if domain != "." and not _DOMAIN.fullmatch(domain):
            raise Invalid(f"dns search {domain!r} is not a domain: write one such as example.com, or . for none")
    for option in spec.dns_options:
        if len(option.split()) != 1:
            raise Invalid(f"dns option {option!r}: write one option without white space, such as timeout:3")


def _templates(spec: ContainerSpec) -> None:
    texts = [spec.hostname, *spec.env, *(mount.source for mount in spec.mounts), *(m.target for m in spec.mounts)]
    for text in texts:
        if unknown := templates.unknown_in(text):
            raise Invalid(f"template {unknown} is not known: use one of {', '.join(templates.KNOWN)}")


def _mount(mount: Mount) -> None:
    check.choice("mount type", mount.type, dict(Mount.Type.items()))
    target, source = mount.target, mount.source
    if not target.startswith("/"):
        raise Invalid(f"mount target {target!r}: it must be an absolute path in the container")
    if _clean(target) == "/":
        raise Invalid("mount target '/': the container's root cannot be mounted over")
    if mount.type == Mount.BIND and not source.startswith("/"):
        raise Invalid(f"mount source {source!r} for {target}: a bind mount needs an absolute path on the host")
    if mount.type == Mount.VOLUME and "/" in source:
        raise Invalid(
            f"mount source {source!r} for {target}: a volume has a name, not a path; use type=bind for a path"
        )
    if mount.per_slot and (mount.type != Mount.VOLUME or not source):
        raise Invalid(f"mount {target}: only a volume with a name can be one per slot")
    if mount.type == Mount.TMPFS and source:
        raise Invalid(f"mount source {source!r} for {target}: a tmpfs has no source")
    if mount.tmpfs_size_bytes < 0:
        raise Invalid(f"mount {target}: tmpfs size {mount.tmpfs_size_bytes} must be 0 or more")
    if mount.propagation not in _PROPAGATIONS:
        raise Invalid(f"mount {target}: propagation {mount.propagation!r}: use one of {', '.join(_PROPAGATIONS[1:])}")


def resources(kind: str, spec: Resources) -> None:
    """`kind`: "limit" or "reserve", as in the names of the flags."""
    if spec.nano_cpus and spec.nano_cpus < NANO_CPUS_MIN:
        raise Invalid(f"invalid {kind} cpu value {spec.nano_cpus / 1e9:g}: must be at least {NANO_CPUS_MIN / 1e9:g}")
    if spec.memory_bytes and spec.memory_bytes < MEMORY_BYTES_MIN:
        raise Invalid(f"invalid {kind} memory value {spec.memory_bytes}: must be at least 4MiB")
    if spec.memory_swap_bytes and not spec.memory_bytes:
        raise Invalid(f"{kind} memory swap needs a memory limit: give --limit-memory too")
    if spec.memory_swap_bytes < -1 or 0 < spec.memory_swap_bytes < spec.memory_bytes:
        raise Invalid(
            f"invalid {kind} memory swap value {spec.memory_swap_bytes}: it counts memory and swap together, so use "
            "at least the memory limit, or -1 (unlimited)"
        )
    if spec.HasField("memory_swappiness") and not 0 <= spec.memory_swappiness <= SWAPPINESS_MAX:
        raise Invalid(f"invalid {kind} memory swappiness value {spec.memory_swappiness}: use a number from 0 to 100")
    if spec.pids < 0:
        raise Invalid(f"invalid {kind} pids value {spec.pids}: must be 0 (unlimited) or more")


def restart_policy(policy: RestartPolicy) -> None:
    check.choice("restart condition", policy.condition, dict(pb.RestartCondition.items()))
    if policy.HasField("delay_s"):
        check.duration("restart delay", policy.delay_s)
    check.duration("restart window", policy.window_s)


def update_config(kind: str, config: UpdateConfig) -> None:
    """`kind`: "update" or "rollback"."""
    check.choice(f"{kind} failure action", config.failure_action, dict(pb.FailureAction.items()))
    check.choice(f"{kind} order", config.order, dict(pb.UpdateOrder.items()))
    check.duration(f"{kind} delay", config.delay_s)
    if config.HasField("monitor_s"):
        check.duration(f"{kind} monitor", config.monitor_s)
    if not config.progress_deadline_s < 0:  # negative: never
        check.duration(f"{kind} progress deadline", config.progress_deadline_s)
    ratio = config.max_failure_ratio
    if math.isnan(ratio) or not 0 <= ratio <= 1:
        raise Invalid(f"{kind} max failure ratio {ratio:g}: must be between 0 and 1")
    if config.HasField("parallelism") and config.parallelism > REPLICAS_MAX:
        raise Invalid(f"{kind} parallelism {config.parallelism}: use a number from 0 (all at once) to {REPLICAS_MAX}")


def endpoint_spec(spec: EndpointSpec) -> None:
    check.choice("endpoint mode", spec.mode, dict(pb.EndpointMode.items()))
    if len(spec.ports) > LIST_MAX:
        raise Invalid(
            f"{len(spec.ports)} published ports: publish at most {LIST_MAX}, or attach the service to network host,"
            " whose tasks listen on their node's own ports"
        )
    for port in spec.ports:
        _port(port)
    if spec.mode == pb.DNSRR and any(port.mode == pb.INGRESS for port in spec.ports):
        raise Invalid(
            "port published with ingress mode can't be used with dnsrr mode: "
            "publish with mode=host, or use endpoint mode vip"
        )
    _published_once(spec.ports)
    _unique(
        "port name",
        (port.name for port in spec.ports if port.name),
        "give each published port a name of its own or none",
    )

    check.choice("balance", spec.balance, dict(pb.Balance.items()))
    if spec.mode == pb.DNSRR and (spec.balance or spec.weight_label):
        raise Invalid("balance and balance weight have no meaning in dnsrr mode, where clients choose: leave them out")
    if spec.weight_label and not _WEIGHT_LABEL.fullmatch(spec.weight_label):
        raise Invalid(f"balance weight {spec.weight_label!r}: write node.labels.LABEL, whose values are 1 to 100")


def _published_once(ports: Iterable[PortConfig]) -> None:
    """Of the same number, twice is possible on different addresses of the hosts only."""
    seen: dict[tuple[int, str], list[str]] = {}
    for port in ports:
        others = seen.setdefault(port_key(port), [])
        if port.published_port and any(share_address(port.host_ip, other) for other in others):
            number, protocol = port_key(port)
            raise Invalid(f"duplicate published port '{number}/{protocol}': publish a port once")
        others.append(port.host_ip)


def _port(port: PortConfig) -> None:
    check.choice("port protocol", port.protocol, dict(pb.Protocol.items()))
    check.choice("publish mode", port.mode, dict(pb.PublishMode.items()))
    if not 1 <= port.target_port <= PORT_MAX:
        raise Invalid(f"target port {port.target_port} is out of range: use a number from 1 to {PORT_MAX}")
    if port.published_port > PORT_MAX:
        raise Invalid(
            f"published port {port.published_port} is out of range: "
            f"use a number from 1 to {PORT_MAX}, or 0 to have one chosen"
        )
    if port.host_ip:
        try:
            usable = not ipaddress.ip_address(port.host_ip).is_multicast and "%" not in port.host_ip
        except ValueError:
            usable = False
        if not usable:
            raise Invalid(f"host ip {port.host_ip!r} of port {port.target_port} is no address that a host can have")


def port_key(port: PortConfig) -> tuple[int, str]:
    """What may be taken once: number and protocol."""
    return port.published_port, _PROTOCOL[port.protocol]


def _clean(path: str) -> str:
    return posixpath.normpath(path)


def _unique(what: str, values: Iterable[str], remedy: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise Invalid(f"duplicate {what} {value!r}: {remedy}")
        seen.add(value)
