"""Whole commands against servers on real unix sockets: what is sent, printed, and the exit status."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from proto import control_pb2 as control
from proto import local_pb2 as local
from proto import objects_pb2 as pb
from proto.dispatch_pb2 import LogLine
from swarm.cli.main import COMMANDS, cli
from tests.cli_servers import (
    Host,
    Refusal,
    Script,
    a_service,
    converged,
    hold,
    manager_info,
    refuse,
    reply,
    running_tasks,
    serving,
)
from tests.waiting import INTERRUPTIBLE

Status = grpc.StatusCode


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A manager with one service, `web`, that has converged."""
    service = a_service()
    agent = Script(
        Info=reply(manager_info()), ResolveImage=reply(local.ResolveReply(name="web:2@sha256:bb", in_store=True))
    )
    manager = Script(
        GetService=reply(service),
        CreateService=reply(control.ServiceReply(service=service, warnings=["look out"])),
        UpdateService=reply(control.ServiceReply(service=service)),
        WatchService=converged(service),
        ListNodes=reply(control.NodeList()),
    )
    with serving(tmp_path, agent, manager):
        yield Host(tmp_path, agent, manager)


# ---------------------------------------------------------------- create, update, scale


def test_create_pins_the_image_sends_the_spec_and_waits(host: Host) -> None:
    result = host.pyswarm(
        "service", "create", "--name", "web", "--replicas", "2", "-p", "8000:80", "web:2", "serve", "-x"
    )
    assert result.stdout.splitlines() == [
        a_service().id,
        "overall progress: 2 out of 2 tasks",
        "verify: Service converged",
    ]
    assert "Warning: look out" in result.stderr
    spec = host.manager.requests("CreateService")[0].spec
    assert spec.task.container.image == "web:2@sha256:bb"
    assert list(spec.task.container.args) == ["serve", "-x"]
    assert spec.endpoint.ports[0].published_port == 8000


def test_create_without_a_name_takes_the_images(host: Host) -> None:
    host.pyswarm("service", "create", "--detach", "--no-resolve-image", "localhost:5000/team/api:1")
    spec = host.manager.requests("CreateService")[0].spec
    assert spec.annotations.name.startswith("api-")
    assert spec.task.container.image == "localhost:5000/team/api:1"
    assert not host.agent.requests("ResolveImage")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--replicas", "-1", "web"], ["--replicas", "-1"]),
        (["--publish", "70000:80", "web"], ["--publish", "70000"]),
        (["--constraint", "node.rol==x", "web"], ["--constraint", "node.rol"]),
        (["--mount", "type=bind,source=x,target=/y", "web"], ["--mount"]),
        (["--limit-memory", "much", "web"], ["--limit-memory"]),
        (["--secret", "s", "web"], ["--secret is not supported"]),
        (["--health-interval", "soon", "web"], ["--health-interval"]),
        (["--health-cmd", "true", "--no-healthcheck", "web"], ["--no-healthcheck conflicts with --health-cmd"]),
        (["--volume-per-slot", "data", "web"], ["--volume-per-slot", "NAME:TARGET"]),
        (["--device", "fuse", "web"], ["--device", "HOST"]),
        (["--log-driver", "syslog", "web"], ["--log-driver is not supported"]),
        (["--mode", "global-job", "--replicas", "2", "web"], ["--replicas can only be used"]),
        (["--env-file", "/does/not/exist", "web"], ["--env-file"]),
    ],
)
def test_bad_values_are_one_clear_line_and_nothing_is_sent(host: Host, args: list[str], words: list[str]) -> None:
    result = host.pyswarm("service", "create", *args, status=1)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words)
    assert not host.manager.calls


def test_wrong_usage_exits_with_2(host: Host) -> None:
    host.pyswarm("service", "create", status=2)
    host.pyswarm("service", "create", "--colour", "red", "web", status=2)
    host.pyswarm("serve", status=2)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (Status.NOT_FOUND, ["no such image: web:2"]),
        (Status.UNAVAILABLE, ["no such image: web:2", "image load", "--no-resolve-image"]),
    ],
)
def test_an_image_that_cannot_be_resolved_creates_nothing(host: Host, code: grpc.StatusCode, words: list[str]) -> None:
    host.agent.answers["ResolveImage"] = refuse(code, "no such image: web:2")
    result = host.pyswarm("service", "create", "web:2", status=1)
    assert all(word in result.stderr for word in words)
    assert not host.manager.requests("CreateService")


