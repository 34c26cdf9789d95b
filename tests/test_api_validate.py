"""Each bad value is refused with one line that names it; a spec with everything in it passes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import spec as node_spec
from node.monitor import signal_number
from proto import objects_pb2 as pb
from proto.objects_pb2 import Mount, PortConfig, ServiceSpec
from swarm.api import check, validate_process
from swarm.api.validate import service_spec
from swarm.errors import Invalid
from tests.managing import a_spec

Change = Callable[[ServiceSpec], object]


def full_spec() -> ServiceSpec:
    spec = a_spec("shop.web_1-a")
    spec.annotations.labels["tier"] = "front"
    container = spec.task.container
    container.env.extend(["A=1", "B", "C="])
    container.mounts.add(type=Mount.BIND, source="/srv", target="/srv", propagation="rslave")
    container.mounts.add(type=Mount.VOLUME, source="data", target="/data")
    container.mounts.add(type=Mount.TMPFS, target="/run", tmpfs_size_bytes=1 << 20)
    container.stop_grace_period_s = 0
    container.ulimits.add(name="nofile", soft=1024, hard=-1)
    container.hosts.append("10.0.0.1 db")
    container.dns_nameservers.extend(["10.0.0.1", "fd00::1"])
    container.dns_search.append("corp.example")
    container.dns_options.append("timeout:3")
    container.health.test[:] = ["CMD-SHELL", "true"]
    container.health.interval_s = 0.001
    container.devices.add(host_path="/dev/fuse", permissions="rw")
    container.mounts.add(type=Mount.VOLUME, source="slots", target="/slots", per_slot=True)
    container.hostname = '{{.Service.Name}}-{{ .Task.Slot }}-{{index .Node.Labels "zone"}}'
    spec.task.resources.limits.memory_swap_bytes = -1
    spec.task.resources.limits.memory_swappiness = 0
    spec.task.resources.limits.nano_cpus = 1_000_000
    spec.task.resources.limits.memory_bytes = 4 << 20
    spec.task.placement.constraints.append("node.role==worker")
    spec.task.placement.spread.append("node.labels.zone")
    spec.update.max_failure_ratio = 1
    spec.endpoint.ports.add(target_port=80, published_port=8000)
    spec.endpoint.ports.add(target_port=80, published_port=8000, protocol=pb.UDP)
    spec.endpoint.ports.add(target_port=81)
    spec.endpoint.ports.add(target_port=82)
    return spec


def test_a_full_spec_is_fine() -> None:
    service_spec(full_spec())


def test_the_managers_know_what_the_nodes_know() -> None:
    assert set(node_spec.ALL_CAPS) == validate_process.CAPABILITIES
    assert tuple(node_spec.RLIMITS) == validate_process.ULIMITS
    for name in ("SIGTERM", "term", "15", "0", "65", "SIGRTMIN", "RTMIN+3", "RTMIN+99", "TERM+1", "NOPE", "SIGSIGINT"):
        try:
            known = bool(signal_number(name))
        except ValueError:
            known = False
        assert validate_process.is_signal(name) is known, name


def port(**fields: int | str) -> Change:
    return lambda spec: spec.endpoint.ports.append(PortConfig(**fields))  # type: ignore[arg-type]


def mount(**fields: object) -> Change:
    return lambda spec: spec.task.container.mounts.append(Mount(**fields))  # type: ignore[arg-type]


def global_with_a_budget(spec: ServiceSpec) -> None:
    spec.max_unavailable = 1
    spec.ClearField("update")
    getattr(spec, "global").SetInParent()


def health_test(*words: str) -> Change:
    return lambda spec: spec.task.container.health.test.__setitem__(slice(None), words)


BAD: list[tuple[Change, str]] = [
    (lambda s: s.task.log_options.update({"max-size": "many"}), 'log option max-size="many" is not a size'),
    (lambda s: s.task.log_options.update({"max-size": "0"}), 'log option max-size="0" is not a size'),
    (lambda s: s.task.log_options.update({"max-file": "0"}), "1 or more"),
    (lambda s: s.task.log_options.update({"tag": "x"}), "log option tag is not known"),
    (lambda s: setattr(s.annotations, "name", ""), "service name is empty"),
    (lambda s: setattr(s.annotations, "name", "-web"), "invalid service name '-web'"),
    (lambda s: setattr(s.annotations, "name", "we b"), "invalid service name 'we b'"),
    (lambda s: setattr(s.annotations, "name", "w" * 64), "has 64 characters: use at most 63"),
    (lambda s: s.annotations.labels.update({"": "x"}), "empty name"),
    (lambda s: setattr(s.task.container, "stop_signal", "NOPE"), "stop signal 'NOPE' is not known"),
    (lambda s: s.task.container.capability_add.append("CAP_NOPE"), "capability 'CAP_NOPE' is not known"),
    (lambda s: s.task.container.capability_drop.append("nope"), "capability 'nope' is not known"),
    (lambda s: s.task.container.ulimits.add(name="nope", soft=1, hard=1), "ulimit 'nope' is not known: as, core"),
    (lambda s: s.task.container.sysctls.update({"kernel.pid_max": "1"}), "sysctl 'kernel.pid_max' is not known"),
    (lambda s: s.task.container.groups.append(""), "supplementary group"),
    (lambda s: setattr(s.task.container, "dir", "rel"), "working directory 'rel'"),
    (lambda s: setattr(s.task.container, "hostname", "bad host"), "hostname 'bad host'"),
    (lambda s: setattr(s.task.container, "hostname", "x" * 65), "up to 64 letters"),
    (lambda s: setattr(s.task.container, "image", ""), "image is missing"),
    (lambda s: setattr(s.task.container, "image", "my image"), "not an image name"),
    (lambda s: setattr(s.replicated, "replicas", 2**64 - 1), "replicas: 18446744073709551615 is out of range"),
    (lambda s: s.task.container.env.append("=x"), "env '=x'"),
    (lambda s: setattr(s.task.container, "stop_grace_period_s", -1), "stop grace period"),
    (
        lambda s: setattr(s.task.resources.limits, "nano_cpus", 999_999),
        "limit cpu value 0.000999999: .* at least 0.001",
    ),
    (lambda s: setattr(s.task.resources.limits, "nano_cpus", -1), "limit cpu value"),
    (lambda s: setattr(s.task.resources.reservations, "memory_bytes", 1000), "reserve memory value 1000: .* 4MiB"),
    (lambda s: setattr(s.task.resources.reservations, "nano_cpus", 10**10), "reserve cpu is higher than limit"),
    (lambda s: setattr(s.task.restart, "delay_s", -0.5), "restart delay"),
    (lambda s: setattr(s.task.restart, "window_s", float("nan")), "restart window"),
    (lambda s: setattr(s.task.restart, "condition", 9), "restart condition: unknown value 9"),
    (lambda s: setattr(s.update, "max_failure_ratio", 1.5), "update max failure ratio 1.5"),
    (lambda s: setattr(s.update, "max_failure_ratio", float("nan")), "update max failure ratio"),
    (lambda s: setattr(s.update, "delay_s", -1), "update delay"),
    (lambda s: setattr(s.rollback, "monitor_s", -1), "rollback monitor"),
    (lambda s: setattr(s.rollback, "failure_action", pb.ROLLBACK), "cannot be rolled back"),
    (lambda s: s.task.placement.constraints.append("node.rol==x"), "node.rol"),
    (lambda s: s.task.placement.spread.append("node.id"), "invalid placement preference 'node.id'"),
    (mount(type=Mount.VOLUME, source="other", target="/data/"), "duplicate mount target '/data'"),
    (mount(type=Mount.VOLUME, source="x", target="data"), "mount target 'data': .* absolute"),
    (mount(type=Mount.VOLUME, source="x", target="/a/.."), "cannot be mounted over"),
    (mount(type=Mount.BIND, source="./x", target="/x"), "mount source './x' for /x: .* absolute"),
    (mount(type=Mount.VOLUME, source="/x", target="/x"), "a volume has a name"),
    (mount(type=Mount.TMPFS, source="x", target="/x"), "tmpfs has no source"),
    (mount(type=Mount.BIND, source="/x", target="/x", propagation="wild"), "propagation 'wild'"),
    (port(target_port=80, published_port=70000), "published port 70000 is out of range"),
    (port(target_port=0, published_port=80), "target port 0 is out of range"),
    (port(target_port=90, published_port=8000), "duplicate published port '8000/tcp'"),
    (
        lambda spec: spec.endpoint.ports.extend(PortConfig(target_port=number) for number in range(1, 999)),
        "1002 published ports: publish at most 1000, or attach the service to network host",
    ),
    (lambda spec: spec.task.container.dns_search.extend(["a"] * 1000), "has 1001 entries"),
    (port(target_port=90, published_port=8000, mode=pb.HOST), "duplicate published port '8000/tcp'"),
    (port(target_port=90, protocol=7), "port protocol: unknown value 7"),
    (lambda s: setattr(s.endpoint, "mode", pb.DNSRR), "ingress mode can't be used with dnsrr mode"),
    (port(target_port=83, published_port=8000, host_ip="192.0.2.1"), "duplicate published port '8000/tcp'"),
    (port(target_port=83, host_ip="eth0"), "host ip 'eth0' of port 83 is no address"),
    (port(target_port=83, host_ip="fe80::1%eth0"), "is no address that a host can have"),
    (lambda s: setattr(s.endpoint, "weight_label", "capacity"), "balance weight 'capacity': write node.labels.LABEL"),
    (lambda s: s.task.networks.extend([pb.NetworkAttachmentConfig(network_id="a")] * 2), "duplicate network 'a'"),
    (lambda s: s.replicated_job.SetInParent(), "update and rollback config have no meaning for a job"),
    (lambda s: s.global_job.SetInParent(), "update and rollback config have no meaning for a job"),
    (lambda s: setattr(s.update, "progress_deadline_s", float("nan")), "update progress deadline: nan s"),
    (health_test("curl"), "health test 'curl': it begins with one of CMD"),
    (health_test("CMD"), "health test CMD: the command is missing"),
    (lambda s: setattr(s.task.container.health, "interval_s", 0.0005), "health interval: 0.0005 s is too short"),
    (lambda s: setattr(s.task.container.health, "start_period_s", -1), "health start period: -1 s"),
    (lambda s: setattr(s.task.container.health, "retries", 2**31), "health retries 2147483648"),
    (lambda s: s.task.container.devices.add(host_path="null"), "device 'null': .* absolute"),
    (lambda s: s.task.container.devices.add(host_path="/dev/null", permissions="x"), "permissions 'x'"),
    (lambda s: s.task.container.devices.extend([pb.Device(host_path="/dev/a")] * 2), "duplicate device '/dev/a'"),
    (mount(type=Mount.VOLUME, target="/x", per_slot=True), "only a volume with a name"),
    (mount(type=Mount.BIND, source="/x", target="/x", per_slot=True), "only a volume with a name"),
    (lambda s: s.task.container.env.append("A={{.Task.Slto}}"), r"template \{\{.Task.Slto\}\} is not known"),
    (lambda s: setattr(s.task.container, "hostname", "{{.Node.Label}}"), "template"),
    (lambda s: setattr(s.task.resources.limits, "memory_swap_bytes", 2**20), "memory swap value .* at least"),
    (lambda s: setattr(s.task.resources.reservations, "memory_swap_bytes", -1), "needs a memory limit"),
    (lambda s: setattr(s.task.resources.limits, "memory_swappiness", 101), "memory swappiness value 101"),
    (lambda s: s.task.container.dns_nameservers.append("dns.example"), "dns 'dns.example' is not an IP address"),
    (lambda s: s.task.container.dns_nameservers.append("127.0.0.11"), "dns 127.0.0.11: this is the server that"),
    (lambda s: s.task.container.dns_search.append("a b"), "dns search 'a b' is not a domain"),
    (lambda s: s.task.container.dns_options.append("a b"), "dns option 'a b': write one option"),
    (global_with_a_budget, "for replicated services only"),
    (lambda s: s.task.container.env.append("A=" + "x" * 400_000), "specification has 40.... bytes: use at most"),
    (lambda s: setattr(s, "max_unavailable", 10**9), "max unavailable 1000000000"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_service_specs(change: Change, message: str) -> None:
    spec = full_spec()
    change(spec)
    with pytest.raises(Invalid, match=message) as refused:
        service_spec(spec)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("field", ["total_completions", "max_concurrent"])
def test_jobs_have_as_many_executions_as_replicas_at_most(field: str) -> None:
    spec = full_spec()
    spec.ClearField("update")
    spec.ClearField("rollback")
    setattr(spec.replicated_job, field, 100_000)
    service_spec(spec)
    setattr(spec.replicated_job, field, 100_001)
    with pytest.raises(Invalid, match=f"{field.replace('_', ' ')}: 100001 is out of range"):
        service_spec(spec)


def test_replicas_per_node_mean_nothing_for_a_global_service() -> None:
    spec = full_spec()
    getattr(spec, "global").SetInParent()
    spec.task.placement.max_replicas_per_node = 2
    with pytest.raises(Invalid, match="global"):
        service_spec(spec)


@given(st.text(alphabet="aZ0_.-é \n/", max_size=70))
def test_names_are_as_docker_allows_them(name: str) -> None:
    fits = re.fullmatch(r"[a-zA-Z0-9]([a-zA-Z0-9_.-]*[a-zA-Z0-9])?", name) is not None and len(name) <= 63
    try:
        check.name("service", name)
    except Invalid:
        assert not fits
    else:
        assert fits
