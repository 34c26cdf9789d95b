"""`HostNetwork` on the real kernel: each call is handed to the one namespace thread, in sequence."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from overlay import namespaces
from overlay.act import NamespaceKernel
from overlay.addressing import TAG_MAX_CHARS, host_table
from overlay.encryption import HostEncryption
from overlay.interface import Attachment, Balancer, EncryptionStatus, HostState, Inspection, NetworkError
from overlay.namespaces import NamespaceThread
from overlay.pathmtu import PathProbe, PathWatch
from overlay.reconcile import Reconciler
from overlay.removal import Removal
from overlay.services import ServiceBalancer

T = TypeVar("T")

FINISHED_AT_ONCE = 8
"""Closing a task's sockets and unmounting its namespace is 12 ms of waiting in the kernel; eight at once take hardly
longer than one."""


class KernelNetwork:
    """The overlay networking of one host.

    `run_dir`: namespaces are mounted under `<run_dir>/netns`. `tag`: 1 to 6 characters of a-z and 0-9, this node's
    own; it is part of the names of links and of the nftables table in the host's namespace. `dns_port`: where the
    name server listens at `dns_address` in each task's namespace. `host_netns`: the host's namespace if that is not
    the process's own. Construction touches nothing; raises NetworkError for a tag that cannot be part of a name.
    """

    def __init__(
        self,
        run_dir: Path,
        tag: str,
        dns_port: int,
        dns_address: str = "127.0.0.11",
        *,
        host_netns: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        balancer: Balancer = "nftables",
        answers_through_ingress: bool = True,
    ) -> None:
        if not re.fullmatch(rf"[a-z0-9]{{1,{TAG_MAX_CHARS}}}", tag):
            raise NetworkError(f"tag {tag!r} is not 1 to {TAG_MAX_CHARS} characters of a-z and 0-9")
        self._thread = NamespaceThread(host_netns)
        self._kernel = NamespaceKernel(self._thread, run_dir / "netns")
        self._removal = Removal()
        self._finishing = ThreadPoolExecutor(max_workers=FINISHED_AT_ONCE, thread_name_prefix="detach")
        services = ServiceBalancer(balancer, tag, (dns_address, dns_port), answers_through_ingress)
        self._encryption = HostEncryption(run_dir / "encryption", f"{host_table(tag)}_esp")
        self._reconciler = Reconciler(self._kernel, tag, services, self._encryption, clock)
        identity = int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=2).digest())
        self._paths = PathWatch(
            open_probe=lambda: self._thread.submit(lambda: PathProbe(identity)).result(),
            learned=lambda paths: self._thread.submit(lambda: self._reconciler.learn_paths(paths)).result(),
            clock=clock,
        )

    async def apply(self, state: HostState) -> None:
        """Make the kernel equal to `state`. Raises NetworkError when the host itself cannot serve (its data path
        address is gone, nftables refuses); a network that cannot be made fails the `attach` of its tasks only.
        Called again with an equal state after AUDIT_PERIOD_S it audits the kernel and repairs."""
        try:
            # Before tasks that wait to be attached: what other hosts' balancers wait for must not wait for those.
            await self._thread.run(lambda: self._reconciler.apply(state), urgent=True)
        except OSError as error:
            raise NetworkError(f"the kernel refuses this host's networking: {error}") from error
        self._paths.look((peer.vtep for peer in state.peers), self._reconciler.underlay.link_mtu_bytes)

    async def attach(self, attachment: Attachment) -> Path:
        return await self._thread.run(lambda: self._reconciler.attach(attachment))

    def namespace(self, task_id: str) -> Path:
        return self._kernel.task_path(task_id)

    async def given_address(self, task_id: str) -> str:
        return await self._thread.run(lambda: self._reconciler.given_address(task_id))

    async def detach(self, task_id: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            left = await self._thread.run(lambda: self._reconciler.begin_detach(task_id))
            await asyncio.gather(*(asyncio.wrap_future(self._removal.delete(port)) for port in left.ports))
            await loop.run_in_executor(self._finishing, left.finish)
            await self._thread.run(self._reconciler.end_detach)
        except OSError as error:
            raise NetworkError(f"task {task_id} cannot be detached: {error}") from error

    async def attached(self) -> frozenset[str]:
        return await self._thread.run(self._reconciler.attached)

    def encryption(self) -> EncryptionStatus:
        """The first call asks the kernel, for a millisecond. Raises OSError."""
        if self._encryption.status is None:
            self._thread.submit(self._encryption.prepare).result()
        assert self._encryption.status is not None
        return self._encryption.status

    async def inspect(self) -> Inspection:
        try:
            return await self._thread.run(self._reconciler.inspect)
        except OSError as error:
            raise NetworkError(f"this host's networking cannot be read: {error}") from error

    async def inside(self, task_id: str, function: Callable[[], T]) -> T:
        def run() -> T:
            if not task_id:
                return function()
            path = self._kernel.task_path(task_id)
            if not namespaces.exists(path):
                raise NetworkError(f"task {task_id} has no network namespace on this host")
            with self._thread.inside(path):
                return function()

        return await self._thread.run(run, urgent=True)

    async def teardown(self) -> None:
        try:
            await self._thread.run(self._reconciler.teardown)
        except OSError as error:
            raise NetworkError(f"this host's networking cannot be taken down: {error}") from error

    def close(self) -> None:
        """End the thread; the kernel's state stays as it is. For the end of the process, and for tests."""
        self._paths.close()
        self._removal.close()
        self._finishing.shutdown(wait=True)
        self._reconciler.close()
        self._thread.close()