def test_credentials_of_the_images_registry_go_along(host: Host, tmp_path: Path) -> None:
    auth = tmp_path / "auth.json"
    packed = base64.b64encode(b"me:pass:word").decode()
    auth.write_text(json.dumps({"auths": {"reg.example": {"auth": packed}}}))
    args = ("service", "create", "-d", "--with-registry-auth", "reg.example/a/web:2")
    host.pyswarm(*args, env={"REGISTRY_AUTH_FILE": str(auth)})
    sent = host.manager.requests("CreateService")[0].spec.task.container.registry_auth
    assert json.loads(base64.b64decode(sent)) == {"username": "me", "password": "pass:word"}
    assert host.agent.requests("ResolveImage")[0].registry_auth == sent


def test_the_apis_refusal_is_printed_as_it_is(host: Host) -> None:
    host.manager.answers["CreateService"] = refuse(Status.ALREADY_EXISTS, "name conflicts with an existing object: web")
    result = host.pyswarm("service", "create", "web", status=1)
    assert result.stderr == "Error: name conflicts with an existing object: web\n"


def test_writes_are_repeated_with_the_same_request_id_while_there_is_no_leader(host: Host) -> None:
    done = host.manager.answers["CreateService"]
    assert not isinstance(done, list)
    no_leader = refuse(Status.UNAVAILABLE, "the swarm does not have a leader")
    host.manager.answers["CreateService"] = [no_leader, no_leader, done]
    host.pyswarm("service", "create", "-d", "web")
    ids = host.manager.request_ids("CreateService")
    assert len(ids) == 3
    assert len(set(ids)) == 1
    assert ids[0]


def test_update_sends_the_version_it_read_and_reads_again_after_a_conflict(host: Host) -> None:
    host.manager.answers["GetService"] = [reply(a_service(version=7)), reply(a_service(version=8))]
    done = host.manager.answers["UpdateService"]
    assert not isinstance(done, list)
    host.manager.answers["UpdateService"] = [refuse(Status.ABORTED, "update out of sequence"), done]
    result = host.pyswarm("service", "update", "-d", "--env-add", "A=1", "--read-only=false", "web")
    assert result.stdout == "web\n"
    assert [request.version for request in host.manager.requests("UpdateService")] == [7, 8]
    assert list(host.manager.requests("UpdateService")[1].spec.task.container.env) == ["A=1"]
    assert len(set(host.manager.request_ids("UpdateService"))) == 2


def test_update_pins_a_new_image_and_leaves_the_old_one_alone(host: Host) -> None:
    host.pyswarm("service", "update", "-d", "--image", "web:2", "web")
    host.pyswarm("service", "update", "-d", "--force", "web")
    sent = [request.spec.task for request in host.manager.requests("UpdateService")]
    assert [task.container.image for task in sent] == ["web:2@sha256:bb", "web:1@sha256:aa"]
    assert sent[1].force_update == 1


def test_rollback_needs_a_previous_spec(host: Host) -> None:
    result = host.pyswarm("service", "rollback", "web", status=1)
    assert "does not have a previous specification" in result.stderr
    service = a_service()
    service.previous_spec.CopyFrom(a_service(replicas=1).spec)
    host.manager.answers["GetService"] = reply(service)
    host.pyswarm("service", "update", "--rollback", "-d", "web")
    assert host.manager.requests("UpdateService")[0].rollback
    result = host.pyswarm("service", "update", "--rollback", "--force", "web", status=1)
    assert "may not be combined" in result.stderr


def test_scale_several_at_once(host: Host) -> None:
    services = {name: a_service(name) for name in ("a", "b")}

    def find(request: Any, _context: grpc.ServicerContext) -> pb.Service:
        if request.ref not in services:
            refuse(Status.NOT_FOUND, f"no such service: {request.ref}")(request, _context)
        return services[request.ref]

    host.manager.answers["GetService"] = find
    result = host.pyswarm("service", "scale", "-d", "a=5", "nope=1", "b=3", status=1)
    assert result.stdout == "a scaled to 5\nb scaled to 3\n"
    assert result.stderr == "Error: no such service: nope\n"
    assert [r.spec.replicated.replicas for r in host.manager.requests("UpdateService")] == [5, 3]


@pytest.mark.parametrize("target", ["web=-1", "web", "web=x", "=3"])
def test_a_bad_scale_sends_nothing(host: Host, target: str) -> None:
    assert target in host.pyswarm("service", "scale", target, status=1).stderr
    assert not host.manager.calls


# ---------------------------------------------------------------- waiting


