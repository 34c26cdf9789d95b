"""`pyswarm swarm backup` and `restore`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from proto.control_pb2 import BackupRequest
from proto.local_pb2 import RestoreRequest
from swarm.cli.client import MEMBERSHIP_S, Client, connect
from swarm.cli.command import GoCommand
from swarm.cli.failure import Failure
from swarm.cli.joining import DEFAULT_LISTEN, join_text

SECRET = "It holds the keys of the swarm in clear: whoever reads it can be a manager of it"
PROGRESS_BYTES = 10_000_000


@click.command("backup", cls=GoCommand)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", "-f", is_flag=True, help="Replace a file that is there.")
def backup(file: Path, force: bool) -> None:
    """Write the swarm's whole state to a file: services, tasks, networks, nodes, and the keys.

    \b
    Example:
      pyswarm swarm backup /root/swarm.backup
    """
    from swarm.consensus.recover import read_backup

    if file.exists() and not force:
        raise Failure(f"{file} exists already: choose another name, or replace it with --force")
    client = connect()
    unfinished = file.with_name(file.name + ".unfinished")
    try:
        size = _write(client, unfinished)
        count = sum(1 for _ in read_backup(unfinished)) - 1  # the first is a header
        unfinished.rename(file)
    except OSError as error:
        raise Failure(f"cannot write {file}: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    click.echo(f"Backup of {count} objects ({size / 1e6:.1f} MB) written to {file}, and checked.")
    click.echo(f"{SECRET}.", err=True)


def _write(client: Client, path: Path) -> int:
    """The bytes written, durably. Raises OSError, ApiFailure."""
    size = told = 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as out:
        for piece in client.control_stream(client.control.Backup, BackupRequest()):
            out.write(piece.data)
            size += len(piece.data)
            if size - told >= PROGRESS_BYTES and sys.stderr.isatty():
                told = size
                click.echo(f"\r{size / 1e6:.0f} MB", nl=False, err=True)
        out.flush()
        os.fsync(out.fileno())
    if told:
        click.echo("\r", nl=False, err=True)
    return size


@click.command("restore", cls=GoCommand)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--advertise-addr", default="", metavar="ADDR", help="Address told to others: IP[:PORT] or interface.")
@click.option("--listen-addr", default=DEFAULT_LISTEN, show_default=True, help="Where managers listen.")
@click.option("--data-path-addr", default="", metavar="ADDR", help="Address for overlay traffic (default: as above).")
def restore(file: Path, advertise_addr: str, listen_addr: str, data_path_addr: str) -> None:
    """Make this host, which is in no swarm, the only manager of the swarm in a backup.

    \b
    Its other nodes are strangers to it until they join again; their tasks are started on the nodes that there are.
    Make sure that no manager of the old swarm runs any more.

    \b
    Example:
      pyswarm swarm restore /root/swarm.backup
    """
    client = connect()
    request = RestoreRequest(
        path=str(file.absolute()),
        advertise_addr=advertise_addr,
        listen_addr=listen_addr,
        data_path_addr=data_path_addr,
    )
    reply = client.ask(client.local.Restore, request, MEMBERSHIP_S)
    click.echo(f"Swarm restored: current node ({reply.node_id}) is now its only manager.\n")
    click.echo(join_text("worker", reply.tokens.worker, reply.join_addr))
    click.echo("Nodes of before have to leave (`pyswarm swarm leave --force`) and to join again with such a token.")
