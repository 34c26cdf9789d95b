"""The image store of a node: containers/storage read directly, filled by skopeo (node.interface.Images)."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from node import archives, registry
from node import containers_storage as storage
from node.interface import ImageFault, ResolvedImage, StoredImage
from node.process import CommandTimeout, Finished, run
from node.registry import Reference, parse_reference

PULLS_IN_FLIGHT_MAX = 3
"""As Docker: more share the same disk and line, and each finishes later."""
INSPECT_TIMEOUT_S = 60.0
PULL_TIMEOUT_S = 3600.0
"""A pull that makes no end in an hour is stuck; a slow line gets gigabytes through in less."""
LOCAL_TIMEOUT_S = 600.0
"""Loading and deleting: only this host's disk is involved."""
_POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}'
_HOST_POLICIES = (Path("/etc/containers/policy.json"), Path("~/.config/containers/policy.json").expanduser())


def _ignore(_line: str) -> None:
    return None


class _Joined:
    """A pull that several callers wait for; it is cancelled when the last of them gives up."""

    def __init__(self) -> None:
        self.task: asyncio.Task[storage.ImageRecord] | None = None
        self.waiters = 0
        self.listeners: list[Callable[[str], None]] = []

    def tell(self, line: str) -> None:
        for listener in self.listeners:
            listener(line)


