"""The name server process of a host: `python -m dns.server --socket PATH`.

It is told the picture by the agent, whole or what changed (one JSON line, see interface.py), reconciles its
listening sockets with it, and goes on answering when the agent is gone. It keeps nothing on disk.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import gc
import json
import os
import secrets
import signal
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from dns.answer import CacheBudget, Responder
from dns.changes import Changes
from dns.datagrams import Datagrams
from dns.forward import Forwarder
from dns.interface import Sandbox
from dns.names import TaskView
from dns.sandbox import SandboxListener, sockets_in_each
from dns.wire import LINE_BYTES_MAX, decode
from dns.zones import OutOfStep, Zones

_ViewKey = tuple[tuple[str, ...], tuple[str, ...]]
"""Networks in order, search domains."""


class Server:
    def __init__(self) -> None:
        self._hopper = ThreadPoolExecutor(1, thread_name_prefix="netns")
        self._forwarder = Forwarder()
        self._datagrams = Datagrams()
        self._budget = CacheBudget()
        self._cookie_key = secrets.token_bytes(16)
        self._zones = Zones()
        self._responders: dict[_ViewKey, Responder] = {}
        self._listeners: dict[str, SandboxListener] = {}
        self._applying = asyncio.Lock()

    async def apply(self, changes: Changes) -> tuple[int, str]:
        """(digest of what it answers by now, what failed: sandboxes that could not be listened in are tried again
        at the next call). The names change at once, for all. Raises OutOfStep, ValueError."""
        async with self._applying:
            upstreams = self._zones.upstreams
            touched = self._zones.apply(changes)
            if touched is None:
                self._make_views()
            else:
                self._forget(touched)
            suspects = {box.task_id for box in changes.sandboxes}
            if not suspects or upstreams != changes.upstreams:
                suspects = set(self._zones.sandboxes)
            only_new = not changes.gone_sandboxes and suspects.isdisjoint(self._listeners)
            failed = await self._listen(suspects)
            if not only_new:
                self._drop_unused()
            return self._zones.digest, _problem(failed)

    def _forget(self, network_ids: frozenset[str]) -> None:
        for key, responder in self._responders.items():
            if not network_ids.isdisjoint(key[0]):
                responder.forget()

    def _make_views(self) -> None:
        for responder in self._responders.values():
            responder.close()
        self._responders.clear()
        for task_id, listener in self._listeners.items():
            sandbox = self._zones.sandboxes.get(task_id)
            if sandbox is not None:
                listener.responder = self._responder(sandbox)

    def _responder(self, sandbox: Sandbox) -> Responder:
        key = (sandbox.network_ids, sandbox.search)
        if key not in self._responders:
            networks = self._zones.networks
            view = TaskView([networks[each] for each in sandbox.network_ids if each in networks], sandbox.search)
            self._responders[key] = Responder(view, self._budget, cookie_key=self._cookie_key)
        return self._responders[key]

    async def _listen(self, suspects: Set[str]) -> list[str]:
        """Sockets in exactly the wanted namespaces; returns what failed. `suspects`: tasks of which anything may be
        another than it was; the agent's audits, which change nothing, suspect all."""
        wanted, failed = self._zones.sandboxes, []
        for task_id in self._listeners.keys() - wanted.keys():
            self._listeners.pop(task_id).close()
        for task_id in self._listeners.keys() & suspects:
            if self._listeners[task_id].is_in(wanted[task_id].netns_path):
                self._listener(wanted[task_id])
            else:
                self._listeners.pop(task_id).close()
        missing = [wanted[task_id] for task_id in wanted.keys() - self._listeners.keys()]
        paths = [sandbox.netns_path for sandbox in missing]
        opened = await asyncio.get_running_loop().run_in_executor(self._hopper, sockets_in_each, paths)
        for sandbox, sockets in zip(missing, opened, strict=True):
            if isinstance(sockets, OSError):
                failed.append(f"{sandbox.task_id} ({sandbox.netns_path}): {sockets.strerror or sockets}")
                continue
            listener = self._listeners[sandbox.task_id] = self._listener(sandbox)
            await listener.open(sockets)
        return failed

    def _listener(self, sandbox: Sandbox) -> SandboxListener:
        """For this task, not yet listening; one that listens already is told what may be new."""
        responder = self._responder(sandbox)
        upstreams = sandbox.upstreams or self._zones.upstreams
        listener = self._listeners.get(sandbox.task_id)
        if listener is None:
            return SandboxListener(sandbox, responder, upstreams, self._forwarder, self._datagrams)
        listener.responder, listener.upstreams = responder, upstreams
        return listener

    def _drop_unused(self) -> None:
        """Views that no sandbox has, resolvers that no sandbox asks."""
        sandboxes = self._zones.sandboxes.values()
        for key in self._responders.keys() - {(sandbox.network_ids, sandbox.search) for sandbox in sandboxes}:
            self._responders.pop(key).close()
        self._forwarder.retain({*self._zones.upstreams, *(each for sandbox in sandboxes for each in sandbox.upstreams)})

    def close(self) -> None:
        for listener in self._listeners.values():
            listener.close()
        self._forwarder.close()
        self._hopper.shutdown()


def _problem(failed: list[str]) -> str:
    return f"cannot listen in the namespace of {len(failed)} tasks: {'; '.join(failed[:3])}" if failed else ""


async def _control(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One agent's connection: changes a line, an answer a line."""
    try:
        while line := await reader.readline():
            try:
                digest, problem = await server.apply(decode(line))
                reply: dict[str, object] = {"digest": digest} | ({"error": problem} if problem else {})
            except OutOfStep:
                reply = {"digest": None}
            except (ValueError, KeyError, TypeError, OSError) as error:
                reply = {"digest": None, "error": str(error) or type(error).__name__}
            writer.write(json.dumps(reply | {"pid": os.getpid()}).encode() + b"\n")
            await writer.drain()
    except (ConnectionError, ValueError):
        return  # the agent went away, or sent a line beyond the limit
    except asyncio.CancelledError:
        return  # the end; up to Python 3.11 asyncio logs the cancelled handler of a stream as a fault
    finally:
        writer.close()


def _spare_collections() -> None:
    """Names are tuples and bytes without cycles: looking through all of them for garbage would stop answers for tens
    of milliseconds, often while many new names are asked for."""
    gc.set_threshold(100_000, 50, 100)


async def serve(socket_path: Path) -> None:
    """Until SIGTERM. The caller holds the lock, so the socket of a dead predecessor may be replaced."""
    server = Server()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    socket_path.unlink(missing_ok=True)
    old_mask = os.umask(0o177)
    try:
        control = await asyncio.start_unix_server(partial(_control, server), path=socket_path, limit=LINE_BYTES_MAX)
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
        _spare_collections()
        asyncio.run(serve(socket_path))


if __name__ == "__main__":
    main()
