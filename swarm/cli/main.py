"""`pyswarm`: the root command. Groups are imported when used, so that --help answers in a moment."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from swarm.cli.failure import Failure
from swarm.config import DEFAULT_RUN_DIR
from swarm.errors import SwarmError

SOCKET_NAME = "pyswarm.sock"

COMMANDS: Mapping[str, tuple[str, str]] = {
    "completion": ("swarm.cli.completion:completion", "Print a shell's completion script"),
    "daemon": ("swarm.cli.system:daemon", "Run this host's daemon"),
    "events": ("swarm.cli.events:events", "Show what happens in the swarm, live"),
    "explain": ("swarm.cli.explain:explain", "Say why a service, task or node is as it is"),
    "image": ("swarm.cli.image:image", "Manage this host's images"),
    "info": ("swarm.cli.system:info", "Show this host's state in the swarm"),
    "lab": ("swarm.lab.cli:lab", "Clusters of hosts on this machine"),
    "network": ("swarm.cli.network:network", "Manage networks"),
    "node": ("swarm.cli.node:node", "Manage swarm nodes"),
    "service": ("swarm.cli.service:service", "Manage services"),
    "system": ("swarm.cli.disk:system", "Look after this host's disk"),
    "swarm": ("swarm.cli.membership:swarm", "Form, join, unlock and leave a swarm"),
    "version": ("swarm.cli.system:version", "Show versions"),
}
"""Name -> (module:attribute, one line of help)."""


class Root(click.Group):
    """A group that knows its commands by name and imports one only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in sorted(COMMANDS)])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SwarmError as error:
            raise Failure(str(error)) from None


def parse_host(text: str) -> Path:
    """The agent's socket from "unix:///path" or a plain path. Raises Failure."""
    scheme, separator, rest = text.partition("://")
    if separator and scheme != "unix":
        raise Failure(
            f'invalid value "{text}" for --host: only unix sockets are served; write unix:///path/{SOCKET_NAME}'
        )
    path = Path(rest if separator else text)
    if not path.is_absolute():
        raise Failure(
            f'invalid value "{text}" for --host: the path must be absolute, as unix:///run/pyswarm/{SOCKET_NAME}'
        )
    return path


def _remember_host(ctx: click.Context, _param: click.Parameter, value: str) -> str:
    ctx.meta["swarm.host"] = parse_host(value)
    return value


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from swarm.cli.system import client_version

        click.echo(f"pyswarm version {client_version()}")
        ctx.exit()


@click.group(cls=Root, context_settings={"help_option_names": ["--help"], "max_content_width": 110})
@click.option(
    "--host",
    "-H",
    metavar="SOCKET",
    envvar="PYSWARM_HOST",
    default=f"unix://{DEFAULT_RUN_DIR / SOCKET_NAME}",
    show_default=True,
    callback=_remember_host,
    help="The daemon's socket; also from the environment variable PYSWARM_HOST.",
)
@click.option(
    "--version",
    "-v",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version.",
)
def cli(host: str) -> None:
    """A Swarm-mode cluster manager: services, networks and nodes, as Docker's command names them.

    \b
    Example:
      pyswarm swarm init
      pyswarm service create --name web --replicas 3 --publish 8000:80 nginx
    """


def main() -> None:
    """Entry point of the console script."""
    cli(prog_name="pyswarm")


if __name__ == "__main__":
    main()