def test_waiting_survives_a_lost_leader_and_says_so_once(host: Host) -> None:
    service = a_service()
    gone = refuse(Status.UNAVAILABLE, "the swarm does not have a leader")

    def half(_request: Any, _context: grpc.ServicerContext) -> Iterator[control.WatchEvent]:
        yield control.WatchEvent(snapshot=True, service=service, tasks=running_tasks(service, 1))

    host.manager.answers["WatchService"] = [half, gone, gone, converged(service)]
    result = host.pyswarm("service", "scale", "web=2")
    assert result.stdout.splitlines()[1:] == [
        "overall progress: 1 out of 2 tasks",
        "overall progress: 2 out of 2 tasks",
        "verify: Service converged",
    ]
    assert result.stderr.count("lost the manager") == 1


def test_a_paused_update_is_a_failure(host: Host) -> None:
    service = a_service()
    service.update_status.state = pb.UpdateStatus.PAUSED
    service.update_status.message = "update paused due to failure"
    host.manager.answers["WatchService"] = converged(service)
    result = host.pyswarm("service", "update", "--force", "web", status=1)
    assert "Error: service update paused: update paused due to failure" in result.stderr


def test_a_service_removed_meanwhile_ends_the_wait(host: Host) -> None:
    event = control.WatchEvent(service_removed=True)
    host.manager.answers["WatchService"] = reply([event])
    assert "was removed" in host.pyswarm("service", "update", "--force", "web", status=1).stderr


def test_ctrl_c_leaves_with_a_hint(host: Host) -> None:
    service = a_service(replicas=3)

    def never(_request: Any, context: grpc.ServicerContext) -> Iterator[control.WatchEvent]:
        yield control.WatchEvent(snapshot=True, service=service, tasks=running_tasks(service, 1))
        hold(context)

    host.manager.answers["WatchService"] = never
    socket = f"unix://{host.run_dir / 'pyswarm.sock'}"
    words = ["swarm.cli.main", "-H", socket, "service", "update", "--force", "web"]
    command = [*INTERRUPTIBLE, sys.executable, "-m", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "web\n"
    assert process.stdout.readline() == "overall progress: 1 out of 3 tasks\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "pyswarm service ps web" in errors


def test_a_terminal_gets_bars(host: Host) -> None:
    ours, theirs = pty.openpty()
    socket = f"unix://{host.run_dir / 'pyswarm.sock'}"
    command = [sys.executable, "-m", "swarm.cli.main", "-H", socket, "service", "scale", "web=2"]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.STDOUT, env=environ) as process:
        os.close(theirs)
        screen = b""
        with contextlib.suppress(OSError):  # EIO: the terminal's other end has been closed
            while data := os.read(ours, 65536):
                screen += data
        os.close(ours)
        assert process.wait(20) == 0, screen
    text = screen.decode()
    assert "overall progress: 2 out of 2 tasks" in text
    assert "2/2: running   [" in text
    assert "Traceback" not in text
    assert text.rstrip().endswith("verify: Service converged")


# ---------------------------------------------------------------- showing


def test_service_ls(host: Host) -> None:
    counts = [control.ServiceCounts(service_id=a_service().id, running=1, desired=2)]
    host.manager.answers["ListServices"] = reply(control.ServiceList(services=[a_service()], counts=counts))
    result = host.pyswarm("service", "ls")
    assert result.stdout.splitlines() == [
        "ID             NAME      MODE         REPLICAS   IMAGE     PORTS",
        "web-id000000   web       replicated   1/2        web:1",
    ]
    assert host.pyswarm("service", "ls", "-q").stdout == "web-id000000\n"
    assert json.loads(host.pyswarm("service", "ls", "--format", "json").stdout)["Replicas"] == "1/2"
    assert host.pyswarm("service", "ls", "--format", "{{.Name}}", "-f", "mode=global").stdout == ""
    host.pyswarm("service", "ls", "--filter", "name=we", "--filter", "label=a=1")
    sent = host.manager.requests("ListServices")[-1].filter
    assert (list(sent.names), dict(sent.labels)) == (["we"], {"a": "1"})
    assert "invalid filter" in host.pyswarm("service", "ls", "-f", "colour=red", status=1).stderr


def test_service_ps_names_nodes_and_tells_unknown_services(host: Host) -> None:
    service = a_service()
    node = pb.Node(id="node-self")
    node.description.hostname = "m1"
    host.manager.answers["ListTasks"] = reply(control.TaskList(tasks=running_tasks(service, 2)))
    host.manager.answers["ListNodes"] = reply(control.NodeList(nodes=[node]))
    host.manager.answers["GetService"] = [reply(service), refuse(Status.NOT_FOUND, "no such service: nope")]
    result = host.pyswarm("service", "ps", "--format", "{{.Name}} {{.Node}}", "web", "nope", status=1)
    assert result.stdout == "web.1 m1\nweb.2 m1\n"
    assert result.stderr == "Error: no such service: nope\n"


