"""The name server process of a host: `python -m dns.server --socket PATH`.

It is told the whole picture by the agent (one JSON line, see interface.py), reconciles its listening
sockets with it, and goes on answering when the agent is gone. It keeps nothing on disk.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from dns.answer import Responder
from dns.forward import Forwarder
from dns.interface import Picture, Sandbox
from dns.names import NetworkView, TaskView
from dns.sandbox import SandboxListener
from dns.wire import LINE_BYTES_MAX, decode


class Server:
    def __init__(self) -> None:
        self._hopper = ThreadPoolExecutor(1, thread_name_prefix="netns")
        self._forwarder = Forwarder()
        self._listeners: dict[str, SandboxListener] = {}
        self._applying = asyncio.Lock()

    async def apply(self, picture: Picture) -> None:
        """Answer by this picture. Everything that can be applied is; then OSError names the sandboxes
        that could not be listened in."""
        async with self._applying:
            views = {network.network_id: NetworkView(network) for network in picture.networks}
            responders: dict[tuple[str, ...], Responder] = {}
            wanted = {sandbox.task_id: sandbox for sandbox in picture.sandboxes}
            for task_id, listener in list(self._listeners.items()):
                if task_id not in wanted or wanted[task_id].netns_path != listener.netns_path:
                    listener.close()
                    del self._listeners[task_id]
            failed: list[str] = []
            for sandbox in picture.sandboxes:
                responder = responders.get(sandbox.network_ids)
                if responder is None:
                    known = [views[network_id] for network_id in sandbox.network_ids if network_id in views]
                    responder = responders[sandbox.network_ids] = Responder(TaskView(known))
                try:
                    await self._listen(sandbox, responder, sandbox.upstreams or picture.upstreams)
                except OSError as error:
                    failed.append(f"{sandbox.task_id} ({sandbox.netns_path}): {error.strerror or error}")
            if failed:
                raise OSError(f"cannot listen in the namespace of {len(failed)} tasks: {'; '.join(failed[:3])}")

    async def _listen(self, sandbox: Sandbox, responder: Responder, upstreams: Sequence[str]) -> None:
        answer_now, ask = responder.answer, partial(self._ask, responder, upstreams)
        listener = self._listeners.get(sandbox.task_id)
        if listener is not None:
            listener.answer_now, listener.ask = answer_now, ask
            return
        listener = SandboxListener(sandbox.netns_path, answer_now, ask)
        await listener.open(self._hopper)
        self._listeners[sandbox.task_id] = listener

    async def _ask(self, responder: Responder, upstreams: Sequence[str], packet: bytes, tcp: bool) -> bytes | None:
        own = responder.answer(packet, tcp)
        return own if own is not None else await self._forwarder.ask(packet, upstreams, tcp)

    def close(self) -> None:
        for listener in self._listeners.values():
            listener.close()
        self._hopper.shutdown()


async def _control(
    apply: Callable[[Picture], Awaitable[None]], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """One agent's connection: a picture a line, an answer a line."""
    try:
        while line := await reader.readline():
            try:
                await apply(decode(line))
                reply: dict[str, object] = {"ok": True}
            except (ValueError, KeyError, TypeError, OSError) as error:
                reply = {"error": str(error) or type(error).__name__}
            writer.write(json.dumps(reply | {"pid": os.getpid()}).encode() + b"\n")
            await writer.drain()
    except (ConnectionError, ValueError):
        return  # the agent went away, or sent a line beyond the limit
    finally:
        writer.close()


async def serve(socket_path: Path) -> None:
    """Until SIGTERM. The caller holds the lock, so the socket of a dead predecessor may be replaced."""
    server = Server()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    socket_path.unlink(missing_ok=True)
    old_mask = os.umask(0o177)
    try:
        control = await asyncio.start_unix_server(
            partial(_control, server.apply), path=socket_path, limit=LINE_BYTES_MAX
        )
    finally:
        os.umask(old_mask)
    await ended.wait()
    control.close()
    server.close()
    socket_path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dns.server", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="unix socket for the agent")
    socket_path: Path = parser.parse_args().socket
    with open(socket_path.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another one serves already
        asyncio.run(serve(socket_path))


if __name__ == "__main__":
    main()
