"""Refusals: one line on standard error, exit status 1."""

from __future__ import annotations

import click


class Failure(click.ClickException):
    """Printed as `Error: <message>`; exit status 1. Usage errors are click's own and exit with 2."""

    exit_code = 1


class ApiFailure(Failure):
    """The daemon or a manager refused; `code` is the gRPC status name, such as "NOT_FOUND"."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


NOT_IN_SWARM = (
    'this node is not part of a swarm. Use "pyswarm swarm init" or "pyswarm swarm join" '
    "to connect this node to swarm and try again."
)
NOT_A_MANAGER = (
    "This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state. "
    "Please run this command on a manager node or promote the current node to a manager."
)


def no_daemon(address: str, why: str = "") -> Failure:
    """Nobody listens on the agent's socket."""
    if why == "EACCES":
        return Failure(f"permission denied at {address}: run pyswarm as root, or ask for access to that socket")
    return Failure(f'cannot connect to the pyswarm daemon at {address}: is it running? Start it with "pyswarm daemon".')