def test_inspect_prints_what_it_finds_and_tells_the_rest(host: Host) -> None:
    host.manager.answers["GetService"] = [reply(a_service()), refuse(Status.NOT_FOUND, "no such service: nope")]
    result = host.pyswarm("service", "inspect", "web", "nope", status=1)
    assert [found["Spec"]["Name"] for found in json.loads(result.stdout)] == ["web"]
    assert result.stderr == "Error: no such service: nope\n"
    host.manager.answers["GetService"] = reply(a_service())
    assert host.pyswarm("service", "inspect", "-f", "{{.Version.Index}}", "web").stdout == "7\n"
    host.manager.answers["ListNetworks"] = reply(control.NetworkList())
    assert "Replicas:" in host.pyswarm("service", "inspect", "--pretty", "web").stdout


def test_logs_keep_the_streams_apart(host: Host) -> None:
    task = running_tasks(a_service(), 1)[0]
    lines = [LogLine(task_id=task.id, data=b"out\n"), LogLine(task_id=task.id, data=b"err", stderr=True)]
    host.manager.answers["Logs"] = reply([control.LogsReply(lines=lines), control.LogsReply(warning="w1 is down")])
    host.manager.answers["GetTask"] = reply(task)
    result = host.pyswarm("service", "logs", "--tail", "5", "--since", "10", "web")
    assert result.stdout == "web.1.task10000000@node-self    | out\n"
    assert result.stderr == "web.1.task10000000@node-self    | err\nWarning: w1 is down\n"
    options = host.manager.requests("Logs")[0].options
    assert (options.tail, options.since, options.stdout) == (5, 10, True)
    assert len(host.manager.requests("GetTask")) == 1
    assert "--tail" in host.pyswarm("service", "logs", "--tail", "-3", "web", status=1).stderr


# ---------------------------------------------------------------- nodes, networks, images, the swarm


def a_node(role: pb.NodeRole.ValueType) -> pb.Node:
    node = pb.Node(id="node-self", role=role, manager_addr="10.1.0.1:2378")
    node.spec.desired_role = role
    node.description.hostname = "m1"
    node.meta.version = 4
    return node


def test_nodes(host: Host) -> None:
    host.manager.answers["ListNodes"] = reply(control.NodeList(nodes=[a_node(pb.WORKER)]))
    host.manager.answers["GetNode"] = reply(a_node(pb.WORKER))
    host.manager.answers["UpdateNode"] = reply(a_node(pb.MANAGER))
    assert host.pyswarm("node", "ls").stdout.splitlines()[1].startswith("node-self *   m1         Unknown   Active")
    assert host.pyswarm("node", "ls", "-q").stdout == "node-self\n"
    assert host.pyswarm("node", "promote", "m1").stdout == "Node m1 promoted to a manager in the swarm.\n"
    assert host.pyswarm("node", "demote", "m1").stdout == "Node m1 is already a worker.\n"
    host.pyswarm("node", "update", "--availability", "drain", "--label-add", "zone=a", "m1")
    sent = host.manager.requests("UpdateNode")
    assert [request.version for request in sent] == [4, 4]
    assert sent[0].spec.desired_role == pb.MANAGER
    assert sent[1].spec.availability == pb.DRAINED
    assert "--availability" in host.pyswarm("node", "update", "--availability", "off", "m1", status=1).stderr
    assert "--label-rm" in host.pyswarm("node", "update", "--label-rm", "nope", "m1", status=1).stderr


def test_self_is_this_host_and_not_the_leader(host: Host) -> None:
    host.manager.answers["GetNode"] = reply(a_node(pb.MANAGER))
    host.pyswarm("node", "inspect", "self")
    assert host.manager.requests("GetNode")[0].ref == "node-self"


