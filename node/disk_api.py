"""What this host's disk holds for tasks, and giving back what no task uses (service Local of proto/local.proto)."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio

from node.images import ImageStore
from node.interface import ImageFault, Phase, Runtime
from proto import local_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]


def tree_bytes(path: Path) -> int:
    """Blocks on the disk of everything below; what vanishes meanwhile does not count. Blocking."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in (*names, "."):
            try:
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
            except OSError:
                continue
    return total


def volume_uses(state_dir: Path) -> Counter[str]:
    """Named volume -> how many containers of this host have it mounted, ended ones included. Blocking."""
    root = str(state_dir / "volumes") + "/"
    uses: Counter[str] = Counter()
    for config in (state_dir / "tasks").glob("*/config.json"):
        try:
            mounts = json.loads(config.read_text()).get("mounts", [])
        except (OSError, ValueError):
            continue
        sources = {str(mount.get("source", "")) for mount in mounts}
        uses.update({source.removeprefix(root).split("/")[0] for source in sources if source.startswith(root)})
    return uses


class DiskApi:
    """Mix into the servicer of Local. `wanted_volumes`: names that tasks of this host want, made or not yet."""

    def __init__(
        self,
        images: ImageStore,
        runtime: Runtime,
        in_use: Callable[[], frozenset[str]],
        wanted_volumes: Callable[[], frozenset[str]],
        state_dir: Path,
    ) -> None:
        self._disk_images, self._disk_runtime, self._state_dir = images, runtime, state_dir
        self._images_in_use, self._wanted_volumes = in_use, wanted_volumes

    async def DiskUsage(self, request: pb.DiskUsageRequest, context: Context) -> pb.DiskUsageReply:
        in_use = self._images_in_use()
        try:
            size, reclaimable = await self._disk_images.usage(in_use)
            stored = [image for image in await self._disk_images.stored() if not image.read_only]
        except ImageFault as fault:
            await context.abort(grpc.StatusCode.INTERNAL, str(fault))
        phases = {status.task_id: status.phase for status in await self._disk_runtime.containers()}
        reply = await asyncio.to_thread(self._walk, phases)
        reply.images.total = len(stored)
        reply.images.active = sum(image.image_id in in_use for image in stored)
        reply.images.size_bytes, reply.images.reclaimable_bytes = size, reclaimable
        return reply

    def _walk(self, phases: dict[str, Phase]) -> pb.DiskUsageReply:
        reply = pb.DiskUsageReply()
        for task_id, phase in sorted(phases.items()):
            size = tree_bytes(self._state_dir / "tasks" / task_id)
            reply.containers.total += 1
            reply.containers.active += phase is Phase.RUNNING
            reply.containers.size_bytes += size
            reply.containers.reclaimable_bytes += 0 if phase is Phase.RUNNING else size
            reply.items.add(type="container", name=task_id, size_bytes=size, uses=int(phase is Phase.RUNNING))
        uses = volume_uses(self._state_dir)
        for path in self._volumes():
            size = tree_bytes(path)
            reply.volumes.total += 1
            reply.volumes.active += path.name in uses
            reply.volumes.size_bytes += size
            reply.volumes.reclaimable_bytes += 0 if path.name in uses else size
            reply.items.add(type="volume", name=path.name, size_bytes=size, uses=uses[path.name])
        return reply

    def _volumes(self) -> list[Path]:
        root = self._state_dir / "volumes"
        return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []

    async def Prune(self, request: pb.PruneRequest, context: Context) -> pb.PruneReply:
        """Images without a name (with `all` every one that no container uses), and with `volumes` the named
        volumes that no task of this host wants. Ended containers are the swarm's history: it removes them itself."""
        reply = pb.PruneReply()
        oldest = time.time() - request.until_s
        before, _ = await self._disk_images.usage(self._images_in_use())
        for image in await self._disk_images.stored():
            unwanted = request.all or not image.names
            if image.read_only or not unwanted or image.image_id in self._images_in_use() or image.created_at > oldest:
                continue
            try:
                for ref in image.names or (image.image_id,):
                    untagged, deleted = await self._disk_images.remove(ref, True, self._images_in_use())
                    reply.images.extend(untagged)
                    reply.images.extend([f"sha256:{deleted}"] if deleted else [])
            except ImageFault as fault:
                reply.problems.append(str(fault))
        after, _ = await self._disk_images.usage(self._images_in_use())
        reply.reclaimed_bytes = max(0, before - after)
        if request.volumes:
            await self._prune_volumes(reply, oldest)
        return reply

    async def _prune_volumes(self, reply: pb.PruneReply, oldest: float) -> None:
        uses = await asyncio.to_thread(volume_uses, self._state_dir)
        for path in self._volumes():
            # Asked anew for each: a task may have come meanwhile. It makes its volume again, from the image.
            if path.name in uses or path.name in self._wanted_volumes() or path.stat().st_mtime > oldest:
                continue
            gone = path.with_name(f".{path.name}.pruned")
            try:
                path.rename(gone)
                size = await asyncio.to_thread(tree_bytes, gone)
                await asyncio.to_thread(shutil.rmtree, gone)
            except OSError as error:
                reply.problems.append(f"volume {path.name}: {error.strerror}")
                continue
            reply.volumes.append(path.name)
            reply.reclaimed_bytes += size
