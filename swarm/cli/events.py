"""`pyswarm events`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable

import click

from proto.control_pb2 import Event, EventsRequest
from swarm.cli.client import connect
from swarm.cli.command import GoCommand, parse_filters
from swarm.cli.template import Template
from swarm.cli.units import NANO, format_time, parse_since_s
from swarm.errors import Invalid

_REFS = ("service", "node", "network", "task", "id")
TYPES = ("service", "node", "network", "task", "swarm")


@click.command(cls=GoCommand)
@click.option("--since", metavar="TIME", help="Begin with events since 10m (ago), Unix seconds, or a date.")
@click.option("--until", metavar="TIME", help="End at this time.")
@click.option("--filter", "filters", multiple=True, metavar="KEY=VALUE", help=f"type, event, {', '.join(_REFS)}")
@click.option("--format", "-f", "form", metavar="FORMAT", help="json, or a Go template such as '{{.Action}}'.")
def events(since: str | None, until: str | None, filters: tuple[str, ...], form: str | None) -> None:
    """Show what happens in the swarm, as it happens: services, nodes, networks, and each step of each task.

    \b
    Example:
      pyswarm events --since 10m --filter type=task --filter service=web
    """
    wanted = parse_filters(filters, ("type", "event", *_REFS))
    unknown = set(wanted.get("type", ())) - set(TYPES)
    if unknown:
        raise Invalid(f"invalid filter type={min(unknown)}: choose one of {', '.join(TYPES)}")
    request = EventsRequest(
        since=_time("since", since),
        until=_time("until", until),
        types=wanted.get("type", ()),
        actions=wanted.get("event", ()),
        refs=[ref for key in _REFS for ref in wanted.get(key, ())],
    )
    template = Template(form) if form not in (None, "json") else None
    client = connect()
    try:
        for event in client.control_stream(client.control.Events, request):
            if template is not None:
                click.echo(template.render(event_json(event)))
            else:
                click.echo(json.dumps(event_json(event), separators=(",", ":")) if form else line_of(event))
    except KeyboardInterrupt:
        return


def _time(flag: str, text: str | None) -> float:
    if text is None:
        return 0.0
    try:
        return parse_since_s(text, time.time())
    except Invalid as error:
        raise Invalid(f"invalid value for --{flag}: {error}") from None


def line_of(event: Event) -> str:
    """As `docker events`: time, type, action, ID, attributes."""
    attributes = _pairs(sorted(event.attributes.items()))
    return f"{format_time(event.at)} {event.type} {event.action} {event.id or event.name}" + (
        f" ({attributes})" if attributes else ""
    )


def _pairs(items: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{key}={value}" for key, value in items)


def event_json(event: Event) -> dict[str, object]:
    """As `docker events --format json`."""
    return {
        "Type": event.type,
        "Action": event.action,
        "Actor": {"ID": event.id, "Attributes": dict(sorted(event.attributes.items()))},
        "scope": "swarm",
        "time": int(event.at),
        "timeNano": round(event.at * NANO),
    }
