"""Where the binds and volumes of a task come from on this host."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from node.interface import RuntimeFault
from node.process import CommandTimeout, run
from node.rootfs import open_in_root
from proto.objects_pb2 import Mount

COPY_TIMEOUT_S = 600.0
"""Filling a new volume from the image; images with gigabytes at a volume's place exist."""
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")


def check_mount(mount: Mount) -> None:
    """Raises RuntimeFault (permanent) for a mount that no host could make."""
    kind = {Mount.BIND: "bind", Mount.VOLUME: "volume", Mount.TMPFS: "tmpfs"}[mount.type]
    target = os.path.normpath(mount.target)
    if not mount.target.startswith("/") or target in ("/", "//"):
        raise RuntimeFault(
            f'invalid mount config for type "{kind}": target {mount.target!r} must be an absolute path other than /'
        )
    if mount.type == Mount.BIND and not mount.source.startswith("/"):
        raise RuntimeFault(f'invalid mount config for type "bind": source {mount.source!r} must be an absolute path')
    if mount.type == Mount.VOLUME and mount.source and not _NAME.fullmatch(mount.source):
        raise RuntimeFault(
            f'invalid mount config for type "volume": name {mount.source!r} may contain letters, digits, _ . -'
        )


def wanted_mounts(mounts: list[Mount], image_volumes: tuple[str, ...]) -> list[Mount]:
    """The spec's binds and volumes, and an anonymous volume for each place the image declares and nobody covers."""
    covered = {os.path.normpath(mount.target) for mount in mounts}
    declared = [Mount(type=Mount.VOLUME, target=target) for target in image_volumes]
    wanted = [mount for mount in mounts if mount.type != Mount.TMPFS]
    return wanted + [mount for mount in declared if os.path.normpath(mount.target) not in covered]


@contextmanager
def _directory_in(rootfs: Path, target: str) -> Iterator[int | None]:
    """A descriptor of the directory that the image has at `target`, None when it has none."""
    try:
        fd = open_in_root(rootfs, target, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


class Volumes:
    """Named volumes under <state>/volumes/<name>/_data; anonymous ones inside the task's own directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._locks: dict[Path, asyncio.Lock] = {}

    async def place(self, mount: Mount, rootfs: Path, anonymous_dir: Path) -> Path:
        """The host directory (or file, for a bind) behind a mount, made when it is a new volume.
        Raises RuntimeFault."""
        check_mount(mount)
        if mount.type == Mount.BIND:
            if not os.path.lexists(mount.source):
                raise RuntimeFault(
                    f'invalid mount config for type "bind": bind source path does not exist: {mount.source}'
                )
            return Path(mount.source)
        data = (self._root / mount.source if mount.source else anonymous_dir) / "_data"
        lock = self._locks.setdefault(data, asyncio.Lock())
        async with lock:
            if not data.is_dir():
                await self._make(data, mount, rootfs)
        if not mount.source:
            self._locks.pop(data, None)
        return data

    async def _make(self, data: Path, mount: Mount, rootfs: Path) -> None:
        # Filled beside its place and then renamed: a volume that exists is whole, whenever we are killed.
        filling = data.with_name("_filling")
        shutil.rmtree(filling, ignore_errors=True)
        filling.mkdir(parents=True)
        if not mount.no_copy:
            with _directory_in(rootfs, mount.target) as fd:
                if fd is not None:
                    await self._copy(fd, filling, mount)
        filling.rename(data)

    async def _copy(self, source_fd: int, destination: Path, mount: Mount) -> None:
        argv = ["cp", "-a", "--", f"/proc/self/fd/{source_fd}/.", str(destination)]
        try:
            done = await run(argv, timeout_s=COPY_TIMEOUT_S, pass_fds=(source_fd,))
        except CommandTimeout as error:
            raise RuntimeFault(f"filling volume {mount.source or mount.target} from the image: {error}") from None
        if done.code != 0:
            shutil.rmtree(destination, ignore_errors=True)
            why = done.errors.decode(errors="replace").strip().splitlines()[-1:] or ["cp failed"]
            raise RuntimeFault(
                f"filling volume {mount.source or mount.target} from the image: {why[0]}",
                permanent=False,
            )
