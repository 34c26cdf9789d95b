"""Network namespaces as bind mounts, and the one thread of the agent that ever changes namespace.

setns and unshare change the calling *thread*: done on the event loop's thread, a failure in the middle would
leave the whole agent in a container's network. So one dedicated thread does it, and being one it is also the
lock: everything on it happens in sequence.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from overlay.interface import NetworkError

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_MS_BIND, _MNT_DETACH = 4096, 2
_OWN_NAMESPACE = "/proc/thread-self/ns/net"
STACKED_MOUNTS = 16
"""More mounts than this upon one name are not ours: stop unmounting."""
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _settle(done: Future[T], function: Callable[[], T]) -> None:
    """As an executor does it."""
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(function())
    except BaseException as error:
        done.set_exception(error)


class NamespaceThread:
    """Runs functions one after the other in the home namespace (`home`, or the process's own); urgent ones before all
    that wait."""

    def __init__(self, home: Path | None = None) -> None:
        self._home_path = home
        self._home = -1
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netns", initializer=self._begin)
        self._urgent: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def _begin(self) -> None:
        self._home = os.open(self._home_path or _OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
        self._enter(self._home)

    def submit(self, function: Callable[[], T]) -> Future[T]:
        return self._executor.submit(self._after_urgent, function)

    def _after_urgent(self, function: Callable[[], T]) -> T:
        while not self._urgent.empty():
            self._urgent.get_nowait()()
        return function()

    async def run(self, function: Callable[[], T], urgent: bool = False) -> T:
        """Run it there; when the caller is cancelled it still runs to its end."""
        if not urgent:
            return await asyncio.wrap_future(self.submit(function))
        done: Future[T] = Future()
        self._urgent.put(lambda: _settle(done, function))
        self._executor.submit(self._after_urgent, lambda: None)
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        self._executor.submit(self._end)
        self._executor.shutdown(wait=True)

    def _end(self) -> None:
        if self._home >= 0:
            os.close(self._home)
            self._home = -1

    @staticmethod
    def _enter(descriptor: int) -> None:
        _checked(_libc.setns(descriptor, _CLONE_NEWNET), "enter network namespace")

    # --- to be called on the thread ---

    @contextlib.contextmanager
    def inside(self, path: Path) -> Iterator[int]:
        """The block runs in the namespace at `path`; yields its descriptor. Then it is home again."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._enter(descriptor)
            yield descriptor
        finally:
            self._enter(self._home)
            os.close(descriptor)

    @contextlib.contextmanager
    def home(self) -> Iterator[None]:
        """Home for the block, from inside another namespace."""
        back = os.open(_OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._enter(self._home)
            yield
        finally:
            self._enter(back)
            os.close(back)

    @contextlib.contextmanager
    def fresh(self) -> Iterator[int]:
        """The block runs in a new namespace; yields its descriptor, which the caller owns (if the block raises, it is
        closed). Then it is home again. Raises OSError."""
        try:
            _checked(_libc.unshare(_CLONE_NEWNET), "make a network namespace")
            descriptor = os.open(_OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield descriptor
            except BaseException:
                os.close(descriptor)
                raise
        finally:
            self._enter(self._home)

    def create(self, path: Path) -> None:
        """A new namespace, kept alive by a bind mount at `path`: it survives the agent."""
        with self.fresh() as descriptor:
            pin(descriptor, path)
        os.close(descriptor)


def pin(descriptor: int, path: Path) -> None:
    """Keep that namespace alive by a bind mount at `path`. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o444, exist_ok=True)
    source = f"/proc/self/fd/{descriptor}"
    try:
        _checked(
            _libc.mount(source.encode(), os.fsencode(path), b"none", _MS_BIND, None),
            f"mount a network namespace at {path}",
        )
    except OSError:
        path.unlink(missing_ok=True)
        raise


def exists(path: Path) -> bool:
    """Whether a namespace is mounted there (a plain file is what a reboot or a crash left)."""
    try:
        return path.stat().st_dev == os.stat(_OWN_NAMESPACE).st_dev
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Unmount and unlink; the kernel destroys the namespace when no process or socket is left in it."""
    for _ in range(STACKED_MOUNTS):
        if not exists(path):
            break
        _checked(_libc.umount2(os.fsencode(path), _MNT_DETACH), f"unmount {path}")
    else:
        raise NetworkError(f"{path} stays mounted after {STACKED_MOUNTS} unmounts; look at /proc/self/mountinfo")
    path.unlink(missing_ok=True)


def sysctl(name: str, value: str) -> None:
    """Write one sysctl of the current namespace ("net.ipv4.ip_forward"). Raises OSError."""
    path = sysctl_path(name)
    with path.open("w") as file:
        file.write(value)


def read_sysctl(name: str) -> str | None:
    """None when this kernel or namespace has none of that name."""
    try:
        return sysctl_path(name).read_text().strip()
    except OSError:
        return None


def sysctl_path(name: str) -> Path:
    """Dots separate, and a slash stands for a dot within a part, as sysctl(8) has it."""
    parts = [part.replace("/", ".") for part in name.split(".")]
    if not all(parts) or ".." in name or any(part in (".", "..") for part in parts):
        raise NetworkError(f"sysctl {name!r} is not a name such as net.core.somaxconn")
    return Path("/proc/sys", *parts)
