"""The whole state as one file, for `pyswarm swarm backup`: all that was acknowledged before the call is in it."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from proto.control_pb2 import BackupPiece
from swarm.api.backend import Backend


async def backup(backend: Backend) -> AsyncGenerator[BackupPiece, None]:
    """The pieces of the file, while the state moves on. Raises NoLeader."""
    for piece in backend.consensus.backup():
        yield BackupPiece(data=piece)
