"""`pyswarm completion`: the script that teaches a shell our commands."""

from __future__ import annotations

import click

from swarm.cli.command import GoCommand


@click.command(cls=GoCommand)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell. Names of services, nodes, networks and images are
    completed as well, by asking the daemon.

    \b
    Example:
      source <(pyswarm completion bash)
      pyswarm completion fish > ~/.config/fish/completions/pyswarm.fish
    """
    from click.shell_completion import get_completion_class

    from swarm.cli.main import cli

    found = get_completion_class(shell)
    assert found is not None
    script = found(cli, {}, "pyswarm", "_PYSWARM_COMPLETE")
    # `source()` would run the shell to ask for its version: a script made on one machine may be for another.
    click.echo(script.source_template % script.source_vars())
