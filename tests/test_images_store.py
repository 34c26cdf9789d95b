"""The image store on disk, a real skopeo, a real registry with a password on loopback."""

from __future__ import annotations

import asyncio
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from node.containers_storage import locked
from node.image_api import ImageApi
from node.images import ImageStore
from node.interface import ImageFault
from node.mounts import mount_points, own_mountinfo
from proto import local_pb2 as pb
from proto import local_pb2_grpc
from tests.containers import scratch_directory
from tests.images import build_tool_image, build_web_image
from tests.registries import Registry, registry_up, tool

pytestmark = pytest.mark.root


def quiet(_line: str) -> None:
    return None


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with registry_up("127.0.0.1") as made:
        yield made


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory() as directory:
        yield directory


@pytest.fixture
def store(scratch: Path) -> ImageStore:
    return ImageStore(scratch / "store", scratch / "run")


async def test_loading_an_archive_and_finding_it_under_every_spelling(scratch: Path, store: ImageStore) -> None:
    digest = build_tool_image(scratch / "a.tar", Env=["A=1"], Volumes={"/v": {}})
    lines: list[str] = []
    assert await store.load(scratch / "a.tar", "", lines.append) == ["pyswarm/tool:1"]
    assert any(line.startswith("Copying blob") for line in lines)
    image = await store.ensure("pyswarm/tool:1")
    assert image == await store.ensure(f"docker.io/pyswarm/tool:1@{digest}")
    assert image == await store.ensure(f"elsewhere.example/same@{digest}")
    assert (image.config.env, image.config.volumes) == (("A=1",), ("/v",))
    assert (image.layers[1] / "data/kept").read_text() == "from the image\n"
    assert (image.layers[0] / "gone").is_char_device()  # the whiteout, topmost first
    assert await store.resolve("pyswarm/tool:1") == (f"pyswarm/tool:1@{digest}", True)
    [stored] = await store.stored()
    assert (stored.image_id, stored.digests, stored.read_only) == (image.image_id, (digest,), False)
    assert stored.size_bytes > 1_000_000
    leftover = [point for point in mount_points(own_mountinfo()) if point.startswith(str(scratch))]
    assert leftover == []


async def test_a_docker_archive_and_a_given_name(scratch: Path, store: ImageStore) -> None:
    build_web_image(scratch / "a.tar")
    tool("skopeo", "copy", "-q", f"oci-archive:{scratch}/a.tar", f"docker-archive:{scratch}/d.tar:me/web:2")
    assert await store.load(scratch / "d.tar", "", quiet) == ["me/web:2"]
    assert await store.load(scratch / "d.tar", "mine", quiet) == ["mine:latest"]
    assert (await store.ensure("me/web:2")).image_id == (await store.ensure("mine")).image_id


async def test_an_archive_without_a_name_needs_one(scratch: Path, store: ImageStore) -> None:
    build_web_image(scratch / "a.tar", "")
    with pytest.raises(ImageFault, match="does not say the image's name"):
        await store.load(scratch / "a.tar", "", quiet)
    assert await store.load(scratch / "a.tar", "web:3", quiet) == ["web:3"]


async def test_names_go_one_by_one_and_the_image_with_the_last(scratch: Path, store: ImageStore) -> None:
    build_web_image(scratch / "a.tar")
    await store.load(scratch / "a.tar", "one", quiet)
    await store.load(scratch / "a.tar", "two", quiet)
    image = await store.ensure("one")
    with pytest.raises(ImageFault, match="several names"):
        await store.remove(image.image_id[:12], False, frozenset())
    assert await store.remove("one", False, frozenset()) == (["one:latest"], "")
    with pytest.raises(ImageFault, match="used by tasks") as caught:
        await store.remove("two", False, frozenset({image.image_id}))
    assert caught.value.kind == "in_use"
    assert await store.remove("two", False, frozenset()) == (["two:latest"], image.image_id)
    assert await store.stored() == []
    assert not any(layer.exists() for layer in image.layers)
    with pytest.raises(ImageFault) as caught:
        await store.remove("two", False, frozenset())
    assert caught.value.kind == "not_found"


async def test_force_takes_the_names_of_an_image_in_use_but_not_its_layers(scratch: Path, store: ImageStore) -> None:
    build_web_image(scratch / "a.tar")
    await store.load(scratch / "a.tar", "one", quiet)
    image = await store.ensure("one")
    assert await store.remove("one", True, frozenset({image.image_id})) == (["one:latest"], "")
    assert all(layer.exists() for layer in image.layers)
    assert await store.remove(image.image_id, False, frozenset()) == ([], image.image_id)


async def test_a_shared_store_is_read_and_never_written(scratch: Path, store: ImageStore) -> None:
    build_web_image(scratch / "a.tar")
    await store.load(scratch / "a.tar", "localhost/web:1", quiet)
    other = ImageStore(scratch / "other", scratch / "other-run", [scratch / "store", scratch / "absent"])
    image = await other.ensure("web:1")  # as podman and buildah name what they build
    assert image.layers[0].is_relative_to(scratch / "store")
    assert await other.resolve("web:1") == ("web:1", True)  # another node may have its own build
    assert [stored.read_only for stored in await other.stored()] == [True]
    with pytest.raises(ImageFault, match="read-only store"):
        await other.remove("web:1", True, frozenset())