def test_networks(host: Host) -> None:
    network = pb.Network(id="n" * 25)
    network.spec.annotations.name = "wpnet"
    host.manager.answers["CreateNetwork"] = reply(network)
    host.manager.answers["ListNetworks"] = reply(control.NetworkList(networks=[network]))
    host.manager.answers["GetNetwork"] = reply(network)
    host.manager.answers["RemoveNetwork"] = refuse(Status.FAILED_PRECONDITION, "network wpnet is in use by service web")
    created = host.pyswarm("network", "create", "-d", "overlay", "--subnet", "10.5.0.0/24", "--label", "a=1", "wpnet")
    assert created.stdout == "n" * 25 + "\n"
    assert host.manager.requests("CreateNetwork")[0].spec.ipam.subnet == "10.5.0.0/24"
    assert host.pyswarm("network", "ls").stdout.splitlines() == [
        "NETWORK ID     NAME      DRIVER    SCOPE",
        "nnnnnnnnnnnn   wpnet     overlay   swarm",
    ]
    assert "in use" in host.pyswarm("network", "rm", "wpnet", status=1).stderr


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--subnet", "10.5.0.1/24"], "--subnet"),
        (["--subnet", "10.5.0.0/24", "--subnet", "10.6.0.0/24"], "at most one IPv4 and one IPv6"),
        (["--subnet", "10.5.0.0/24", "--gateway", "10.6.0.1"], "--gateway: it does not lie in 10.5.0.0/24"),
        (["--subnet", "10.5.0.0/24", "--gateway", "10.5.0.1", "--gateway", "10.5.0.2"], "has one already"),
        (["--gateway", "10.6.0.1"], "--gateway needs --subnet"),
        (["--aux-address", "a=10.6.0.1"], "--aux-address needs --subnet"),
        (["--subnet", "10.5.0.0/24", "--aux-address", "10.5.0.9"], "write NAME=ADDRESS"),
        (["--subnet", "10.5.0.0/24", "--ip-range", "10.6.0.0/28"], "--ip-range"),
        (["--scope", "local"], "--scope local is not supported"),
        (["--ipv4=false"], "--ipv4=false is not supported"),
        (["--ipam-driver", "dhcp"], "--ipam-driver"),
        (["--config-only"], "--config-only"),
    ],
)
def test_bad_networks(host: Host, args: list[str], word: str) -> None:
    assert word in host.pyswarm("network", "create", *args, "n", status=1).stderr
    assert not host.manager.calls


def test_each_address_of_a_network_goes_to_the_subnet_it_lies_in(host: Host) -> None:
    host.manager.answers["CreateNetwork"] = reply(pb.Network(id="n" * 25))
    flags = (
        "--ipv6 --subnet 10.5.0.0/24 --subnet fd00:5::/64 --gateway fd00:5::fe --ip-range 10.5.0.128/25 --attachable"
    )
    aux = ("--aux-address", "a=10.5.0.9", "--aux-address", "b=fd00:5::9")
    made = host.pyswarm("network", "create", *flags.split(), *aux, "-o", "encrypted", "n")
    spec = host.manager.requests("CreateNetwork")[0].spec
    assert spec.ipam == pb.IpamConfig(subnet="10.5.0.0/24", ip_range="10.5.0.128/25", aux_addresses={"a": "10.5.0.9"})
    assert spec.ipam6 == pb.IpamConfig(subnet="fd00:5::/64", gateway="fd00:5::fe", aux_addresses={"b": "fd00:5::9"})
    assert (spec.ipv6, spec.attachable, dict(spec.options)) == (True, True, {"encrypted": ""})
    assert "--attachable has no effect" in made.stderr
    assert made.stdout == "n" * 25 + "\n"


def a_network(name: str, **spec: object) -> pb.Network:
    made = pb.Network(id=name.ljust(25, "0"), spec=pb.NetworkSpec(**spec))  # type: ignore[arg-type]
    made.spec.annotations.name = name
    return made


def test_networks_are_filtered_by_kind_and_use(host: Host) -> None:
    networks = [a_network("host", driver="host"), a_network("none", driver="none"), a_network("in", ingress=True)]
    networks += [a_network("used"), a_network("free", ipv6=True)]
    service = a_service()
    service.spec.task.networks.add(network_id=networks[3].id)
    host.manager.answers["ListNetworks"] = reply(control.NetworkList(networks=networks))
    host.manager.answers["ListServices"] = reply(control.ServiceList(services=[service]))

    def names(*filters: str) -> str:
        flags = [word for text in filters for word in ("--filter", text)]
        return host.pyswarm("network", "ls", *flags, "--format", "{{.Name}}").stdout.replace("\n", " ").strip()

    assert names("type=custom") == "free used"
    assert names("type=builtin", "scope=local") == "host none"
    assert names("driver=null") == "none"
    assert names("name=r") == "free"
    assert names("name=se", "name=os") == "host used"
    assert "type=foo" in host.pyswarm("network", "ls", "--filter", "type=foo", status=1).stderr
    assert names("dangling=true") == "free"
    assert names("dangling=false") == "host in none used"
    ipv6 = host.pyswarm("network", "ls", "--filter", "type=custom", "--format", "{{.Name}} {{.IPv6}}").stdout
    assert ipv6 == "free true\nused false\n"


