"""`pyswarm system`: what this host's disk holds, and giving back what no task uses."""

from __future__ import annotations

import json

import click

from proto.local_pb2 import DiskUsageReply, DiskUsageRequest, PruneRequest
from swarm.cli.client import TRANSFER_S, connect
from swarm.cli.command import command, finish, parse_filters, show_rows
from swarm.cli.events import events
from swarm.cli.spec import flag_value
from swarm.cli.system import info
from swarm.cli.units import human_size, parse_duration_s
from swarm.errors import Invalid

COLUMNS = {"Type": "TYPE", "TotalCount": "TOTAL", "Active": "ACTIVE", "Size": "SIZE", "Reclaimable": "RECLAIMABLE"}
ITEM_COLUMNS = {"Type": "TYPE", "Name": "NAME", "Uses": "LINKS", "Size": "SIZE"}


@click.group()
def system() -> None:
    """Look after this host's disk.

    \b
    Example:
      pyswarm system df
      pyswarm system prune --all
    """


system.add_command(info)
system.add_command(events)


@command(system, "df")
@click.option("--verbose", "-v", is_flag=True, help="Each container and volume.")
@click.option("--format", "form", metavar="FORMAT", help="json, table, or a Go template such as '{{.Type}} {{.Size}}'.")
def df(verbose: bool, form: str | None) -> None:
    """Show what images, containers and volumes of this host take of its disk.

    \b
    Example:
      pyswarm system df -v
    """
    client = connect()
    reply = client.ask(client.local.DiskUsage, DiskUsageRequest(), TRANSFER_S)
    if verbose:
        show_rows(item_rows(reply), ITEM_COLUMNS, form, False)
    else:
        show_rows(usage_rows(reply), COLUMNS, form, False)


def usage_rows(reply: DiskUsageReply) -> list[dict[str, str]]:
    """As `docker system df`."""
    rows = []
    for name, usage in (("Images", reply.images), ("Containers", reply.containers), ("Local Volumes", reply.volumes)):
        share = f" ({100 * usage.reclaimable_bytes // usage.size_bytes}%)" if usage.size_bytes else ""
        rows.append(
            {
                "Type": name,
                "TotalCount": str(usage.total),
                "Active": str(usage.active),
                "Size": human_size(usage.size_bytes),
                "Reclaimable": human_size(usage.reclaimable_bytes) + share,
            }
        )
    return rows


def item_rows(reply: DiskUsageReply) -> list[dict[str, str]]:
    return [
        {"Type": item.type, "Name": item.name, "Uses": str(item.uses), "Size": human_size(item.size_bytes)}
        for item in reply.items
    ]


@command(system, "prune")
@click.option("--all", "-a", "all_images", is_flag=True, help="Also images with a name that no task here uses.")
@click.option("--volumes", is_flag=True, help="Also named volumes that no task here uses: their data is lost.")
@click.option("--filter", "filters", multiple=True, metavar="KEY=VALUE", help="until=24h: only what is older.")
@click.option("--force", "-f", is_flag=True, help="Do not ask.")
@click.option("--format", "form", metavar="FORMAT", help="json for machines.")
def prune(all_images: bool, volumes: bool, filters: tuple[str, ...], force: bool, form: str | None) -> None:
    """Remove what no task of this host uses.

    \b
    Example:
      pyswarm system prune --all --filter until=24h
    """
    wanted = parse_filters(filters, ("until",))
    if form not in (None, "json"):
        raise Invalid(f'invalid value "{form}" for --format: json is known')
    until = wanted.get("until", ["0s"])[-1]
    what = ["all images without at least one task of this host using them" if all_images else "all dangling images"]
    what += ["all volumes not used by at least one task of this host"] if volumes else []
    if not force:
        click.echo("WARNING! This will remove:\n" + "".join(f"  - {item}\n" for item in what))
        if not click.confirm("Are you sure you want to continue?", default=False):
            return
    client = connect()
    request = PruneRequest(all=all_images, volumes=volumes, until_s=flag_value("filter until", parse_duration_s, until))
    reply = client.ask(client.local.Prune, request, TRANSFER_S)
    if form:
        fields = {"ImagesDeleted": list(reply.images), "VolumesDeleted": list(reply.volumes)}
        click.echo(json.dumps({**fields, "SpaceReclaimed": reply.reclaimed_bytes}, separators=(",", ":")))
    else:
        for heading, names in (("Deleted Images:", reply.images), ("Deleted Volumes:", reply.volumes)):
            if names:
                click.echo("\n".join([heading, *names, ""]))
        click.echo(f"Total reclaimed space: {human_size(reply.reclaimed_bytes)}")
    finish(list(reply.problems))
