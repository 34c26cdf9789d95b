"""What the commands that make or join a swarm share."""

from __future__ import annotations

DEFAULT_LISTEN = "0.0.0.0:2377"


def join_text(role: str, token: str, addr: str) -> str:
    """What to run on another host. Pure."""
    return (
        f"To add a {role} to this swarm, run the following command:\n\n    pyswarm swarm join --token {token} {addr}\n"
    )
