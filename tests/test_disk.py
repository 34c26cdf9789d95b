"""What the disk holds, what a prune takes, and what it must not."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest

from node.disk_api import DiskApi, tree_bytes, volume_uses
from node.images import ImageStore
from proto import local_pb2 as pb
from proto.local_pb2_grpc import LocalServicer, LocalStub, add_LocalServicer_to_server
from swarm.cli.disk import item_rows, usage_rows
from tests.fakes import FakeRuntime
from tests.images import TOOL_IMAGE, build_tool_image, build_web_image

if TYPE_CHECKING:
    from proto.local_pb2_grpc import LocalAsyncStub

pytestmark = pytest.mark.root


class Service(DiskApi, LocalServicer):
    pass


class Disk:
    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self.images = ImageStore(self.state / "storage", directory / "run")
        self.used_images: frozenset[str] = frozenset()
        self.wanted: frozenset[str] = frozenset()
        self.service: Service = cast("Any", Service)(  # membership is not asked for here
            self.images, FakeRuntime(), lambda: self.used_images, lambda: self.wanted, self.state
        )
        self.stub: LocalAsyncStub

    def volume(self, name: str, size: int = 100_000) -> None:
        data = self.state / "volumes" / name / "_data"
        data.mkdir(parents=True)
        (data / "file").write_bytes(os.urandom(size))

    def container(self, task_id: str, *volumes: str) -> None:
        directory = self.state / "tasks" / task_id
        directory.mkdir(parents=True)
        mounts = [{"source": str(self.state / "volumes" / name / "_data"), "destination": "/x"} for name in volumes]
        (directory / "config.json").write_text(json.dumps({"mounts": [*mounts, {"source": "proc"}]}))


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("archives")
    build_tool_image(directory / "tool.tar")
    build_web_image(directory / "web.tar")
    return directory


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[Disk]:
    made = Disk(tmp_path)
    server = grpc.aio.server()
    add_LocalServicer_to_server(made.service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        made.stub = LocalStub(channel)
        yield made
    await server.stop(None)


def test_blocks_are_counted_and_what_vanishes_is_not(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(os.urandom(1_000_000))
    (tmp_path / "link").symlink_to("/etc")
    assert 1_000_000 <= tree_bytes(tmp_path) < 1_100_000
    assert tree_bytes(tmp_path / "nothing") == 0


async def test_volumes_are_counted_by_the_containers_that_have_them(disk: Disk) -> None:
    disk.volume("data")
    disk.volume("old", 50_000)
    disk.container("t1", "data")
    disk.container("t2", "data")
    assert volume_uses(disk.state) == {"data": 2}
    reply = await disk.stub.DiskUsage(pb.DiskUsageRequest())
    assert (reply.volumes.total, reply.volumes.active) == (2, 1)
    assert 50_000 <= reply.volumes.reclaimable_bytes < 70_000 < reply.volumes.size_bytes
    assert [row["Type"] for row in usage_rows(reply)] == ["Images", "Containers", "Local Volumes"]
    assert [(row["Name"], row["Uses"]) for row in item_rows(reply)] == [("data", "2"), ("old", "0")]


async def test_a_prune_takes_only_volumes_that_nobody_has_or_wants(disk: Disk) -> None:
    for name in ("mounted", "wanted", "free"):
        disk.volume(name)
    disk.container("t1", "mounted")
    disk.wanted = frozenset({"wanted"})
    assert not (await disk.stub.Prune(pb.PruneRequest())).volumes, "volumes only when asked"
    assert not (await disk.stub.Prune(pb.PruneRequest(volumes=True, until_s=3600))).volumes, "too young"
    reply = await disk.stub.Prune(pb.PruneRequest(volumes=True))
    assert list(reply.volumes) == ["free"]
    assert reply.reclaimed_bytes >= 100_000
    assert sorted(path.name for path in (disk.state / "volumes").iterdir()) == ["mounted", "wanted"]


async def test_a_prune_of_images_spares_those_in_use_and_shared_layers_count_once(disk: Disk, archives: Path) -> None:
    for name in ("tool", "web"):
        await disk.images.load(archives / f"{name}.tar", "", lambda _line: None)
    used = await disk.images.ensure(TOOL_IMAGE)
    disk.used_images = frozenset({used.image_id})
    usage = (await disk.stub.DiskUsage(pb.DiskUsageRequest())).images
    assert (usage.total, usage.active) == (2, 1)
    assert 0 < usage.reclaimable_bytes < usage.size_bytes
    assert not (await disk.stub.Prune(pb.PruneRequest())).images, "images with a name only with --all"
    reply = await disk.stub.Prune(pb.PruneRequest(all=True))
    assert not reply.problems
    assert any(name.startswith("sha256:") for name in reply.images)
    assert [image.image_id for image in await disk.images.stored()] == [used.image_id]
    after = (await disk.stub.DiskUsage(pb.DiskUsageRequest())).images
    assert (after.total, after.reclaimable_bytes) == (1, 0)
    assert reply.reclaimed_bytes == usage.size_bytes - after.size_bytes