async def test_a_damaged_store_says_so(scratch: Path, store: ImageStore) -> None:
    build_web_image(scratch / "a.tar")
    await store.load(scratch / "a.tar", "one", quiet)
    (scratch / "store/overlay-layers/layers.json").write_text("[]")
    with pytest.raises(ImageFault, match="lacks layer"):
        await store.ensure("one")
    (scratch / "store/overlay-images/images.json").write_text("[{")
    with pytest.raises(ImageFault, match="is damaged"):
        await store.ensure("one")


def test_the_stores_lock_excludes_writers_but_not_readers(scratch: Path) -> None:
    path = scratch / "x.lock"
    with locked(path, exclusive=True):
        code = f"import fcntl; fcntl.lockf(open({str(path)!r}, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        taken = subprocess.run(["python3", "-c", code], capture_output=True, timeout=10, check=False)
        assert b"BlockingIOError" in taken.stderr
    with locked(path, exclusive=False), locked(path, exclusive=False):
        pass


async def test_pulling_with_credentials_by_the_digest_of_the_tag(
    scratch: Path, store: ImageStore, registry: Registry
) -> None:
    digest = build_web_image(scratch / "a.tar")
    registry.push(scratch / "a.tar", "web:1")
    name = f"{registry.address}/web:1"
    assert await store.resolve(name, registry.auth) == (f"{name}@{digest}", False)
    pinned = await store.ensure(f"{name}@{digest}", registry.auth)
    assert await store.ensure(name, registry.auth) == pinned
    assert await store.resolve(name) == (f"{name}@{digest}", True)
    assert list((scratch / "store/pyswarm-tmp").iterdir()) == []  # no credentials are left behind


async def test_a_manifest_list_is_pinned_by_its_own_digest(
    scratch: Path, store: ImageStore, registry: Registry
) -> None:
    digest = build_tool_image(scratch / "a.tar", Env=["LISTED=1"])
    registry.push(scratch / "a.tar", "listed:member")
    size = len(_manifest(scratch / "a.tar", digest))
    listed = registry.push_list("listed:1", digest, size)
    name = f"{registry.address}/listed:1"
    assert await store.resolve(name, registry.auth) == (f"{name}@{listed}", False)
    image = await store.ensure(name, registry.auth)
    assert image.config.env == ("LISTED=1",)
    assert await store.resolve(name) == (f"{name}@{listed}", True)
    assert await store.ensure(f"{name}@{listed}") == image
    other = ImageStore(scratch / "other", scratch / "other-run")
    assert (await other.ensure(f"{name}@{listed}", registry.auth)).image_id == image.image_id
    assert (await other.ensure(f"{name}@{listed}")).image_id == image.image_id


def _manifest(archive: Path, digest: str) -> bytes:
    with tarfile.open(archive) as tar:
        file = tar.extractfile("blobs/sha256/" + digest.removeprefix("sha256:"))
        assert file is not None
        return file.read()


@pytest.mark.parametrize(
    ("name", "auth", "fault"),
    [
        ("absent:1", "auth", "not_found: no such image"),
        ("web:absent", "auth", "not_found: no such image"),
        ("web:1", "wrong", "denied: refuses access"),
        ("web:1", "", "denied: refuses access"),
    ],
)
async def test_refusals_of_a_registry(  # noqa: PLR0917
    scratch: Path, store: ImageStore, registry: Registry, name: str, auth: str, fault: str
) -> None:
    build_web_image(scratch / "a.tar")
    registry.push(scratch / "a.tar", "web:1")
    kind, words = fault.split(": ")
    given = {"auth": registry.auth, "wrong": registry.wrong, "": ""}[auth]
    with pytest.raises(ImageFault, match=words) as caught:
        await store.ensure(f"{registry.address}/{name}", given)
    assert caught.value.kind == kind
    assert "\n" not in str(caught.value)


async def test_a_registry_that_does_not_answer_is_unreachable(store: ImageStore) -> None:
    with pytest.raises(ImageFault, match=r"cannot reach 127\.0\.0\.1:1: .*connection refused") as caught:
        await store.ensure("127.0.0.1:1/x")
    assert caught.value.kind == "unreachable"


async def test_many_callers_pull_once_and_one_that_gives_up_does_not_stop_the_rest(
    scratch: Path, store: ImageStore, registry: Registry
) -> None:
    build_web_image(scratch / "a.tar")
    registry.push(scratch / "a.tar", "once:1")
    name = f"{registry.address}/once:1"
    lines: list[list[str]] = [[], []]
    calls = [asyncio.create_task(store.pull(name, registry.auth, heard.append)) for heard in lines]
    calls.append(asyncio.create_task(store.pull(name, registry.auth, quiet)))
    await asyncio.sleep(0)
    calls[2].cancel()
    first, second = await asyncio.gather(*calls[:2])
    assert first == second
    assert lines[0] == lines[1]
    assert sum("asking" in line for line in lines[0]) == 1
    assert calls[2].cancelled()


