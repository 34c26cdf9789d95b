"""`pyswarm swarm update`, `unlock` and `unlock-key`: settings, and managers that need a key to start."""

from __future__ import annotations

import getpass
import sys

import click

from proto.control_pb2 import ClusterRequest, ClusterUpdateRequest, UnlockKeyRequest
from proto.local_pb2 import InfoReply, UnlockRequest
from swarm.cli.client import MEMBERSHIP_S, Client, connect
from swarm.cli.command import GoCommand
from swarm.cli.failure import Failure
from swarm.cli.spec import flag_value
from swarm.cli.units import parse_duration_s, parse_uint

PROMPT = "Enter unlock key: "
LINE_CHARS_MAX = 4096
"""A key has 52 characters; a stream that is none is not read to its end."""


def unlock_text(key: str) -> str:
    """What to do with the key. Pure."""
    return (
        "To unlock a swarm manager after it restarts, run the `pyswarm swarm unlock`\n"
        f"command and provide the following key:\n\n    {key}\n\n"
        "Please remember to store this key in a password manager, since without it you\n"
        "will not be able to restart the manager."
    )


def _is_on(client: Client) -> bool:
    cluster = client.call(client.control.GetCluster, ClusterRequest())
    return cluster.spec.encryption.auto_lock_managers


def _key(client: Client) -> str:
    return client.call(client.control.GetUnlockKey, UnlockKeyRequest()).unlock_key


@click.command("update", cls=GoCommand)
@click.option(
    "--autolock", is_flag=True, default=None, help="Whether managers need an unlock key to start (true|false)."
)
@click.option("--task-history-limit", metavar="N", help="Ended tasks kept for each slot.")
@click.option("--dispatcher-heartbeat", metavar="DURATION", help="How often nodes report.")
@click.option("--cert-expiry", metavar="DURATION", help="Validity of node certificates made from now on.")
def update(
    autolock: bool | None, task_history_limit: str | None, dispatcher_heartbeat: str | None, cert_expiry: str | None
) -> None:
    """Change the swarm's settings.

    \b
    Example:
      pyswarm swarm update --autolock=true
      pyswarm swarm update --task-history-limit 2
    """
    request = ClusterUpdateRequest()
    if autolock is not None:
        request.auto_lock_managers = autolock
    if task_history_limit is not None:
        request.task_history_limit = flag_value(
            "task-history-limit", lambda t: parse_uint(t, 1, 10_000), task_history_limit
        )
    if dispatcher_heartbeat is not None:
        request.heartbeat_period_s = flag_value("dispatcher-heartbeat", parse_duration_s, dispatcher_heartbeat)
    if cert_expiry is not None:
        request.node_cert_expiry_s = flag_value("cert-expiry", parse_duration_s, cert_expiry)
    if not request.ByteSize():
        context = click.get_current_context()
        click.echo(context.get_help())
        return
    client = connect()
    was_on = _is_on(client)
    client.call(client.control.UpdateCluster, request)
    click.echo("Swarm updated.")
    if autolock and not was_on:
        click.echo(unlock_text(_key(client)))


@click.command("unlock-key", cls=GoCommand)
@click.option("--rotate", is_flag=True, help="Make a new key; managers that are down now still need the old one.")
@click.option("--quiet", "-q", is_flag=True, help="Only the key.")
def unlock_key(rotate: bool, quiet: bool) -> None:
    """Show, or replace, the key that unlocks managers.

    \b
    Example:
      pyswarm swarm unlock-key -q
    """
    client = connect()
    if rotate:
        client.call(client.control.UpdateCluster, ClusterUpdateRequest(rotate_unlock_key=True))
        if not quiet:
            click.echo("Successfully rotated manager unlock key.\n")
    key = _key(client)
    if not key:
        raise Failure("no unlock key is set")
    click.echo(key if quiet else unlock_text(key))


@click.command("unlock", cls=GoCommand)
def unlock() -> None:
    """Start this host's locked manager. The key is asked for without echo, or read from standard input.

    \b
    Example:
      pyswarm swarm unlock
    """
    client = connect()
    state = client.info().state
    if state == InfoReply.INACTIVE:
        raise Failure("This node is not part of a swarm")
    if state != InfoReply.LOCKED:
        raise Failure("swarm is not locked")
    client.ask(client.local.Unlock, UnlockRequest(unlock_key=_read_key()), MEMBERSHIP_S)


def _read_key() -> str:
    if sys.stdin.isatty():
        return getpass.getpass(PROMPT)
    return sys.stdin.readline(LINE_CHARS_MAX).strip()
