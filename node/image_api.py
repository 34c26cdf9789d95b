"""The image calls of the agent's local API (service Local of proto/local.proto)."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio

from node.interface import ImageFault, Images, StoredImage
from proto import local_pb2 as pb

PROGRESS_LINES_MAX = 1000
"""Waiting for a slow client; further lines are dropped, the result is not."""

Context = grpc.aio.ServicerContext[Any, Any]

_STATUS = {
    "not_found": grpc.StatusCode.NOT_FOUND,
    "denied": grpc.StatusCode.PERMISSION_DENIED,
    "unreachable": grpc.StatusCode.UNAVAILABLE,
    "no_space": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "in_use": grpc.StatusCode.FAILED_PRECONDITION,
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
}


def _message(image: StoredImage) -> pb.Image:
    return pb.Image(
        id=image.image_id,
        names=image.names,
        digests=image.digests,
        size_bytes=image.size_bytes,
        created_at=image.created_at,
        read_only=image.read_only,
    )


async def _refuse(context: Context, fault: ImageFault) -> NoReturn:
    await context.abort(_STATUS.get(fault.kind, grpc.StatusCode.INTERNAL), str(fault))
    raise AssertionError("abort returned")


class ImageApi:
    """Mix into the servicer of Local, or register its methods. `in_use` gives the image IDs of local tasks;
    `spool_dir` takes archives while they arrive and must be on a real disk."""

    def __init__(self, images: Images, in_use: Callable[[], frozenset[str]], spool_dir: Path) -> None:
        self._images = images
        self._in_use = in_use
        self._spool_dir = spool_dir

    async def ListImages(self, request: pb.ImageListRequest, context: Context) -> pb.ImageList:
        try:
            return pb.ImageList(images=[_message(image) for image in await self._images.stored()])
        except ImageFault as fault:
            await _refuse(context, fault)

    async def ResolveImage(self, request: pb.PullRequest, context: Context) -> pb.ResolveReply:
        try:
            name, in_store = await self._images.resolve(request.name, request.registry_auth)
        except ImageFault as fault:
            await _refuse(context, fault)
        return pb.ResolveReply(name=name, in_store=in_store)

    async def PullImage(self, request: pb.PullRequest, context: Context) -> AsyncIterator[pb.ImageProgress]:
        async def work(tell: Callable[[str], None]) -> pb.ImageProgress:
            return pb.ImageProgress(image=_message(await self._images.pull(request.name, request.registry_auth, tell)))

        async for message in _with_progress(work, context):
            yield message

    async def LoadImage(
        self, request_iterator: AsyncIterator[pb.LoadChunk], context: Context
    ) -> AsyncIterator[pb.ImageProgress]:
        self._spool_dir.mkdir(parents=True, exist_ok=True)
        fd, path = tempfile.mkstemp(prefix="load-", suffix=".tar", dir=self._spool_dir)
        archive = Path(path)
        try:
            name = await self._receive(fd, request_iterator, context)

            async def work(tell: Callable[[str], None]) -> pb.ImageProgress:
                return pb.ImageProgress(names=await self._images.load(archive, name, tell))

            async for message in _with_progress(work, context):
                yield message
        finally:
            archive.unlink(missing_ok=True)

    async def _receive(self, fd: int, chunks: AsyncIterator[pb.LoadChunk], context: Context) -> str:
        name = ""
        try:
            with os.fdopen(fd, "wb") as file:
                async for chunk in chunks:
                    name = name or chunk.name
                    await asyncio.to_thread(file.write, chunk.data)
        except OSError as error:
            await _refuse(context, ImageFault(f"receiving the archive in {self._spool_dir}: {error}", "no_space"))
        return name

    async def RemoveImage(self, request: pb.ImageRemoveRequest, context: Context) -> pb.ImageRemoveReply:
        try:
            untagged, deleted = await self._images.remove(request.ref, request.force, self._in_use())
        except ImageFault as fault:
            await _refuse(context, fault)
        return pb.ImageRemoveReply(untagged=untagged, deleted=deleted)


async def _with_progress(
    work: Callable[[Callable[[str], None]], Awaitable[pb.ImageProgress]], context: Context
) -> AsyncIterator[pb.ImageProgress]:
    """The lines that `work` tells while it runs, then its result. Cancelled with the call."""
    queue: asyncio.Queue[pb.ImageProgress | None] = asyncio.Queue()

    def tell(line: str) -> None:
        if queue.qsize() < PROGRESS_LINES_MAX:
            queue.put_nowait(pb.ImageProgress(message=line))

    task = asyncio.ensure_future(work(tell))
    task.add_done_callback(lambda _task: queue.put_nowait(None))
    try:
        while (message := await queue.get()) is not None:
            yield message
        try:
            yield await task
        except ImageFault as fault:
            await _refuse(context, fault)
    finally:
        task.cancel()
