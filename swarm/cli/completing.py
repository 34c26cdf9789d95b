"""Names offered by shell completion, asked of the API; silence when it does not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from swarm.cli.client import Client

COMPLETION_S = 1.0
"""A shell must not hang on a Tab."""

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def _completer(names: Callable[[Client], Iterable[str]]) -> Complete:
    def complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
        from swarm.cli.client import Client

        # While completing, click parses leniently and may have skipped the callback of --host.
        from swarm.cli.main import parse_host

        client: Client | None = None
        try:
            client = Client(parse_host(ctx.find_root().params["host"]), total_s=COMPLETION_S)
            return sorted(name for name in set(names(client)) if name.startswith(incomplete))
        except Exception:  # whatever is wrong, a Tab is no place to say it
            return []
        finally:
            if client is not None:
                client.close()

    return complete


def _list(client: Client, method: str) -> Any:
    from proto.control_pb2 import ListRequest
    from swarm.cli.client import refusal

    if refusal(client.manager_socket):
        raise LookupError
    return getattr(client.control, method)(ListRequest(), timeout=COMPLETION_S)


def _services(client: Client) -> list[str]:
    return [item.spec.annotations.name for item in _list(client, "ListServices").services]


def _nodes(client: Client) -> list[str]:
    return [item.description.hostname for item in _list(client, "ListNodes").nodes] + ["self"]


def _networks(client: Client) -> list[str]:
    return [item.spec.annotations.name for item in _list(client, "ListNetworks").networks]


def _images(client: Client) -> list[str]:
    from proto.local_pb2 import ImageListRequest
    from swarm.cli.images import without_digest

    found = client.local.ListImages(ImageListRequest(), timeout=COMPLETION_S)
    return [without_digest(name) for image in found.images for name in image.names]


service_names = _completer(_services)
node_names = _completer(_nodes)
network_names = _completer(_networks)
image_names = _completer(_images)
