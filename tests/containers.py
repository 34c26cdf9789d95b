"""A host to run real containers on, in this process: state and run directories, an image store, a runtime."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from node import cgroups
from node.conmon import ConmonRuntime
from node.images import ImageStore
from node.interface import CreateRequest, ResolvedImage
from node.mounts import prepare_mount_namespace, unmount_tree
from proto.dispatch_pb2 import LogOptions
from proto.objects_pb2 import ContainerSpec
from tests.images import TOOL_IMAGE, build_tool_image

PREFIX = "pyswarm-rt-"
CGROUP_PARENT = "/pyswarm-rt"
_CLONE_NEWNS, _CLONE_FS = 0x20000, 0x200
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory of our own, unmounted and deleted afterwards."""
    path = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        yield path
    finally:
        unmount_tree(path)
        shutil.rmtree(path)


@contextmanager
def agent_namespace(run_dir: Path) -> Iterator[None]:
    """This process as an agent would be, and back in its own mount namespace afterwards."""
    before, cwd = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), Path.cwd()
    try:
        made = prepare_mount_namespace(run_dir)
        yield
        if made:
            # A thread of some executor may still share our root and working directory; then setns(2) refuses.
            assert _libc.unshare(_CLONE_FS) == 0, os.strerror(ctypes.get_errno())
            assert _libc.setns(before, _CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
            os.chdir(cwd)
    finally:
        os.close(before)


class Host:
    """One node's runtime and images, with short ways to make a request."""

    def __init__(self, directory: Path, image: ResolvedImage) -> None:
        self.directory, self.image = directory, image
        self.state, self.run = directory / "state", directory / "run"
        self.runtime = self.open()

    def open(self, runtime: str = "auto") -> ConmonRuntime:
        """Another runtime object for the same host, as the next agent would have."""
        return ConmonRuntime(self.state, self.run, CGROUP_PARENT, runtime=runtime, host_id="rt")

    def request(self, task_id: str, command: Sequence[str] = (), *, shell: str = "", **kwargs: Any) -> CreateRequest:
        """`shell` is run by /bin/sh; spec fields and CreateRequest fields mix freely."""
        image = kwargs.pop("image", self.image)
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in ContainerSpec.DESCRIPTOR.fields_by_name}
        wanted = list(command) or ["/bin/sh", "-c", shell]
        spec = ContainerSpec(image=TOOL_IMAGE, command=wanted, **fields)
        kwargs.setdefault("netns", None)
        return CreateRequest(task_id, f"test.{task_id}", spec, image, hostname="box", **kwargs)

    async def started(self, task_id: str, command: Sequence[str] = (), *, shell: str = "", **kwargs: Any) -> None:
        await self.runtime.create(self.request(task_id, command, shell=shell, **kwargs))
        await self.runtime.start(task_id)

    async def output(self, task_id: str, shell: str, **kwargs: Any) -> str:
        """Run a shell command in a container to its end; what it wrote. Through one pipe: two have no order."""
        await self.started(task_id, shell="exec 2>&1; " + shell, **kwargs)
        await self.runtime.wait(task_id)
        return "\n".join(await self.lines(task_id))

    async def lines(self, task_id: str, tail: int = -1, **options: Any) -> list[str]:
        wanted = LogOptions(tail=tail, **options)
        return [line.data.decode() async for line in self.runtime.logs(task_id, wanted)]

    def leftovers(self) -> list[str]:
        """Whatever containers left on this host; empty when all were removed."""
        found = [str(path) for name in ("tasks", "exits") for path in (self.state / name).glob("*")]
        found += [str(path) for path in (self.run / "tasks").glob("*")]
        found += [str(path) for path in (self.run / "crun").glob("*")]
        found += [str(path) for path in (self.run / "runc").glob("*")]
        for hierarchy in cgroups.read_layout().hierarchies:
            parent = Path(hierarchy, CGROUP_PARENT.strip("/"))
            found += [str(path) for path in parent.glob("*") if path.is_dir()]
        return found


async def load_tool_image(directory: Path) -> ResolvedImage:
    """The tool image in a store under `directory`."""
    build_tool_image(directory / "tool.tar")
    store = ImageStore(directory / "images", directory / "images-run")
    await store.load(directory / "tool.tar", "", lambda _line: None)
    return await store.ensure(TOOL_IMAGE)


@asynccontextmanager
async def host_in(directory: Path, image: ResolvedImage) -> AsyncIterator[Host]:
    """A host whose containers are all removed at the end."""
    host = Host(directory, image)
    try:
        yield host
    finally:
        for status in await host.runtime.containers():
            await host.runtime.remove(status.task_id)
        await host.runtime.close()
        cgroups.remove(cgroups.read_layout(), CGROUP_PARENT.strip("/"))