def test_the_ingress_network_is_removed_after_a_question(host: Host) -> None:
    host.manager.answers["GetNetwork"] = reply(a_network("ingress", ingress=True))
    host.manager.answers["RemoveNetwork"] = reply(control.RemoveReply(id="ingress"))
    asked = host.pyswarm("network", "rm", "ingress", text="n\n", status=1)
    assert "Without an ingress network" in asked.output
    assert not host.manager.requests("RemoveNetwork")
    host.pyswarm("network", "rm", "ingress", text="y\n")
    host.pyswarm("network", "rm", "--force", "ingress")
    assert len(host.manager.requests("RemoveNetwork")) == 2


def test_prune_removes_what_is_not_in_use(host: Host) -> None:
    def remove(request: control.RemoveRequest, _: object) -> control.RemoveReply:
        if request.ref.startswith("used"):
            raise Refusal(Status.FAILED_PRECONDITION, "in use")
        return control.RemoveReply(id=request.ref)

    networks = [a_network("host", driver="host"), a_network("in", ingress=True), a_network("used"), a_network("free")]
    host.manager.answers["ListNetworks"] = reply(control.NetworkList(networks=networks))
    host.manager.answers["RemoveNetwork"] = remove
    assert not host.pyswarm("network", "prune", text="n\n").stdout.count("Deleted")
    assert not host.manager.calls
    pruned = host.pyswarm("network", "prune", "--force", "--filter", "label=stage=test")
    assert pruned.stdout == "Deleted Networks:\nfree\n"
    assert dict(host.manager.requests("ListNetworks")[0].filter.labels) == {"stage": "test"}


@pytest.mark.parametrize("command", ["connect", "disconnect"])
def test_containers_are_not_connected_to_networks(host: Host, command: str) -> None:
    refused = host.pyswarm("network", command, "--alias", "db", "n", "container", status=1)
    assert f"network {command} is not supported" in refused.stderr
    assert "service update --network-" in refused.stderr


def test_images(host: Host, tmp_path: Path) -> None:
    received: list[bytes] = []

    def load(chunks: Any, _context: grpc.ServicerContext) -> list[local.ImageProgress]:
        received.extend(chunk.data for chunk in chunks)
        return [local.ImageProgress(message="reading"), local.ImageProgress(names=["docker.io/library/web:1"])]

    archive = tmp_path / "web.tar"
    archive.write_bytes(b"x" * 3_000_000)
    host.agent.answers["LoadImage"] = load
    host.agent.answers["ListImages"] = reply(local.ImageList(images=[local.Image(id="ab", names=["web:1"])]))
    host.agent.answers["RemoveImage"] = reply(local.ImageRemoveReply(untagged=["web:1"], deleted="sha256:ab"))
    assert host.pyswarm("image", "load", "-i", str(archive)).stdout == "Loaded image: web:1\n"
    assert b"".join(received) == archive.read_bytes()
    assert len(received) == 4
    assert host.pyswarm("image", "ls", "-q", "-f", "reference=web*").stdout == "ab\n"
    assert host.pyswarm("image", "ls", "-q", "-f", "reference=api").stdout == ""
    assert host.pyswarm("image", "rm", "web:1").stdout == "Untagged: web:1\nDeleted: sha256:ab\n"
    assert "cannot read" in host.pyswarm("image", "load", "-i", "/does/not/exist", status=1).stderr


def test_forming_and_joining(host: Host) -> None:
    tokens = pb.JoinTokens(worker="SWMTKN-1-w", manager="SWMTKN-1-m")
    init_reply = local.InitReply(node_id="abc", tokens=tokens, join_addr="10.1.0.1:2377")
    host.agent.answers["Init"] = reply(init_reply)
    host.agent.answers["Join"] = reply(local.JoinReply(role=pb.MANAGER))
    host.agent.answers["Leave"] = refuse(Status.FAILED_PRECONDITION, "this node is a manager: use --force")
    text = host.pyswarm("swarm", "init", "--default-addr-pool", "10.9.0.0/16", "--cert-expiry", "24h").stdout
    assert "Swarm initialized: current node (abc) is now a manager." in text
    assert "    pyswarm swarm join --token SWMTKN-1-w 10.1.0.1:2377\n" in text
    sent = host.agent.requests("Init")[0]
    assert (list(sent.default_addr_pool), sent.node_cert_expiry_s) == (["10.9.0.0/16"], 86400)
    joined = host.pyswarm("swarm", "join", "--token", "SWMTKN-1-m", "10.1.0.1:2377")
    assert joined.stdout == "This node joined a swarm as a manager.\n"
    assert host.pyswarm("swarm", "leave", status=1).stderr == "Error: this node is a manager: use --force\n"


