"""Servers on real unix sockets that answer the command line as a test scripts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from click.testing import CliRunner, Result

from proto import control_pb2 as control
from proto import control_pb2_grpc, local_pb2_grpc
from proto import local_pb2 as local
from proto import objects_pb2 as pb
from swarm.cli.main import cli

Answer = Callable[[Any, grpc.ServicerContext], Any]
STREAMS = frozenset({"Events", "WatchService", "Logs", "PullImage", "LoadImage", "ExamineNetworks"})


class Refusal(Exception):
    """Raised by an answer: the call ends with this status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Script:
    """Method name -> answer; every request is kept with its request ID. A list of answers is used up
    one a call, the last one again and again."""

    def __init__(self, **answers: Answer | list[Answer]) -> None:
        self.answers = answers
        self.calls: list[tuple[str, Any, str]] = []

    def requests(self, name: str) -> list[Any]:
        return [request for called, request, _ in self.calls if called == name]

    def request_ids(self, name: str) -> list[str]:
        return [request_id for called, _, request_id in self.calls if called == name]

    def run(self, name: str, request: Any, context: grpc.ServicerContext) -> Any:
        request_id = dict(context.invocation_metadata()).get("request-id", "")
        self.calls.append((name, request, str(request_id)))
        answer = self.answers.get(name)
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        try:
            if answer is None:
                raise Refusal(grpc.StatusCode.UNIMPLEMENTED, f"the test scripted no {name}")
            return answer(request, context)
        except Refusal as refusal:
            context.abort(refusal.code, str(refusal))


def refuse(code: grpc.StatusCode, message: str) -> Answer:
    def answer(_request: Any, _context: grpc.ServicerContext) -> Any:
        raise Refusal(code, message)

    return answer


def reply(message: Any) -> Answer:
    return lambda _request, _context: message


def _servicer(base: type, script: Script) -> Any:
    def method(name: str) -> Callable[[Any, Any, grpc.ServicerContext], Any]:
        if name in STREAMS:

            def stream(_self: Any, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
                yield from script.run(name, request, context) or ()

            return stream
        return lambda _self, request, context: script.run(name, request, context)

    names = [name for name in vars(base) if name[0].isupper()]
    return type("Scripted", (base,), {name: method(name) for name in names})()


@contextmanager
def serving(run_dir: Path, agent: Script | None, manager: Script | None) -> Iterator[None]:
    servers = []
    if agent is not None:
        server = grpc.server(ThreadPoolExecutor(4))
        local_pb2_grpc.add_LocalServicer_to_server(_servicer(local_pb2_grpc.LocalServicer, agent), server)
        server.add_insecure_port(f"unix:{run_dir / 'pyswarm.sock'}")
        servers.append(server)
    if manager is not None:
        server = grpc.server(ThreadPoolExecutor(8))
        control_pb2_grpc.add_ControlServicer_to_server(_servicer(control_pb2_grpc.ControlServicer, manager), server)
        server.add_insecure_port(f"unix:{run_dir / 'manager.sock'}")
        servers.append(server)
    for server in servers:
        server.start()
    try:
        yield
    finally:
        for server in servers:
            server.stop(0).wait(5)


class Host:
    """One host's sockets and its command line."""

    def __init__(self, run_dir: Path, agent: Script, manager: Script) -> None:
        self.run_dir = run_dir
        self.agent = agent
        self.manager = manager

    def pyswarm(
        self, *args: str, status: int = 0, env: dict[str, str] | None = None, text: str | None = None
    ) -> Result:
        """Run a command in this process; its exit status is checked."""
        host = f"unix://{self.run_dir / 'pyswarm.sock'}"
        result = CliRunner().invoke(cli, ["--host", host, *args], input=text, env=env, prog_name="pyswarm")
        assert result.exit_code == status, (result.output, result.exception)
        return result


def manager_info(**changed: Any) -> local.InfoReply:
    info = local.InfoReply(
        state=local.InfoReply.ACTIVE,
        node_id="node-self",
        cluster_id="cluster1",
        role=pb.MANAGER,
        node_addr="10.1.0.1",
        manager_socket="/run/manager.sock",
        version="9.9",
    )
    info.MergeFrom(local.InfoReply(**changed))
    return info


def a_service(name: str = "web", replicas: int = 2, version: int = 7) -> pb.Service:
    made = pb.Service(id=f"{name}-id".ljust(25, "0"), spec_version=3)
    made.meta.version = version
    made.spec.annotations.name = name
    made.spec.replicated.replicas = replicas
    made.spec.task.container.image = "web:1@sha256:aa"
    return made


def running_tasks(service: pb.Service, count: int) -> list[pb.Task]:
    tasks = []
    for slot in range(1, count + 1):
        task = pb.Task(id=f"task{slot}".ljust(25, "0"), service_id=service.id, slot=slot, node_id="node-self")
        task.spec.CopyFrom(service.spec.task)
        task.service_annotations.CopyFrom(service.spec.annotations)
        task.status.state = task.desired_state = pb.TASK_RUNNING
        tasks.append(task)
    return tasks


def converged(service: pb.Service) -> Answer:
    """A watch that shows the service converged and then stays silent until the caller leaves."""

    def answer(_request: Any, context: grpc.ServicerContext) -> Iterator[control.WatchEvent]:
        tasks = running_tasks(service, service.spec.replicated.replicas)
        yield control.WatchEvent(snapshot=True, service=service, tasks=tasks)
        hold(context)

    return answer


def hold(context: grpc.ServicerContext) -> None:
    """Return when the caller has gone (or after 20 s)."""
    from threading import Event

    gone = Event()
    context.add_callback(gone.set)
    gone.wait(20)