async def test_a_full_disk_is_told_as_such_and_leaves_the_store_usable(scratch: Path, registry: Registry) -> None:
    small = scratch / "small"
    small.mkdir()
    tool("mount", "-t", "tmpfs", "-o", "size=3m", "pyswarm-rt-small", small)
    build_web_image(scratch / "a.tar")
    registry.push(scratch / "a.tar", "big:1")
    store = ImageStore(small / "store", scratch / "run")
    with pytest.raises(ImageFault, match="no space left") as caught:
        await store.ensure(f"{registry.address}/big:1", registry.auth)
    assert caught.value.kind == "no_space"
    with pytest.raises(ImageFault) as caught:
        await store.load(scratch / "a.tar", "", quiet)
    assert caught.value.kind == "no_space"
    tool("mount", "-o", "remount,size=50m", small)
    assert (await store.ensure(f"{registry.address}/big:1", registry.auth)).config.cmd == ("/bin/web",)


class Servicer(ImageApi, local_pb2_grpc.LocalServicer):
    """The image half of the local API; the rest belongs to the agent."""

    async def Info(self, request: Any, context: Any) -> pb.InfoReply:
        return pb.InfoReply()

    async def Init(self, request: Any, context: Any) -> pb.InitReply:
        return pb.InitReply()

    async def Restore(self, request: Any, context: Any) -> pb.InitReply:
        return pb.InitReply()

    async def Join(self, request: Any, context: Any) -> pb.JoinReply:
        return pb.JoinReply()

    async def Leave(self, request: Any, context: Any) -> pb.LeaveReply:
        return pb.LeaveReply()

    async def Unlock(self, request: Any, context: Any) -> pb.UnlockReply:
        return pb.UnlockReply()

    async def KeepUnlockKey(self, request: Any, context: Any) -> pb.KeepUnlockKeyReply:
        return pb.KeepUnlockKeyReply()

    async def DiskUsage(self, request: Any, context: Any) -> pb.DiskUsageReply:
        return pb.DiskUsageReply()

    async def Prune(self, request: Any, context: Any) -> pb.PruneReply:
        return pb.PruneReply()


@pytest.fixture
async def local(scratch: Path, store: ImageStore) -> AsyncIterator[Any]:
    server = grpc.aio.server()
    servicer = Servicer(store, frozenset, scratch / "spool")
    local_pb2_grpc.add_LocalServicer_to_server(servicer, server)
    address = f"unix:{scratch}/local.sock"
    server.add_insecure_port(address)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield local_pb2_grpc.LocalStub(channel)
    await server.stop(None)


async def test_the_image_calls_of_the_local_api(scratch: Path, local: Any, registry: Registry) -> None:
    digest = build_web_image(scratch / "a.tar")
    data = (scratch / "a.tar").read_bytes()
    chunks = [
        pb.LoadChunk(name="mine:1"),
        *(pb.LoadChunk(data=data[i : i + 500_000]) for i in range(0, len(data), 500_000)),
    ]
    loaded = [message async for message in local.LoadImage(iter(chunks))]
    assert list(loaded[-1].names) == ["mine:1"]
    assert list((scratch / "spool").iterdir()) == []

    registry.push(scratch / "a.tar", "api:1")
    name = f"{registry.address}/api:1"
    reply = await local.ResolveImage(pb.PullRequest(name=name, registry_auth=registry.auth))
    assert (reply.name, reply.in_store) == (f"{name}@{digest}", False)
    pulled = [message async for message in local.PullImage(pb.PullRequest(name=name, registry_auth=registry.auth))]
    assert name in pulled[-1].image.names
    assert "pulled" in pulled[-2].message

    [image] = (await local.ListImages(pb.ImageListRequest())).images
    assert set(image.names) == {"docker.io/library/mine:1", name}
    removed = await local.RemoveImage(pb.ImageRemoveRequest(ref=image.id, force=True))
    assert removed.deleted == image.id


@pytest.mark.parametrize(
    ("name", "status"),
    [("127.0.0.1:1/x", grpc.StatusCode.UNAVAILABLE), ("NO", grpc.StatusCode.INVALID_ARGUMENT)],
)
async def test_faults_become_grpc_statuses(local: Any, name: str, status: grpc.StatusCode) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as resolved:
        await local.ResolveImage(pb.PullRequest(name=name))
    with pytest.raises(grpc.aio.AioRpcError) as pulled:
        async for _ in local.PullImage(pb.PullRequest(name=name)):
            pass
    assert (resolved.value.code(), pulled.value.code()) == (status, status)
    with pytest.raises(grpc.aio.AioRpcError) as loaded:
        async for _ in local.LoadImage(iter([pb.LoadChunk(data=b"junk")])):
            pass
    assert loaded.value.code() is grpc.StatusCode.INVALID_ARGUMENT