def test_join_tokens(host: Host) -> None:
    cluster = pb.Cluster(join_tokens=pb.JoinTokens(worker="W", manager="M"))
    host.manager.answers["GetCluster"] = reply(cluster)
    host.manager.answers["RotateJoinToken"] = reply(cluster)
    host.manager.answers["GetNode"] = reply(a_node(pb.MANAGER))
    assert host.pyswarm("swarm", "join-token", "-q", "manager").stdout == "M\n"
    text = host.pyswarm("swarm", "join-token", "--rotate", "worker").stdout
    assert text.startswith("Successfully rotated worker join token.\n")
    assert "    pyswarm swarm join --token W 10.1.0.1:2377\n" in text


KEY = "SWMKEY-1-7c37Cc8654o6p38HnroywCi19pllOnGtbdZEgtKxZu8"
HOW_TO_UNLOCK = f"""To unlock a swarm manager after it restarts, run the `pyswarm swarm unlock`
command and provide the following key:

    {KEY}

Please remember to store this key in a password manager, since without it you
will not be able to restart the manager.
"""


def test_autolock(host: Host) -> None:
    cluster = pb.Cluster()
    host.manager.answers["GetCluster"] = reply(cluster)
    host.manager.answers["UpdateCluster"] = reply(cluster)
    host.manager.answers["GetUnlockKey"] = reply(control.UnlockKeyReply(unlock_key=KEY))
    tokens = pb.JoinTokens(worker="SWMTKN-1-w", manager="SWMTKN-1-m")
    host.agent.answers["Init"] = reply(local.InitReply(tokens=tokens, unlock_key=KEY))
    assert host.pyswarm("swarm", "init", "--autolock").stdout.endswith(f"the instructions.\n\n{HOW_TO_UNLOCK}")
    assert host.agent.requests("Init")[0].auto_lock_managers
    assert "--autolock" in host.pyswarm("swarm", "update").stdout
    assert not host.manager.requests("UpdateCluster")
    assert host.pyswarm("swarm", "update", "--autolock").stdout == "Swarm updated.\n" + HOW_TO_UNLOCK
    cluster.spec.encryption.auto_lock_managers = True
    assert host.pyswarm("swarm", "update", "--autolock=true").stdout == "Swarm updated.\n"
    assert host.pyswarm("swarm", "update", "--autolock=false").stdout == "Swarm updated.\n"
    assert [sent.auto_lock_managers for sent in host.manager.requests("UpdateCluster")] == [True, True, False]
    assert host.pyswarm("swarm", "unlock-key").stdout == HOW_TO_UNLOCK
    assert host.pyswarm("swarm", "unlock-key", "-q").stdout == KEY + "\n"
    rotated = host.pyswarm("swarm", "unlock-key", "--rotate").stdout
    assert rotated == "Successfully rotated manager unlock key.\n\n" + HOW_TO_UNLOCK
    sent = host.manager.requests("UpdateCluster")[-1]
    assert (sent.rotate_unlock_key, sent.HasField("auto_lock_managers")) == (True, False)
    host.manager.answers["GetUnlockKey"] = reply(control.UnlockKeyReply())
    assert host.pyswarm("swarm", "unlock-key", status=1).stderr == "Error: no unlock key is set\n"


def test_a_locked_host(tmp_path: Path) -> None:
    told = (
        "Error: Swarm is encrypted and needs to be unlocked before it can be used. "
        'Please use "pyswarm swarm unlock" to unlock it.\n'
    )
    info = local.InfoReply(state=local.InfoReply.LOCKED, role=pb.MANAGER, node_id="n")
    agent = Script(Info=reply(info), Unlock=reply(local.UnlockReply()))
    with serving(tmp_path, agent, None):
        host = Host(tmp_path, agent, Script())
        for words in (("node", "ls"), ("service", "ls"), ("swarm", "unlock-key"), ("swarm", "join-token", "worker")):
            assert host.pyswarm(*words, status=1).stderr == told
        assert "Swarm: locked\n" in host.pyswarm("info").stdout
        assert host.pyswarm("swarm", "unlock", text=f"{KEY}\n").output == ""
        assert agent.requests("Unlock") == [local.UnlockRequest(unlock_key=KEY)]
        info.state = local.InfoReply.ACTIVE
        assert host.pyswarm("swarm", "unlock", status=1).stderr == "Error: swarm is not locked\n"
        info.state = local.InfoReply.INACTIVE
        assert host.pyswarm("swarm", "unlock", status=1).stderr == "Error: This node is not part of a swarm\n"


