"""`pyswarm explain`."""

from __future__ import annotations

import json

import click
from google.protobuf.json_format import MessageToDict

from proto.control_pb2 import ExplainRequest, Explanation
from swarm.cli.client import connect
from swarm.cli.command import GoCommand
from swarm.cli.failure import Failure


@click.command(cls=GoCommand)
@click.argument("ref", metavar="SERVICE|TASK|NODE")
@click.option("--format", "-f", "form", metavar="FORMAT", help="json for machines; text for people if not given.")
def explain(ref: str, form: str | None) -> None:
    """Say why a task is pending, where it is, why it was restarted, what an update waits for, what a node does.

    \b
    Example:
      pyswarm explain web
      pyswarm explain web.3
      pyswarm explain worker1
    """
    if form not in (None, "json"):
        raise Failure(f"invalid value '{form}' for --format: json is known")
    client = connect()
    found = client.call(client.control.Explain, ExplainRequest(ref=ref))
    click.echo(json.dumps(MessageToDict(found), indent=2) if form else shown(found))


def shown(found: Explanation) -> str:
    """The findings as indented lines."""
    lines = [f"{found.type} {found.name} ({found.id})"]
    for finding in found.findings:
        lines.append(f"  {finding.subject}: {finding.summary}")
        lines.extend(f"    {detail}" for detail in finding.details)
    return "\n".join(lines)