class ImageStore:
    """`root` and `runroot` as in containers-storage.conf(5): the store on disk, and its locks and temporary state.
    `shared`: stores that are read but never written, such as /var/lib/containers/storage of podman.
    `insecure_registries`: hosts (or host:port) spoken to without verified TLS, besides this host's own."""

    def __init__(
        self,
        root: Path,
        runroot: Path,
        shared: Sequence[Path] = (),
        insecure_registries: frozenset[str] = frozenset(),
    ) -> None:
        self._root, self._runroot = root.resolve(), runroot.resolve()
        self._shared = tuple(path.resolve() for path in shared if path.resolve() != self._root)
        self._insecure = insecure_registries
        self._slots = asyncio.Semaphore(PULLS_IN_FLIGHT_MAX)
        self._joined: dict[tuple[str, str], _Joined] = {}
        self._counter = itertools.count()
        self._scratch = self._root / "pyswarm-tmp"
        shutil.rmtree(self._scratch, ignore_errors=True)  # of an agent that was killed

    # ------------------------------------------------------------------ what is there

    async def _snapshot(self) -> storage.Snapshot:
        return await asyncio.to_thread(storage.read_stores, self._root, self._shared)

    @staticmethod
    def _find(snapshot: storage.Snapshot, name: str, reference: Reference) -> storage.ImageRecord | None:
        if reference.digest:
            # The digest alone decides: equal content is the same image, whatever it is called.
            return storage.by_digest(snapshot, reference.digest)
        for stored_name in registry.store_names(reference):
            if image := storage.by_name(snapshot, stored_name):
                return image
        prefix = registry.image_id_prefix(name)
        found = storage.by_id(snapshot, prefix) if prefix else []
        return found[0] if len(found) == 1 else None

    async def ensure(self, name: str, registry_auth: str = "") -> ResolvedImage:
        """The image from a store, else pulled. Concurrent calls pull once. Raises ImageFault."""
        reference = parse_reference(name)
        snapshot = await self._snapshot()
        image = self._find(snapshot, name, reference)
        if image is None:
            image = await self._pull_joined(name, reference, registry_auth, _ignore)
            snapshot = await self._snapshot()
        return await asyncio.to_thread(storage.resolve, snapshot, image)

    async def resolve(self, name: str, registry_auth: str = "") -> tuple[str, bool]:
        """(name pinned by digest when one is known, whether it is in a store). Names of images that were built
        here (localhost/...) stay as they are: another node may have its own build. Raises ImageFault."""
        reference = parse_reference(name)
        image = self._find(await self._snapshot(), name, reference)
        if reference.digest:
            if image is None:
                await self._remote_digest(reference, registry_auth)
            return reference.familiar, image is not None
        if image is None:
            return _pinned(reference, await self._remote_digest(reference, registry_auth)), False
        if reference.tagged not in image.names or not image.digests or reference.domain == "localhost":
            return name, True
        return _pinned(reference, await asyncio.to_thread(storage.pinning_digest, image)), True

    async def stored(self) -> list[StoredImage]:
        snapshot = await self._snapshot()
        described = [storage.describe(snapshot, image) for image in snapshot.images]
        return sorted(described, key=lambda image: (image.names, image.image_id))

    # ------------------------------------------------------------------ skopeo

    def _storage_name(self, rest: str) -> str:
        return f"containers-storage:[overlay@{self._root}+{self._runroot}]{rest}"

    def _policy(self) -> list[str]:
        if any(path.exists() for path in _HOST_POLICIES):
            return []
        path = self._root / "pyswarm-policy.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_POLICY)
        return ["--policy", str(path)]

    async def _skopeo(
        self, *args: str, timeout_s: float, on_line: Callable[[str], None] = _ignore, auth: str = "", domain: str = ""
    ) -> Finished:
        """Run skopeo with a scratch directory of its own. Raises ImageFault when it cannot run or hangs."""
        skopeo = shutil.which("skopeo")
        if skopeo is None:
            raise ImageFault("skopeo is not installed on this node: install it (apt install skopeo)")
        scratch = self._scratch / str(next(self._counter))
        try:
            scratch.mkdir(parents=True)
            command, *rest = args
            argv = [skopeo, *self._policy(), "--tmpdir", str(scratch), command]
            if auth:
                auth_file = scratch / "auth.json"
                auth_file.touch(mode=0o600)
                auth_file.write_text(registry.auth_file(domain, auth))
                argv += ["--authfile", str(auth_file)]
            # A mount namespace of its own: it bind-mounts the store on itself and leaves that behind.
            unshare = ["unshare", "--mount", "--propagation", "private"]
            return await run([*unshare, *argv, *rest], timeout_s=timeout_s, on_line=_progress(on_line))
        except CommandTimeout as error:
            raise ImageFault(f"image store: {error}", "unreachable" if domain else "failed") from None
        except OSError as error:
            kind, _ = registry.classify(str(error))
            raise ImageFault(f"image store {self._root}: {error}", kind) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _tls(self, flag: str, reference: Reference) -> list[str]:
        return [f"{flag}=false"] if registry.plain_http(reference.domain, self._insecure) else []

    async def _remote_digest(self, reference: Reference, auth: str) -> str:
        """The digest of the manifest (or manifest list) that the registry has under this name."""
        wanted = f"@{reference.digest}" if reference.digest else f":{reference.tag}"
        done = await self._skopeo(
            "inspect",
            *self._tls("--tls-verify", reference),
            "--raw",
            f"docker://{reference.repository}{wanted}",
            timeout_s=INSPECT_TIMEOUT_S,
            auth=auth,
            domain=reference.domain,
        )
        if done.code != 0:
            raise registry.pull_fault(reference, done.errors.decode(errors="replace"))
        return "sha256:" + hashlib.sha256(done.output).hexdigest()

    # ------------------------------------------------------------------ pull

    async def pull(self, name: str, registry_auth: str, progress: Callable[[str], None]) -> StoredImage:
        """Fetch what the registry has under this name now, even if a store has an older one. Raises ImageFault."""
        image = await self._pull_joined(name, parse_reference(name), registry_auth, progress)
        return storage.describe(await self._snapshot(), image)

    async def _pull_joined(
        self, name: str, reference: Reference, auth: str, progress: Callable[[str], None]
    ) -> storage.ImageRecord:
        key = (reference.familiar, auth)
        joined = self._joined.setdefault(key, _Joined())
        if joined.task is None:
            joined.task = asyncio.create_task(self._pull(reference, auth, joined.tell), name=f"pull {name}")
        joined.waiters += 1
        joined.listeners.append(progress)
        try:
            return await asyncio.shield(joined.task)
        finally:
            joined.waiters -= 1
            joined.listeners.remove(progress)
            if not joined.waiters or joined.task.done():
                joined.task.cancel()
                if self._joined.get(key) is joined:
                    del self._joined[key]

    async def _pull(self, reference: Reference, auth: str, tell: Callable[[str], None]) -> storage.ImageRecord:
        async with self._slots:
            if reference.domain == "localhost":
                raise ImageFault(
                    f"image {reference.familiar} is not on this node and has no registry: build or load it here",
                    "not_found",
                )
            tell(f"{reference.familiar}: asking {reference.domain}")
            # By digest from here on: what is copied is what was asked for, even if the tag moves meanwhile.
            digest = reference.digest or await self._remote_digest(reference, auth)
            name = f"{reference.repository}@{digest}" if reference.digest else reference.tagged
            await self._copy(reference, digest, name, auth, tell)
            image = storage.by_digest(own := await self._own_snapshot(), digest) or storage.by_name(own, name)
            if image is None:
                raise ImageFault(f"image {reference.familiar} vanished from the store while it was pulled", "failed")
            tell(f"{reference.familiar}: pulled {digest}")
            return image

    async def _own_snapshot(self) -> storage.Snapshot:
        return await asyncio.to_thread(storage.read_stores, self._root, ())

    async def _copy(self, reference: Reference, digest: str, name: str, auth: str, tell: Callable[[str], None]) -> None:
        done = await self._skopeo(
            "copy",
            *self._tls("--src-tls-verify", reference),
            f"docker://{reference.repository}@{digest}",
            self._storage_name(name),
            timeout_s=PULL_TIMEOUT_S,
            on_line=tell,
            auth=auth,
            domain=reference.domain,
        )
        if done.code != 0:
            raise registry.pull_fault(reference, done.errors.decode(errors="replace"))

    # ------------------------------------------------------------------ load and remove

    async def load(self, archive: Path, name: str, progress: Callable[[str], None]) -> list[str]:
        """Put the images of an archive into the own store; `name` overrides the archive's (one image only).
        Returns the names. Raises ImageFault."""
        images = await asyncio.to_thread(archives.read_archive, archive)
        if name and len(images) != 1:
            raise ImageFault(f"the archive holds {len(images)} images: load it without giving a name", "invalid")
        loaded: list[str] = []
        for image in images:
            names = (parse_reference(name).tagged,) if name else image.names
            if not names:
                raise ImageFault("the archive does not say the image's name: give one with --name", "invalid")
            for target in names:
                done = await self._skopeo(
                    "copy", image.source, self._storage_name(target), timeout_s=LOCAL_TIMEOUT_S, on_line=progress
                )
                if done.code != 0:
                    kind, reason = registry.classify(done.errors.decode(errors="replace"))
                    raise ImageFault(reason, "no_space" if kind == "no_space" else "invalid")
                loaded.append(parse_reference(target).familiar)
        return loaded

    async def usage(self, in_use: frozenset[str]) -> tuple[int, int]:
        """(bytes of this host's own images, those of them that only unused images need). Layers count once."""
        snapshot = await self._snapshot()
        sizes: dict[str, int] = {}
        needed: set[str] = set()
        for image in snapshot.images:
            if image.read_only:
                continue
            layers = storage.layer_chain(snapshot, image)
            own = {layer.layer_id: layer.size_bytes for layer in layers if layer.store == self._root}
            sizes |= own
            if image.image_id in in_use:
                needed |= own.keys()
        return sum(sizes.values()), sum(size for layer_id, size in sizes.items() if layer_id not in needed)

    async def remove(self, ref: str, force: bool, in_use: frozenset[str]) -> tuple[list[str], str]:
        """Remove a name, and with its last name the image. (names removed, ID deleted or ""). An image in use
        loses its names at most (with `force`), never its layers: a running task is mounted on them."""
        snapshot = await self._snapshot()
        image, names = _removal(snapshot, ref)
        short = image.image_id[:12]
        if image.read_only:
            raise ImageFault(f"image {ref} lies in the read-only store {image.store}: remove it there", "denied")
        if len(names) > 1 and not force:
            raise ImageFault(f"image {short} has several names ({', '.join(names)}): use --force", "in_use")
        rest = storage.without(image, names).names
        if not rest and image.image_id not in in_use:
            await self._delete(image)
            return _familiar(names), image.image_id
        if not rest and not force:
            raise ImageFault(f"image {ref} ({short}) is used by tasks on this node: remove those first", "in_use")
        await asyncio.to_thread(storage.set_names, self._root, image.image_id, rest)
        return _familiar(names), ""

    async def _delete(self, image: storage.ImageRecord) -> None:
        done = await self._skopeo("delete", self._storage_name("@" + image.image_id), timeout_s=LOCAL_TIMEOUT_S)
        if done.code != 0:
            _, reason = registry.classify(done.errors.decode(errors="replace"))
            raise ImageFault(f"cannot delete image {image.image_id[:12]}: {reason}")


