"""`pyswarm node`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import click

from proto import objects_pb2 as pb
from proto.control_pb2 import Filter, GetRequest, ListRequest, NodeUpdateRequest, RemoveRequest
from swarm.cli.client import Client, connect
from swarm.cli.command import (
    command,
    for_each,
    inspect_all,
    label_filter,
    listing_options,
    parse_filters,
    show_rows,
)
from swarm.cli.completing import node_names
from swarm.cli.docker_shape import node_json
from swarm.cli.failure import ApiFailure, Failure
from swarm.cli.pretty import pretty_node
from swarm.cli.rows import NODE_COLUMNS, natural_key, node_row, task_name
from swarm.cli.service_show import resolve_node, show_tasks
from swarm.cli.spec import choice, flag_value, parse_pairs
from swarm.errors import Invalid

ROLES = {"worker": pb.WORKER, "manager": pb.MANAGER}
AVAILABILITIES = {"active": pb.ACTIVE, "pause": pb.PAUSED, "drain": pb.DRAINED}
CONFLICTS_MAX = 10
"""Writes of others that one change outlives: nodes change rarely."""
POLL_S = 0.5
NAMES_SHOWN = 5
"""Tasks that a drain waits for, told by name."""


@click.group()
def node() -> None:
    """Manage the nodes of the swarm.

    \b
    Example:
      pyswarm node ls
      pyswarm node update --availability drain w1
    """


@command(node, "ls")
@listing_options(no_trunc=False, filters="id, label, node.label, name, role")
def list_nodes(form: str | None, quiet: bool, filters: tuple[str, ...]) -> None:
    """List nodes; a * marks the one that was asked.

    \b
    Example:
      pyswarm node ls --filter role=manager
    """
    wanted = parse_filters(filters, ("id", "label", "node.label", "name", "role"))
    roles = [flag_value("filter role", choice(**ROLES), role) for role in wanted.get("role", ())]
    client = connect()
    condition = Filter(
        ids=wanted.get("id", ()),
        names=wanted.get("name", ()),
        labels=label_filter(wanted.get("node.label", ())),
        engine_labels=label_filter(wanted.get("label", ())),
        roles=roles,
    )
    nodes = client.call(client.control.ListNodes, ListRequest(filter=condition)).nodes
    ordered = sorted(nodes, key=lambda item: (natural_key(item.description.hostname), item.id))
    rows = [node_row(item, client.node_id) for item in ordered]
    if quiet:
        rows = [{**row, "ID": row["ID"].removesuffix(" *")} for row in rows]
    show_rows(rows, NODE_COLUMNS, form, quiet)


@command(node, "inspect")
@click.argument("refs", metavar="self|NODE...", nargs=-1, required=True, shell_complete=node_names)
@click.option("--format", "-f", "form", metavar="FORMAT", help="json, or a Go template such as '{{.Status.Addr}}'.")
@click.option("--pretty", is_flag=True, help="Text for people instead of JSON.")
def inspect(refs: tuple[str, ...], form: str | None, pretty: bool) -> None:
    """Show nodes in detail.

    \b
    Example:
      pyswarm node inspect --pretty self
    """
    if pretty and form:
        raise Failure("--format is incompatible with --pretty: give one of them")
    client = connect()
    if pretty:
        inspect_all(refs, lambda ref: _get(client, ref), None, pretty=pretty_node)
    else:
        inspect_all(refs, lambda ref: node_json(_get(client, ref)), form)


@command(node, "ps")
@click.argument("refs", metavar="[NODE...]", nargs=-1, shell_complete=node_names)
@click.option("--no-resolve", is_flag=True, help="Show IDs instead of names.")
@listing_options(filters="id, name, desired-state")
def list_tasks(
    *, refs: tuple[str, ...], no_resolve: bool, form: str | None, quiet: bool, no_trunc: bool, filters: tuple[str, ...]
) -> None:
    """List the tasks of nodes (default: this one).

    \b
    Example:
      pyswarm node ps --filter desired-state=running w1
    """
    wanted = parse_filters(filters, ("id", "name", "desired-state"))
    client = connect()
    condition = Filter(node_ids=[resolve_node(client, ref) for ref in refs or ("self",)])
    show_tasks(client, condition, wanted, form=form, quiet=quiet, no_trunc=no_trunc, no_resolve=no_resolve)


@command(node, "update")
@click.argument("ref", metavar="NODE", shell_complete=node_names)
@click.option("--availability", metavar="active|pause|drain", help="Whether the node gets tasks and keeps them.")
@click.option("--role", metavar="worker|manager", help="Promote or demote the node.")
@click.option("--label-add", multiple=True, metavar="KEY=VALUE", help="Add or change a label.")
@click.option("--label-rm", multiple=True, metavar="KEY", help="Remove a label.")
@click.option("--wait", "-w", is_flag=True, help="With --availability drain: until no task runs on the node any more.")
def update(
    *,
    ref: str,
    availability: str | None,
    role: str | None,
    label_add: tuple[str, ...],
    label_rm: tuple[str, ...],
    wait: bool,
) -> None:
    """Change a node: availability, role, labels.

    \b
    Example:
      pyswarm node update --availability drain --label-add zone=east w1
    """
    if wait and availability != "drain":
        raise Invalid("--wait can only be used with --availability drain: nothing else takes tasks away")
    added = parse_pairs(label_add, "label-add")
    new_availability = flag_value("availability", choice(**AVAILABILITIES), availability) if availability else None
    new_role = flag_value("role", choice(**ROLES), role) if role else None

    def change(found: pb.Node) -> None:
        if new_availability is not None:
            found.spec.availability = new_availability
        if new_role is not None:
            found.spec.desired_role = new_role
        for key in label_rm:
            if key not in found.spec.annotations.labels:
                raise Invalid(f'invalid value "{key}" for --label-rm: node {ref} has no such label')
            del found.spec.annotations.labels[key]
        found.spec.annotations.labels.update(added)

    client = connect()
    _rewrite(client, ref, change)
    if wait:
        _await_drained(client, ref)
    click.echo(ref)


def _await_drained(client: Client, ref: str) -> None:
    """Until no task runs on the node. Ctrl-C leaves with a hint, the drain goes on."""
    condition = Filter(node_ids=[resolve_node(client, ref)])
    said: list[str] = []
    try:
        while left := [task for task in _tasks(client, condition) if is_on_node(task)]:
            names = sorted(task_name(task) for task in left)
            if names != said:
                shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
                click.echo(f"{ref}: {len(names)} tasks left ({shown})", err=True)
            said = names
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        click.echo(f"The drain goes on in the background: see `pyswarm node ps {ref}`.", err=True)


def _tasks(client: Client, condition: Filter) -> Iterable[pb.Task]:
    return client.call(client.control.ListTasks, ListRequest(filter=condition)).tasks


def is_on_node(task: pb.Task) -> bool:
    """It holds something of the node: from its assignment until it has stopped."""
    return pb.TASK_ASSIGNED <= task.status.state <= pb.TASK_RUNNING


@command(node, "promote")
@click.argument("refs", metavar="NODE...", nargs=-1, required=True, shell_complete=node_names)
def promote(refs: tuple[str, ...]) -> None:
    """Make nodes managers.

    \b
    Example:
      pyswarm node promote w1
    """
    _set_role(refs, pb.MANAGER, "Node {} promoted to a manager in the swarm.", "Node {} is already a manager.")


@command(node, "demote")
@click.argument("refs", metavar="NODE...", nargs=-1, required=True, shell_complete=node_names)
def demote(refs: tuple[str, ...]) -> None:
    """Make managers workers.

    \b
    Example:
      pyswarm node demote m3
    """
    _set_role(refs, pb.WORKER, "Manager {} demoted in the swarm.", "Node {} is already a worker.")


@command(node, "rm")
@click.argument("refs", metavar="NODE...", nargs=-1, required=True, shell_complete=node_names)
@click.option("--force", "-f", is_flag=True, help="Even if the node is not down; its tasks are replaced elsewhere.")
def remove(refs: tuple[str, ...], force: bool) -> None:
    """Remove nodes from the swarm.

    \b
    Example:
      pyswarm node rm w1
    """
    client = connect()

    def act(ref: str) -> str:
        client.call(client.control.RemoveNode, RemoveRequest(ref=_ref(client, ref), force=force))
        return ref

    for_each(refs, act)


def _ref(client: Client, ref: str) -> str:
    """ "self" is this host, whichever manager answers in the end."""
    return client.node_id if ref == "self" else ref


def _get(client: Client, ref: str) -> pb.Node:
    return client.call(client.control.GetNode, GetRequest(ref=_ref(client, ref)))


def _rewrite(client: Client, ref: str, change: Callable[[pb.Node], None]) -> None:
    """Read, change, write; again when somebody else wrote meanwhile."""
    for attempt in range(CONFLICTS_MAX):
        found = _get(client, ref)
        version = found.meta.version
        change(found)
        request = NodeUpdateRequest(id=found.id, version=version, spec=found.spec)
        try:
            client.call(client.control.UpdateNode, request, retry_conflict=False)
            return
        except ApiFailure as failure:
            if failure.code != "ABORTED" or attempt == CONFLICTS_MAX - 1:
                raise


def _set_role(refs: tuple[str, ...], role: pb.NodeRole.ValueType, done: str, already: str) -> None:
    client = connect()

    def act(ref: str) -> str:
        if _get(client, ref).spec.desired_role == role:
            return already.format(ref)

        def change(found: pb.Node) -> None:
            found.spec.desired_role = role

        _rewrite(client, ref, change)
        return done.format(ref)

    for_each(refs, act)
