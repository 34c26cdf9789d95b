"""`pyswarm service`: create, change and remove services. Showing them is in service_show.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from proto.control_pb2 import (
    GetRequest,
    ListRequest,
    RebalanceRequest,
    RemoveRequest,
    ServiceRequest,
    ServiceUpdateRequest,
)
from proto.local_pb2 import PullRequest
from proto.objects_pb2 import Service, ServiceSpec
from swarm.cli import flags as known
from swarm.cli import retry, service_show
from swarm.cli.client import RESOLVE_S, Client, connect
from swarm.cli.command import GoCommand, command, finish, for_each, given
from swarm.cli.completing import image_names, service_names
from swarm.cli.exec import exec_
from swarm.cli.failure import ApiFailure, Failure
from swarm.cli.flags import Flag, Kind
from swarm.cli.images import base_name, registry_of
from swarm.cli.mounts import refuse_missing_binds
from swarm.cli.registry_auth import find_credentials
from swarm.cli.spec import build_spec, parse_replicas, set_replicas
from swarm.cli.update import updated_spec
from swarm.cli.watch import wait_converged
from swarm.errors import Invalid
from swarm.ids import random_id

NAME_SUFFIX = 4
POLL_S = 0.5
"""Characters that tell generated names apart."""


@click.group()
def service() -> None:
    """Manage services: what should run, how many, and where.

    \b
    Example:
      pyswarm service create --name web --replicas 3 --publish 8000:80 nginx
      pyswarm service ps web
    """


def _option(flag: Flag) -> Callable[[Any], Any]:
    names = [f"--{flag.name}", *([f"-{flag.short}"] if flag.short else [])]
    # An explicit name: else click would take "--init" or "--image" apart differently from our tables.
    names.append(flag.name.replace("-", "_"))
    if flag.kind is Kind.BOOL:
        return click.option(*names, is_flag=True, default=None, help=flag.help)
    multiple = flag.kind is Kind.LIST
    return click.option(*names, metavar=flag.metavar, multiple=multiple, help=flag.help)


def _refusing(name: str, reason: str) -> Callable[[Any], Any]:
    def refuse(_ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        if value:
            raise Failure(f"--{name} is not supported: {reason}")

    parameter = "refused_" + name.replace("-", "_")
    return click.option(f"--{name}", parameter, multiple=True, hidden=True, callback=refuse, expose_value=False)


def _options(table: tuple[Flag, ...], refused: Mapping[str, str]) -> Callable[[Any], Any]:
    """All options of a table, and the hidden ones that refuse."""

    def decorate(function: Any) -> Any:
        for flag in reversed(table):
            function = _option(flag)(function)
        for name, reason in refused.items():
            function = _refusing(name, reason)(function)
        return function

    return decorate


@service.command("create", cls=GoCommand, context_settings={"allow_interspersed_args": False})
@click.argument("image", shell_complete=image_names)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND] [ARG]...")
@_options(known.CREATE, known.REFUSED_CREATE)
def create(image: str, command: tuple[str, ...], **params: Any) -> None:
    """Create a service and wait until its tasks run.

    \b
    Example:
      pyswarm service create --name web --replicas 3 --network wpnet --publish 8000:80 nginx
    """
    flags = given(params)
    spec = build_spec(image, command, flags, os.environ, _read_env_file)
    refuse_missing_binds(spec, os.path.exists)
    if not spec.annotations.name:
        spec.annotations.name = f"{base_name(image)}-{random_id()[-NAME_SUFFIX:]}"
    client = connect()
    _pin_image(client, spec, image, flags)
    reply = client.call(client.control.CreateService, ServiceRequest(spec=spec))
    _warn(reply.warnings)
    click.echo(reply.service.id)
    _wait(client, reply.service, flags)


@command(service, "rebalance")
@click.argument("service_refs", metavar="[SERVICE]...", nargs=-1, shell_complete=service_names)
@click.option("--detach", "-d", is_flag=True, help="Return at once instead of waiting until all tasks have moved.")
@click.option("--quiet", "-q", is_flag=True, help="Print no progress.")
def rebalance(service_refs: tuple[str, ...], detach: bool, quiet: bool) -> None:
    """Move tasks so that the nodes carry alike, after one has returned or joined; without a name, of all services.

    A few at a time (see --max-unavailable), each new task before the old one stops.

    \b
    Example:
      pyswarm service rebalance web
    """
    client = connect()
    names = list(service_refs)
    if not names:
        listing = client.call(client.control.ListServices, ListRequest()).services
        names = [found.spec.annotations.name for found in listing if found.spec.WhichOneof("mode") == "replicated"]

    def act(ref: str) -> str:
        moves = client.call(client.control.RebalanceService, RebalanceRequest(ref=ref)).moves
        if not moves:
            return f"{ref}: even already"
        if not detach:
            _await_moves(client, ref, quiet)
        return f"{ref}: {moves} tasks {'to move' if detach else 'moved'}"

    for_each(names, act)


def _await_moves(client: Client, ref: str, quiet: bool) -> None:
    """Until nothing is left to move and the service has converged."""
    said = -1
    while (left := client.call(client.control.GetService, GetRequest(ref=ref)).rebalance_moves) > 0:
        if left != said and not quiet:
            click.echo(f"{ref}: {left} tasks left to move")
        said = left
        time.sleep(POLL_S)
    found = client.call(client.control.GetService, GetRequest(ref=ref))
    wait_converged(client, found.id, found.spec.annotations.name, quiet=True)


@command(service, "update")
@click.argument("service_ref", metavar="SERVICE", shell_complete=service_names)
@_options(known.UPDATE, known.REFUSED_UPDATE)
def update(service_ref: str, **params: Any) -> None:
    """Change a service; its tasks are replaced as --update-* say.

    \b
    Example:
      pyswarm service update --image nginx:1.27 --update-order start-first web
      pyswarm service update --env-add MODE=fast --publish-rm 80 web
    """
    flags = given(params)
    client = connect()
    if flags.get("rollback"):
        extra = flags.keys() - {"rollback", "detach", "quiet"}
        if extra:
            raise Failure(f"other flags may not be combined with --rollback: --{', --'.join(sorted(extra))}")
        _roll_back(client, service_ref, flags)
        return
    pinned = ""
    auth = ""
    if "image" in flags:
        wanted = ServiceSpec()
        _pin_image(client, wanted, flags["image"], flags)
        pinned, auth = wanted.task.container.image, wanted.task.container.registry_auth

    def change(current: Service) -> ServiceSpec:
        spec = updated_spec(current.spec, flags, os.environ, lambda ref: _network_id(client, ref))
        if flags.get("mount-add"):
            refuse_missing_binds(spec, os.path.exists)
        container = spec.task.container
        container.image = pinned or container.image
        if auth or flags.get("with-registry-auth"):
            container.registry_auth = auth or _credentials(container.image)
        return spec

    changed = rewrite(client, service_ref, change)
    click.echo(service_ref)
    _wait(client, changed, flags)


@command(service, "scale")
@click.argument("targets", nargs=-1, required=True, metavar="SERVICE=REPLICAS...", shell_complete=service_names)
@click.option("--detach", "-d", is_flag=True, help="Return at once instead of waiting for convergence.")
def scale(targets: tuple[str, ...], detach: bool) -> None:
    """Set the number of tasks of one or more replicated services.

    \b
    Example:
      pyswarm service scale web=5 worker=3
    """
    wanted = [_scale_target(text) for text in targets]
    client = connect()
    failures: list[str] = []
    scaled: list[Service] = []
    for name, replicas in wanted:
        try:
            scaled.append(rewrite(client, name, lambda current, replicas=replicas: _scaled(current, replicas)))  # type: ignore[misc]
            click.echo(f"{name} scaled to {replicas}")
        except (Failure, Invalid) as failure:
            failures.append(f"{name}: {failure}" if name not in str(failure) else str(failure))
    for changed in scaled:
        _wait(client, changed, {"detach": detach})
    finish(failures)


def _scale_target(text: str) -> tuple[str, int]:
    name, equals, count = text.partition("=")
    if not name or not equals:
        raise Invalid(f'invalid scale "{text}": write SERVICE=REPLICAS, such as web=5')
    try:
        return name, parse_replicas(count)
    except Invalid as error:
        raise Invalid(f'invalid replicas in "{text}": {error}') from None


def _scaled(current: Service, replicas: int) -> ServiceSpec:
    spec = ServiceSpec()
    spec.CopyFrom(current.spec)
    set_replicas(spec, replicas)
    return spec


@command(service, "rollback")
@click.argument("service_ref", metavar="SERVICE", shell_complete=service_names)
@click.option("--detach", "-d", is_flag=True, help="Return at once instead of waiting for convergence.")
@click.option("--quiet", "-q", is_flag=True, help="Print no progress.")
def rollback(service_ref: str, detach: bool, quiet: bool) -> None:
    """Return a service to its previous specification.

    \b
    Example:
      pyswarm service rollback web
    """
    _roll_back(connect(), service_ref, {"detach": detach, "quiet": quiet})


def _roll_back(client: Client, ref: str, flags: Mapping[str, Any]) -> None:
    def check(current: Service) -> None:
        if not current.HasField("previous_spec"):
            raise Failure(f"service {ref} does not have a previous specification to roll back to")

    changed = rewrite(client, ref, check)
    click.echo(ref)
    _wait(client, changed, flags, rolling_back=True)


@command(service, "rm")
@click.argument("service_refs", metavar="SERVICE...", nargs=-1, required=True, shell_complete=service_names)
def remove(service_refs: tuple[str, ...]) -> None:
    """Remove services; their tasks are stopped.

    \b
    Example:
      pyswarm service rm web worker
    """
    client = connect()

    def act(ref: str) -> str:
        client.call(client.control.RemoveService, RemoveRequest(ref=ref))
        return ref

    for_each(service_refs, act)


# ---------------------------------------------------------------- shared


def rewrite(client: Client, ref: str, change: Callable[[Service], ServiceSpec | None]) -> Service:
    """Read, change, write with the version that was read; again when somebody else wrote meanwhile.
    `change` returns None to roll back. Raises Failure or Invalid."""
    started_s = time.monotonic()
    attempt = 0
    tried: Service | None = None
    while True:
        attempt += 1
        current = client.call(client.control.GetService, GetRequest(ref=ref))
        if tried is not None and current.spec == tried.spec and current.id == tried.id:
            return current  # an earlier attempt was stored, only its answer was lost
        spec = change(current)
        tried = Service(id=current.id, spec=spec if spec is not None else current.previous_spec)
        request = ServiceUpdateRequest(id=current.id, version=current.meta.version, spec=spec, rollback=spec is None)
        try:
            reply = client.call(client.control.UpdateService, request, retry_conflict=False)
        except ApiFailure as failure:
            pause_s = retry.delay_s(failure.code, attempt, time.monotonic() - started_s)
            if failure.code != "ABORTED" or pause_s is None:
                raise
            time.sleep(pause_s)
            continue
        _warn(reply.warnings)
        return reply.service


def _wait(client: Client, target: Service, flags: Mapping[str, Any], rolling_back: bool = False) -> None:
    if not flags.get("detach"):
        wait_converged(client, target.id, target.spec.annotations.name, bool(flags.get("quiet")), rolling_back)


def _pin_image(client: Client, spec: ServiceSpec, image: str, flags: Mapping[str, Any]) -> None:
    """Put the image, pinned by digest unless --no-resolve-image, and wanted credentials into the spec."""
    container = spec.task.container
    container.image = image
    if flags.get("with-registry-auth"):
        container.registry_auth = _credentials(image)
    if flags.get("no-resolve-image"):
        return
    try:
        request = PullRequest(name=image, registry_auth=container.registry_auth)
        container.image = client.ask(client.local.ResolveImage, request, RESOLVE_S).name or image
    except ApiFailure as failure:
        if failure.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            raise Failure(
                f"image {image} could not be resolved: {failure.message}. Load it (pyswarm image load -i FILE), "
                "fix the registry, or use --no-resolve-image"
            ) from None
        raise


def _credentials(image: str) -> str:
    packed = find_credentials(image, os.environ)
    if not packed:
        click.echo(f"Warning: no credentials for registry {registry_of(image)} are stored for this user", err=True)
    return packed


def _network_id(client: Client, ref: str) -> str:
    return client.call(client.control.GetNetwork, GetRequest(ref=ref)).id


def _read_env_file(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise Invalid(f'invalid value "{path}" for --env-file: {error.strerror}') from None
    except UnicodeDecodeError:
        raise Invalid(f'invalid value "{path}" for --env-file: it is no text in UTF-8') from None


def _warn(warnings: Any) -> None:
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)


for _command in (exec_, service_show.list_services, service_show.list_tasks, service_show.inspect, service_show.logs):
    service.add_command(_command)