def _progress(on_line: Callable[[str], None]) -> Callable[[str], None]:
    """Without skopeo's log lines: the last of them becomes the error."""

    def tell(line: str) -> None:
        if line and not line.startswith("time="):
            on_line(line)

    return tell


def _pinned(reference: Reference, digest: str) -> str:
    return Reference(reference.domain, reference.path, reference.tag, digest).familiar


def _familiar(names: Sequence[str]) -> list[str]:
    return [parse_reference(name).familiar for name in names]


def _removal(snapshot: storage.Snapshot, ref: str) -> tuple[storage.ImageRecord, tuple[str, ...]]:
    """The image meant by a name, digest or ID, and which of its names go. Raises ImageFault(not_found)."""
    prefix = registry.image_id_prefix(ref)
    found = storage.by_id(snapshot, prefix) if prefix else []
    if len(found) > 1:
        raise ImageFault(f"{ref} matches {len(found)} images: give more of the ID", "invalid")
    if found:
        return found[0], found[0].names
    reference = parse_reference(ref)
    if reference.digest and (image := storage.by_digest(snapshot, reference.digest)):
        return image, image.names
    for name in () if reference.digest else registry.store_names(reference):
        if image := storage.by_name(snapshot, name):
            return image, (name,)
    raise ImageFault(f"no such image on this node: {ref}", "not_found")
