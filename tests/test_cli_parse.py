"""Flags to values: durations, sizes, ports, mounts, and whole service specs, with their refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto import objects_pb2 as pb
from swarm.cli.command import split_switches
from swarm.cli.images import base_name, registry_of, repository_and_tag, without_digest
from swarm.cli.mounts import parse_mount, refuse_missing_binds
from swarm.cli.ports import parse_publish, ports_text, remove_ports
from swarm.cli.spec import (
    build_spec,
    capability,
    parse_env,
    parse_env_file,
    parse_host,
    parse_network,
    parse_ulimit,
)
from swarm.cli.units import (
    format_duration,
    format_time,
    human_duration,
    human_memory,
    human_size,
    parse_bytes,
    parse_duration_s,
    parse_nano_cpus,
    parse_since_s,
    parse_uint,
)
from swarm.cli.update import updated_spec
from swarm.errors import Invalid


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_duration_s, "1m30s", 90),
        (parse_duration_s, "1.5h", 5400),
        (parse_duration_s, "0", 0),
        (parse_duration_s, "250ms", 0.25),
        (parse_bytes, "64m", 64 << 20),
        (parse_bytes, "1.5GiB", 3 << 29),
        (parse_bytes, "512", 512),
        (parse_nano_cpus, "0.5", 500_000_000),
        (parse_nano_cpus, "2", 2_000_000_000),
        (parse_uint, "7", 7),
    ],
)
def test_units_are_read(parse: Callable[[str], float], text: str, value: float) -> None:
    assert parse(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_duration_s, "10"),
        (parse_duration_s, "-1s"),
        (parse_duration_s, "1s2"),
        (parse_duration_s, ""),
        (parse_bytes, "-1m"),
        (parse_bytes, "1x"),
        (parse_nano_cpus, "-1"),
        (parse_nano_cpus, "nan"),
        (parse_nano_cpus, "0.0000000001"),
        (parse_uint, "-1"),
        (parse_uint, "1.5"),
    ],
)
def test_bad_units_are_refused(parse: Callable[[str], float], text: str) -> None:
    with pytest.raises(Invalid, match="is"):
        parse(text)


@given(st.integers(0, 10**9))
def test_written_durations_read_back(milliseconds: int) -> None:
    assert parse_duration_s(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)


def test_since_is_an_age_a_number_or_a_date() -> None:
    assert parse_since_s("10m", now=1000) == 400
    assert parse_since_s("123.5", now=1000) == 123.5
    assert parse_since_s("1970-01-01T00:01:00Z", now=1000) == 60
    with pytest.raises(Invalid, match="yesterday"):
        parse_since_s("yesterday", now=1000)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (human_duration(0.4), "Less than a second"),
        (human_duration(59), "59 seconds"),
        (human_duration(60), "About a minute"),
        (human_duration(300), "5 minutes"),
        (human_duration(3700), "About an hour"),
        (human_duration(47 * 3600), "47 hours"),
        (human_duration(3 * 86400), "3 days"),
        (human_duration(21 * 86400), "3 weeks"),
        (human_duration(90 * 86400), "3 months"),
        (human_duration(800 * 86400), "2 years"),
        (human_size(4_260_000), "4.26MB"),
        (human_memory(64 << 20), "64MiB"),
        (format_duration(90), "1m30s"),
        (format_duration(7200), "2h0m0s"),
        (format_duration(0.25), "250ms"),
        (format_time(0), "0001-01-01T00:00:00Z"),
        (format_time(1.5), "1970-01-01T00:00:01.500000000Z"),
    ],
)
def test_units_are_written_as_docker_does(shown: str, text: str) -> None:
    assert shown == text


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("8000:80", [(8000, 80, pb.TCP, pb.INGRESS)]),
        ("80", [(0, 80, pb.TCP, pb.INGRESS)]),
        ("53:53/udp", [(53, 53, pb.UDP, pb.INGRESS)]),
        ("8000-8001:80-81", [(8000, 80, pb.TCP, pb.INGRESS), (8001, 81, pb.TCP, pb.INGRESS)]),
        ("8000-8001:80", [(8000, 80, pb.TCP, pb.INGRESS), (8001, 80, pb.TCP, pb.INGRESS)]),
        ("published=8000,target=80,protocol=udp,mode=host", [(8000, 80, pb.UDP, pb.HOST)]),
    ],
)
def test_publish(text: str, ports: list[tuple[int, int, int, int]]) -> None:
    parsed = parse_publish(text)
    assert [(p.published_port, p.target_port, p.protocol, p.mode) for p in parsed] == ports


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("70000:80", "published port 70000 is not in 1..65535"),
        ("8000:0", "target port 0"),
        ("8000:80/icmp", "protocol"),
        ("localhost:8000:80", "host address"),
        ("::1:8000:80", "write \\[IP:\\]PUBLISHED:TARGET"),
        ("[::g]:8000:80", "host address"),
        ("published=8000,target=80,host_ip=eth0", "host address"),
        ("published=8000", "target=PORT is missing"),
        ("target=80,colour=red", "unknown field"),
        ("8000-8002:80-81", "differ in length"),
        ("81-80:80", "ends before"),
        ("web", "write \\[IP:\\]PUBLISHED:TARGET"),
    ],
)
def test_a_bad_publish_names_the_flag_and_the_fault(text: str, why: str) -> None:
    with pytest.raises(Invalid, match=why) as caught:
        parse_publish(text)
    assert f'invalid value "{text}" for --publish' in str(caught.value)


@pytest.mark.parametrize(
    ("text", "host_ip", "shown"),
    [
        ("192.168.1.5:8000:80", "192.168.1.5", "192.168.1.5:8000->80/tcp"),
        ("[2001:DB8::1]:8000:80/sctp", "2001:db8::1", "[2001:db8::1]:8000->80/sctp"),
        ("published=8000,target=80,host_ip=192.168.1.5", "192.168.1.5", "192.168.1.5:8000->80/tcp"),
        ("192.168.1.5::80", "192.168.1.5", "80/tcp"),
    ],
)
def test_a_port_on_one_address_of_the_hosts(text: str, host_ip: str, shown: str) -> None:
    (port,) = parse_publish(text)
    assert (port.host_ip, port.target_port) == (host_ip, 80)
    assert ports_text([port], pb.INGRESS) == shown
    others = [*parse_publish("192.0.2.9:8000:80"), *parse_publish("192.0.2.9:8000:80/sctp")]
    assert remove_ports([port, *others], text) == others


def test_ports_are_removed_by_target_or_in_full() -> None:
    ports = [*parse_publish("8000:80"), *parse_publish("53:53/udp"), *parse_publish("53:53/tcp")]
    assert ports_text(remove_ports(ports, "53/udp"), pb.INGRESS) == "*:53->53/tcp, *:8000->80/tcp"
    assert len(remove_ports(ports, "8000:80")) == 2
    both = [*ports, *parse_publish("published=8002,target=80,mode=host")]
    assert remove_ports(both, "target=80,mode=host") == ports
    assert len(remove_ports(both, "80")) == 2
    with pytest.raises(Invalid, match="publishes no such"):
        remove_ports(ports, "8001:80")


def test_mounts() -> None:
    bind = parse_mount("type=bind,source=/srv,target=/data,readonly,bind-propagation=rslave")
    assert bind == pb.Mount(type=pb.Mount.BIND, source="/srv", target="/data", read_only=True, propagation="rslave")
    assert parse_mount("src=vol,dst=/v,volume-nocopy=true").no_copy
    tmpfs = parse_mount("type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=1770")
    assert (tmpfs.tmpfs_size_bytes, tmpfs.tmpfs_mode) == (1 << 20, 0o1770)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("type=bind,source=/srv", "target=PATH is missing"),
        ("type=bind,source=srv,target=/d", "absolute path on the node"),
        ("type=volume,target=d", "absolute"),
        ("type=disk,target=/d", "type"),
        ("type=tmpfs,target=/d,source=/x", "no source"),
        ("type=volume,target=/d,tmpfs-size=1m", "only for type=tmpfs"),
        ("target=/d,volume-opt=a=b", "not supported"),
        ("target=/d,colour=red", "unknown field"),
        ("target=/d,readonly=perhaps", "true or false"),
    ],
)
def test_a_bad_mount_names_the_flag_and_the_fault(text: str, why: str) -> None:
    with pytest.raises(Invalid, match=why) as caught:
        parse_mount(text)
    assert "for --mount" in str(caught.value)


def build(*command: str, **flags: Any) -> pb.ServiceSpec:
    files = {"/vars": "# comment\nA=1\n\nB\nHOST\n"}
    named = {name.replace("_", "-"): value for name, value in flags.items()}
    return build_spec("web:1", command, named, {"HOST": "here"}, files.__getitem__)


def test_a_spec_holds_what_was_given_and_leaves_the_rest_unset() -> None:
    spec = build()
    assert spec.replicated.replicas == 1
    assert not spec.task.HasField("resources")
    assert not spec.HasField("update")
    assert not spec.task.container.HasField("init")


def test_flags_reach_their_fields() -> None:
    spec = build(
        "serve",
        "--port=80",
        name="web",
        replicas="3",
        limit_cpu="0.5",
        limit_memory="64m",
        restart_condition="on-failure",
        restart_delay="2s",
        update_order="start-first",
        update_parallelism="0",
        rollback_failure_action="continue",
        endpoint_mode="dnsrr",
        entrypoint="sh -c 'a b'",
        init=False,
        env=("C=3", "HOST", "UNSET"),
        env_file=("/vars",),
        label=("a=1", "b"),
        network=("front", "name=back,alias=db,alias=sql"),
        publish=("8000:80",),
        constraint=("node.role==worker",),
        placement_pref=("spread=node.labels.zone",),
        cap_add=("net_admin",),
        host=("db:10.0.0.5",),
        ulimit=("nofile=10:20",),
    )
    container = spec.task.container
    assert list(container.args) == ["serve", "--port=80"]
    assert list(container.command) == ["sh", "-c", "a b"]
    assert (spec.annotations.name, spec.replicated.replicas) == ("web", 3)
    assert (spec.task.resources.limits.nano_cpus, spec.task.resources.limits.memory_bytes) == (500_000_000, 64 << 20)
    assert (spec.task.restart.condition, spec.task.restart.delay_s) == (pb.RESTART_ON_FAILURE, 2)
    assert spec.update.order == pb.START_FIRST
    assert spec.update.HasField("parallelism")
    assert spec.update.parallelism == 0
    assert spec.rollback.failure_action == pb.CONTINUE
    assert spec.endpoint.mode == pb.DNSRR
    assert container.HasField("init")
    assert container.init is False
    assert list(container.env) == ["A=1", "HOST=here", "C=3"]
    assert dict(spec.annotations.labels) == {"a": "1", "b": ""}
    assert [(n.network_id, list(n.aliases)) for n in spec.task.networks] == [("front", []), ("back", ["db", "sql"])]
    assert list(spec.task.placement.spread) == ["node.labels.zone"]
    assert list(container.capability_add) == ["CAP_NET_ADMIN"]
    assert list(container.hosts) == ["10.0.0.5 db"]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"replicas": "-1"}, r'invalid value "-1" for --replicas'),
        ({"replicas": "many"}, "for --replicas"),
        ({"mode": "global", "replicas": "2"}, "--replicas can only be used"),
        ({"mode": "global-job", "replicas": "2"}, "--replicas can only be used"),
        ({"mode": "global-job", "max_concurrent": "2"}, "--max-concurrent can only be used with --mode replicated-job"),
        ({"mode": "replicated-job", "restart_condition": "any"}, "--restart-condition any cannot be used with a job"),
        ({"update_progress_deadline": "soon"}, "for --update-progress-deadline"),
        ({"mode": "cluster"}, "for --mode"),
        ({"limit_cpu": "lots"}, "for --limit-cpu"),
        ({"restart_condition": "always"}, "for --restart-condition: choose one of any, on-failure, none"),
        ({"update_max_failure_ratio": "1.5"}, "for --update-max-failure-ratio"),
        ({"rollback_failure_action": "rollback"}, "for --rollback-failure-action"),
        ({"stop_grace_period": "10"}, "for --stop-grace-period"),
        ({"constraint": ("node.rol==x",)}, "--constraint: .*node.rol"),
        ({"placement_pref": ("binpack=x",)}, "for --placement-pref"),
        ({"placement_pref": ("spread=zone",)}, "--placement-pref: "),
        ({"label": ("=x",)}, "for --label"),
        ({"env": ("=x",)}, "for --env"),
        ({"network": ("name=a,driver-opt=x",)}, "driver-opt is not supported"),
        ({"host": ("db",)}, "for --host"),
        ({"ulimit": ("nofile=20:10",)}, "for --ulimit"),
        ({"entrypoint": "sh -c 'open"}, "for --entrypoint"),
    ],
)
def test_bad_flags_are_refused_by_name(flags: dict[str, Any], why: str) -> None:
    with pytest.raises(Invalid, match=why):
        build(**flags)


def test_a_health_check_and_what_ends_it() -> None:
    spec = build(health_cmd="curl x", health_interval="5s", health_retries="2", health_start_period="1m")
    wanted = pb.HealthConfig(test=["CMD-SHELL", "curl x"], interval_s=5, retries=2, start_period_s=60)
    assert spec.task.container.health == wanted

    def after(**flags: Any) -> pb.HealthConfig:
        return updated_spec(spec, {k.replace("_", "-"): v for k, v in flags.items()}, {}, str).task.container.health

    assert after(health_timeout="1s").test == ["CMD-SHELL", "curl x"]
    assert after(no_healthcheck=True) == pb.HealthConfig(test=["NONE"])
    assert after(health_cmd="") == pb.HealthConfig(interval_s=5, retries=2, start_period_s=60)
    spec = build(no_healthcheck=True)
    assert after(health_retries="1") == pb.HealthConfig(retries=1)
    assert not build().task.container.HasField("health")


def test_devices_swap_and_volumes_per_slot() -> None:
    spec = build(
        device=("/dev/fuse", "/dev/a:/dev/b:r", "/dev/c:rw"),
        memory_swap="-1",
        memory_swappiness="0",
        volume_per_slot=("data:/var/lib/data",),
        mount=("source=x,target=/x,volume-per-slot",),
    )
    assert list(spec.task.container.devices) == [
        pb.Device(host_path="/dev/fuse"),
        pb.Device(host_path="/dev/a", container_path="/dev/b", permissions="r"),
        pb.Device(host_path="/dev/c", permissions="rw"),
    ]
    assert [(m.source, m.target, m.per_slot) for m in spec.task.container.mounts] == [
        ("x", "/x", True),
        ("data", "/var/lib/data", True),
    ]
    assert spec.task.resources.limits == pb.Resources(memory_swap_bytes=-1, memory_swappiness=0)
    flags = {"volume-per-slot-rm": ("/x",), "device-rm": ("/dev/b",), "device-add": ("/dev/fuse:r",)}
    container = updated_spec(spec, flags, {}, str).task.container
    assert [mount.target for mount in container.mounts] == ["/var/lib/data"]
    assert [(d.host_path, d.permissions) for d in container.devices] == [("/dev/fuse", "r"), ("/dev/c", "rw")]


def test_small_parsers() -> None:
    assert parse_env(["A=b=c", "X"], {}) == {"A": "b=c"}
    assert parse_env_file("\ufeffA=1\n  # no\n") == ["A=1"]
    assert parse_host("six:::1") == "::1 six"
    assert parse_network("name=n").network_id == "n"
    assert parse_ulimit("core=-1") == pb.Ulimit(name="core", soft=-1, hard=-1)
    assert (capability("all"), capability("CAP_kill")) == ("ALL", "CAP_KILL")


def existing() -> pb.ServiceSpec:
    spec = build(
        name="web",
        env=("A=1", "B=2"),
        label=("a=1",),
        publish=("8000:80",),
        mount=("type=tmpfs,target=/t",),
        constraint=("node.role==worker",),
        cap_drop=("CAP_KILL",),
    )
    spec.task.networks.add(network_id="id-front")
    return spec


def update(**flags: Any) -> pb.ServiceSpec:
    named = {name.replace("_", "-"): value for name, value in flags.items()}
    return updated_spec(existing(), named, {}, lambda ref: f"id-{ref}")


def test_an_update_without_flags_changes_nothing() -> None:
    assert update() == existing()


def test_lists_are_added_to_and_removed_from() -> None:
    spec = update(
        env_add=("B=3", "C=4"),
        env_rm=("A",),
        label_rm=("a",),
        label_add=("b=2",),
        publish_rm=("80",),
        publish_add=("9000:90",),
        mount_rm=("/t",),
        mount_add=("type=tmpfs,target=/u", "type=tmpfs,target=/v"),
        constraint_rm=("node.role==worker",),
        constraint_add=("node.hostname!=w1",),
        network_rm=("front",),
        network_add=("name=back,alias=db",),
        cap_add=("kill",),
        dns_add=("10.0.0.1",),
        force=True,
    )
    container = spec.task.container
    assert list(container.env) == ["B=3", "C=4"]
    assert dict(spec.annotations.labels) == {"b": "2"}
    assert ports_text(spec.endpoint.ports, pb.INGRESS) == "*:9000->90/tcp"
    assert [mount.target for mount in container.mounts] == ["/u", "/v"]
    assert list(spec.task.placement.constraints) == ["node.hostname!=w1"]
    assert [(n.network_id, list(n.aliases)) for n in spec.task.networks] == [("id-back", ["db"])]
    assert (list(container.capability_add), list(container.capability_drop)) == (["CAP_KILL"], [])
    assert list(container.dns_nameservers) == ["10.0.0.1"]
    assert spec.task.force_update == 1


def test_updates_that_cannot_be() -> None:
    with pytest.raises(Invalid, match="already attached to front"):
        update(network_add=("front",))
    with pytest.raises(Invalid, match="--publish-rm"):
        update(publish_rm=("443",))
    spec = build(mode="global")
    with pytest.raises(Invalid, match="replicated or replicated-job mode"):
        updated_spec(spec, {"replicas": "2"}, {}, str)


def test_switches_take_go_booleans_until_the_first_positional() -> None:
    kinds = ({"--tty": "tty", "-t": "tty"}, ["--name"])
    args = ["--tty=false", "--name", "web", "image", "--tty=true"]
    assert split_switches(args, *kinds, interspersed=False) == (
        ["--name", "web", "image", "--tty=true"],
        {"tty": False},
    )
    assert split_switches(args, *kinds, interspersed=True) == (["--name", "web", "image"], {"tty": True})
    assert split_switches(["--name", "--tty=false"], *kinds, interspersed=True) == (["--name", "--tty=false"], {})
    with pytest.raises(Invalid, match="--tty"):
        split_switches(["--tty=maybe"], *kinds, interspersed=True)


@pytest.mark.parametrize(
    ("name", "registry", "shown", "repository", "tag", "base"),
    [
        ("nginx", "docker.io", "nginx", "nginx", "latest", "nginx"),
        ("docker.io/library/nginx:1@sha256:ab", "docker.io", "nginx:1", "docker.io/library/nginx", "1", "nginx"),
        ("localhost:5000/a/web:1", "localhost:5000", "localhost:5000/a/web:1", "localhost:5000/a/web", "1", "web"),
        ("ghcr.io/x/y@sha256:ab", "ghcr.io", "ghcr.io/x/y", "ghcr.io/x/y", "<none>", "y"),
    ],
)
def test_image_names(*, name: str, registry: str, shown: str, repository: str, tag: str, base: str) -> None:
    assert registry_of(name) == registry
    assert without_digest(name) == shown
    assert repository_and_tag(name) == (repository, tag)
    assert base_name(name) == base


def test_a_bind_of_a_missing_path_is_refused_unless_a_constraint_says_where() -> None:
    spec = build_spec("web", (), {"mount": ["type=bind,source=/srv/x,target=/x"]}, {}, lambda path: "")
    refuse_missing_binds(spec, lambda path: path == "/srv/x")
    with pytest.raises(Invalid, match=r"/srv/x on this host"):
        refuse_missing_binds(spec, lambda path: False)
    spec.task.placement.constraints.append("node.hostname==w1")
    refuse_missing_binds(spec, lambda path: False)


def test_jobs() -> None:
    job = build(mode="replicated-job", replicas="5", max_concurrent="2").replicated_job
    assert (job.total_completions, job.max_concurrent) == (5, 2)
    assert build(mode="replicated-job").replicated_job.total_completions == 1
    assert build(mode="global-job").WhichOneof("mode") == "global_job"


def test_a_deadline_of_0_means_never() -> None:
    assert build(update_progress_deadline="0s").update.progress_deadline_s == -1
    assert build(rollback_progress_deadline="2m").rollback.progress_deadline_s == 120