def test_the_unlock_key_is_not_echoed_on_a_terminal(tmp_path: Path) -> None:
    info = local.InfoReply(state=local.InfoReply.LOCKED, role=pb.MANAGER)
    agent = Script(Info=reply(info), Unlock=reply(local.UnlockReply()))
    with serving(tmp_path, agent, None):
        terminal, screen = pty.openpty()
        argv = [sys.executable, "-m", "swarm.cli.main", "-H", f"unix://{tmp_path / 'pyswarm.sock'}", "swarm", "unlock"]
        done = subprocess.Popen(argv, stdin=screen, stdout=screen, stderr=screen, start_new_session=True)
        os.close(screen)
        seen = b""
        while b"Enter unlock key: " not in seen:
            seen += os.read(terminal, 1024)
        os.write(terminal, KEY.encode() + b"\n")
        with contextlib.suppress(OSError):  # the terminal is gone when the command has ended
            while more := os.read(terminal, 1024):
                seen += more
        os.close(terminal)
        assert done.wait(20) == 0
    assert agent.requests("Unlock") == [local.UnlockRequest(unlock_key=KEY)]
    assert seen.strip() == b"Enter unlock key:"


def test_info_and_version(host: Host) -> None:
    host.manager.answers["GetCluster"] = reply(pb.Cluster(default_addr_pool=["10.0.0.0/8"], subnet_size=24))
    host.manager.answers["ListNodes"] = reply(control.NodeList(nodes=[a_node(pb.MANAGER), a_node(pb.WORKER)]))
    text = host.pyswarm("info").stdout
    assert " Managers: 1\n Nodes: 2\n" in text
    assert host.pyswarm("info", "-f", "{{.Swarm.LocalNodeState}}").stdout == "active\n"
    assert host.pyswarm("version", "-f", "{{.Server.Version}}").stdout == "9.9\n"


# ---------------------------------------------------------------- nobody there


def test_no_daemon(tmp_path: Path) -> None:
    host = Host(tmp_path, Script(), Script())
    result = host.pyswarm("service", "ls", status=1)
    assert f"cannot connect to the pyswarm daemon at unix://{tmp_path}/pyswarm.sock: is it running?" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (local.InfoReply(state=local.InfoReply.INACTIVE), 'Use "pyswarm swarm init" or "pyswarm swarm join"'),
        (local.InfoReply(state=local.InfoReply.ACTIVE, role=pb.WORKER), "This node is not a swarm manager."),
        (local.InfoReply(state=local.InfoReply.ERROR, error="certificate expired"), "certificate expired"),
    ],
)
def test_hosts_without_a_manager_say_what_they_are(tmp_path: Path, info: local.InfoReply, words: str) -> None:
    agent = Script(Info=reply(info))
    with serving(tmp_path, agent, None):
        result = Host(tmp_path, agent, Script()).pyswarm("service", "ls", status=1)
    assert words in result.stderr


def test_only_unix_sockets_are_spoken_to() -> None:
    result = CliRunner().invoke(cli, ["-H", "tcp://10.0.0.1:2375", "service", "ls"])
    assert (result.exit_code, "unix://" in result.stderr) == (1, True)


# ---------------------------------------------------------------- help and completion


def _commands() -> Iterator[tuple[str, ...]]:
    import click

    def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield path
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None
                yield from walk(found, (*path, name))

    yield from walk(cli, ())


@pytest.mark.parametrize("path", list(_commands()), ids=" ".join)
def test_every_command_has_help(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, [*path, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output
    if path[:1] != ("lab",):
        assert "Example:" in result.output


def test_help_imports_neither_grpc_nor_rich() -> None:
    program = (
        "import sys\nfrom swarm.cli.main import cli\ncli(['--help'], standalone_mode=False)\n"
        "print([name for name in ('grpc', 'rich', 'google.protobuf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert "_PYSWARM_COMPLETE" in result.stdout


def test_names_are_completed_from_the_api_and_silence_answers_a_missing_daemon(host: Host, tmp_path: Path) -> None:
    host.manager.answers["ListServices"] = reply(control.ServiceList(services=[a_service("web"), a_service("api")]))
    words = f"pyswarm -H unix://{tmp_path}/pyswarm.sock service ps w"
    env = {"_PYSWARM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "5"}
    assert CliRunner().invoke(cli, [], env=env, prog_name="pyswarm").stdout == "plain,web\n"
    nobody = {**env, "COMP_WORDS": words.replace("pyswarm.sock", "none/pyswarm.sock")}
    assert CliRunner().invoke(cli, [], env=nobody, prog_name="pyswarm").stdout.strip() == ""
