"""`pyswarm service ls | ps | inspect | logs`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import click

from proto.control_pb2 import Filter, GetRequest, ListRequest, LogsRequest, ServiceCounts
from proto.dispatch_pb2 import LogOptions
from proto.objects_pb2 import Service, Task
from swarm.cli.client import Client, connect
from swarm.cli.command import (
    GoCommand,
    finish,
    inspect_all,
    label_filter,
    listing_options,
    parse_filters,
    show_rows,
)
from swarm.cli.completing import service_names
from swarm.cli.docker_shape import service_json
from swarm.cli.failure import ApiFailure, Failure
from swarm.cli.loglines import LogFormat, format_line
from swarm.cli.pretty import pretty_service
from swarm.cli.rows import (
    SERVICE_COLUMNS,
    TASK_COLUMNS,
    mode_word,
    natural_key,
    service_row,
    state_word,
    task_name,
    task_rows,
)
from swarm.cli.units import parse_since_s, parse_uint
from swarm.errors import Invalid

TAIL_ALL = -1


@click.command("ls", cls=GoCommand)
@listing_options(no_trunc=False, filters="id, label, mode, name")
def list_services(form: str | None, quiet: bool, filters: tuple[str, ...]) -> None:
    """List services.

    \b
    Example:
      pyswarm service ls --filter name=web --format '{{.Name}} {{.Replicas}}'
    """
    wanted = parse_filters(filters, ("id", "label", "mode", "name"))
    client = connect()
    condition = Filter(
        ids=wanted.get("id", ()), names=wanted.get("name", ()), labels=label_filter(wanted.get("label", ()))
    )
    reply = client.call(client.control.ListServices, ListRequest(filter=condition))
    counts = {item.service_id: item for item in reply.counts}
    found = [item for item in reply.services if not wanted.get("mode") or mode_word(item.spec) in wanted["mode"]]
    found.sort(key=lambda item: natural_key(item.spec.annotations.name))
    rows = [service_row(item, counts.get(item.id, ServiceCounts())) for item in found]
    show_rows(rows, SERVICE_COLUMNS, form, quiet)


@click.command("ps", cls=GoCommand)
@click.argument("service_refs", metavar="SERVICE...", nargs=-1, required=True, shell_complete=service_names)
@click.option("--no-resolve", is_flag=True, help="Show IDs instead of names.")
@listing_options(filters="id, name, node, desired-state")
def list_tasks(
    *,
    service_refs: tuple[str, ...],
    no_resolve: bool,
    form: str | None,
    quiet: bool,
    no_trunc: bool,
    filters: tuple[str, ...],
) -> None:
    """List the tasks of services, with what became of earlier ones.

    \b
    Example:
      pyswarm service ps --no-trunc --filter desired-state=running web
    """
    wanted = parse_filters(filters, ("id", "name", "node", "desired-state"))
    client = connect()
    failures: list[str] = []
    service_ids: list[str] = []
    for ref in service_refs:
        try:
            service_ids.append(client.call(client.control.GetService, GetRequest(ref=ref)).id)
        except ApiFailure as failure:
            failures.append(failure.message)
    if service_ids:
        condition = Filter(service_ids=service_ids)
        show_tasks(client, condition, wanted, form=form, quiet=quiet, no_trunc=no_trunc, no_resolve=no_resolve)
    finish(failures)


def show_tasks(
    client: Client,
    condition: Filter,
    wanted: Mapping[str, list[str]],
    *,
    form: str | None,
    quiet: bool,
    no_trunc: bool,
    no_resolve: bool,
) -> None:
    """The listing of `service ps` and `node ps`."""
    condition.node_ids.extend(resolve_node(client, ref) for ref in wanted.get("node", ()))
    tasks = client.call(client.control.ListTasks, ListRequest(filter=condition)).tasks
    kept = filter_tasks(tasks, wanted)
    names = {} if no_resolve else node_names_by_id(client)
    rows = task_rows(kept, lambda node_id: names.get(node_id, node_id), time.time(), no_trunc, no_resolve)
    show_rows(rows, TASK_COLUMNS, form, quiet)


def filter_tasks(tasks: Iterable[Task], wanted: Mapping[str, list[str]]) -> list[Task]:
    """By ID prefix, name prefix and desired state. Pure."""
    ids, names = tuple(wanted.get("id", ())), tuple(wanted.get("name", ()))
    states = {state.lower() for state in wanted.get("desired-state", ())}
    if unknown := states - {"running", "shutdown", "accepted", "ready", "remove"}:
        raise Invalid(f"invalid filter desired-state={min(unknown)}: known are running, shutdown, accepted")
    return [
        task
        for task in tasks
        if (not ids or task.id.startswith(ids))
        and (not names or task_name(task).startswith(names))
        and (not states or state_word(task.desired_state).lower() in states)
    ]


def resolve_node(client: Client, ref: str) -> str:
    """The ID of a node given by ID, prefix, host name or "self"."""
    if ref == "self":
        return client.node_id
    return client.call(client.control.GetNode, GetRequest(ref=ref)).id


def node_names_by_id(client: Client) -> dict[str, str]:
    nodes = client.call(client.control.ListNodes, ListRequest()).nodes
    return {node.id: node.description.hostname for node in nodes}


@click.command("inspect", cls=GoCommand)
@click.argument("service_refs", metavar="SERVICE...", nargs=-1, required=True, shell_complete=service_names)
@click.option("--format", "-f", "form", metavar="FORMAT", help="json, or a Go template such as '{{.Spec.Name}}'.")
@click.option("--pretty", is_flag=True, help="Text for people instead of JSON.")
def inspect(service_refs: tuple[str, ...], form: str | None, pretty: bool) -> None:
    """Show services in detail.

    \b
    Example:
      pyswarm service inspect --pretty web
      pyswarm service inspect --format '{{json .Endpoint.Ports}}' web
    """
    if pretty and form:
        raise Failure("--format is incompatible with --pretty: give one of them")
    client = connect()

    def find(ref: str) -> Service:
        return client.call(client.control.GetService, GetRequest(ref=ref))

    if pretty:
        networks = client.call(client.control.ListNetworks, ListRequest()).networks
        names = {network.id: network.spec.annotations.name for network in networks}
        inspect_all(service_refs, find, None, pretty=lambda found: pretty_service(found, names))
    else:
        inspect_all(service_refs, lambda ref: service_json(find(ref)), form)


@click.command("logs", cls=GoCommand)
@click.argument("ref", metavar="SERVICE|TASK", shell_complete=service_names)
@click.option("--follow", "-f", is_flag=True, help="Go on with what is written from now on.")
@click.option("--tail", "-n", default="all", metavar="N", help="Lines from the end of each log (default all).")
@click.option("--since", metavar="TIME", help="Lines since 10m (ago), Unix seconds, or a date.")
@click.option("--timestamps", "-t", is_flag=True, help="Show when each line was written.")
@click.option("--raw", is_flag=True, help="Only the lines, without whose they are.")
@click.option("--no-trunc", is_flag=True, help="Whole task IDs.")
@click.option("--no-task-ids", is_flag=True, help="No task IDs.")
@click.option("--no-resolve", is_flag=True, help="IDs instead of names.")
@click.option("--details", is_flag=True, hidden=True)
def logs(ref: str, follow: bool, tail: str, since: str | None, details: bool, **look: bool) -> None:
    """Show what the tasks of a service, of one of its slots (SERVICE.SLOT), or one task wrote.

    \b
    Example:
      pyswarm service logs --follow --tail 20 web
    """
    if details:
        raise Failure("--details is not supported: logs carry no extra attributes")
    options = LogOptions(follow=follow, stdout=True, stderr=True, tail=_tail(tail))
    if since:
        try:
            options.since = parse_since_s(since, time.time())
        except Invalid as error:
            raise Invalid(f"invalid value for --since: {error}") from None
    client = connect()
    form = LogFormat(**look)
    names = {} if form.raw or form.no_resolve else node_names_by_id(client)
    tasks: dict[str, Task] = {}
    try:
        for reply in client.control_stream(client.control.Logs, LogsRequest(ref=ref, options=options)):
            if reply.warning:
                click.echo(f"Warning: {reply.warning}", err=True)
            for line in reply.lines:
                task = _task_of(client, tasks, line.task_id) if not form.raw else Task(id=line.task_id)
                text = format_line(line, task, names, form)
                click.echo(text, err=line.stderr)
    except KeyboardInterrupt:
        return


def _tail(text: str) -> int:
    if text == "all":
        return TAIL_ALL
    try:
        return parse_uint(text)
    except Invalid as error:
        raise Invalid(f"invalid value for --tail: {error}, or all") from None


def _task_of(client: Client, tasks: dict[str, Task], task_id: str) -> Task:
    """The task that wrote a line; a task that is gone keeps its ID."""
    if task_id not in tasks:
        try:
            tasks[task_id] = client.call(client.control.GetTask, GetRequest(ref=task_id))
        except ApiFailure:
            tasks[task_id] = Task(id=task_id)
    return tasks[task_id]
