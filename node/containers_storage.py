"""Read containers/storage (overlay driver): the format that skopeo, podman and buildah share on a host.

    <root>/overlay-images/images.json           images: ID, names, digests, top layer
    <root>/overlay-images/<id>/<big data>       manifest and configuration
    <root>/overlay-layers/layers.json           layers: ID, parent, size
    <root>/overlay/<layer>/diff, overlay/l/<short name> -> ../<layer>/diff
The JSON files are replaced atomically; the lock beside each makes images and layers agree.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import json
import os
import re
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from node.interface import ImageConfig, ImageFault, ResolvedImage, StoredImage
from proto.objects_pb2 import HealthConfig

LOCK_TIMEOUT_S = 10.0
"""Others hold these locks for milliseconds; 10 s means that one hangs."""
_LOCK_POLL_S = 0.02
LAYERS_MAX = 500
"""overlayfs takes no more; also ends a loop in a damaged layers.json."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    image_id: str
    digest: str
    names: tuple[str, ...]
    top_layer: str
    digests: tuple[str, ...]
    """Of every manifest by which this image is known, a manifest list's included."""
    created_at: float
    store: Path
    read_only: bool


@dataclass(frozen=True, slots=True)
class LayerRecord:
    layer_id: str
    parent: str
    size_bytes: int
    store: Path


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All stores at one moment; own store first."""

    images: tuple[ImageRecord, ...] = ()
    layers: dict[str, LayerRecord] = field(default_factory=dict)


@contextlib.contextmanager
def locked(path: Path, exclusive: bool) -> Iterator[int]:
    """Hold a store's lock file. An open-file-description lock: it excludes the others' POSIX locks, and two
    threads of this process do not release each other's. Raises ImageFault when it stays taken."""
    try:
        fd = os.open(path, (os.O_RDWR | os.O_CREAT if exclusive else os.O_RDONLY) | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if not exclusive and error.errno in (errno.ENOENT, errno.EROFS, errno.EACCES):
            yield -1  # a read-only copy of a store: nobody writes it
            return
        raise
    try:
        request = struct.pack("hhqqi", fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if time.monotonic() > deadline:
                    raise ImageFault(
                        f"image store: {path} stays locked by another program for {LOCK_TIMEOUT_S:g} s"
                    ) from None
                time.sleep(_LOCK_POLL_S)
        yield fd
    finally:
        os.close(fd)


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text() or "[]"))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ImageFault(f"image store: {path} is damaged ({error}); remove it and pull the images again") from None


def parse_time(text: str) -> float:
    """Go's RFC 3339 with 0 to 9 digits of fraction -> Unix s; 0 when it is none."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)", text)
    if not match:
        return 0.0
    zone = "+00:00" if match[3] == "Z" else match[3]
    return datetime.fromisoformat(match[1] + zone).timestamp() + float(match[2] or 0)


def parse_image(raw: dict[str, Any], store: Path, read_only: bool) -> ImageRecord:
    named = raw.get("big-data-digests") or {}
    digests = [raw.get("digest") or "", *(named[key] for key in sorted(named) if key.startswith("manifest"))]
    return ImageRecord(
        image_id=str(raw["id"]),
        digest=str(raw.get("digest") or ""),
        names=tuple(raw.get("names") or ()),
        top_layer=str(raw.get("layer") or ""),
        digests=tuple(dict.fromkeys(digest for digest in digests if digest)),
        created_at=parse_time(str(raw.get("created") or "")),
        store=store,
        read_only=read_only,
    )


def _layers_of(store: Path) -> list[LayerRecord]:
    return [
        LayerRecord(str(raw["id"]), str(raw.get("parent") or ""), int(raw.get("diff-size") or 0), store)
        for raw in _read_json(store / "overlay-layers/layers.json")
        # An interrupted pull leaves a layer that is marked so, until the next writer clears it.
        if not (raw.get("flags") or {}).get("incomplete")
    ]


def read_stores(own: Path, shared: Sequence[Path]) -> Snapshot:
    """Images and layers of all stores; blocking. A shared store that does not exist is empty. Raises ImageFault."""
    images: list[ImageRecord] = []
    layers: dict[str, LayerRecord] = {}
    for store in (own, *shared):
        with (
            locked(store / "overlay-layers/layers.lock", exclusive=False),
            locked(store / "overlay-images/images.lock", exclusive=False),
        ):
            raws = _read_json(store / "overlay-images/images.json")
            images += [parse_image(raw, store, store != own) for raw in raws]
            for layer in _layers_of(store):
                layers.setdefault(layer.layer_id, layer)
    return Snapshot(tuple(images), layers)


def layer_chain(snapshot: Snapshot, image: ImageRecord) -> list[LayerRecord]:
    """The image's layers, topmost first. Raises ImageFault when one is missing."""
    chain: list[LayerRecord] = []
    layer_id = image.top_layer
    while layer_id:
        layer = snapshot.layers.get(layer_id)
        if layer is None or len(chain) >= LAYERS_MAX:
            raise ImageFault(
                f"image {image.image_id[:12]} in {image.store} lacks layer {layer_id[:12]}: remove it and pull it again"
            )
        chain.append(layer)
        layer_id = layer.parent
    return chain


def layer_directory(layer: LayerRecord) -> Path:
    """Its short name if there is one: a mount's options have to fit in a page."""
    base = layer.store / "overlay"
    with contextlib.suppress(OSError):
        short = base / "l" / (base / layer.layer_id / "link").read_text().strip()
        if short.is_dir():
            return short
    return base / layer.layer_id / "diff"


def big_data_file(store: Path, image_id: str, key: str) -> Path:
    """Keys that are not lower-case letters, digits and dots are stored under their base64."""
    name = key if re.fullmatch(r"[.0-9a-z]+", key) else "=" + base64.b64encode(key.encode()).decode()
    return store / "overlay-images" / image_id / name


def _health(raw: dict[str, Any]) -> HealthConfig:
    """Docker's extension of the OCI format; durations are nanoseconds."""
    seconds = {
        field: int(raw.get(key) or 0) / 1e9
        for field, key in (
            ("interval_s", "Interval"),
            ("timeout_s", "Timeout"),
            ("start_period_s", "StartPeriod"),
            ("start_interval_s", "StartInterval"),
        )
    }
    return HealthConfig(test=raw.get("Test") or (), retries=int(raw.get("Retries") or 0), **seconds)


def parse_config(text: str) -> ImageConfig:
    """The OCI or Docker image configuration. Raises ValueError."""
    try:
        raw = json.loads(text).get("config") or {}
        return ImageConfig(
            entrypoint=tuple(raw.get("Entrypoint") or ()),
            cmd=tuple(raw.get("Cmd") or ()),
            env=tuple(raw.get("Env") or ()),
            dir=raw.get("WorkingDir") or "",
            user=raw.get("User") or "",
            stop_signal=raw.get("StopSignal") or "",
            volumes=tuple(sorted(raw.get("Volumes") or ())),
            labels=dict(raw.get("Labels") or {}),
            health=_health(raw.get("Healthcheck") or {}),
        )
    except (AttributeError, TypeError) as error:
        raise ValueError(str(error)) from None


def resolve(snapshot: Snapshot, image: ImageRecord) -> ResolvedImage:
    """The image with its directories and configuration; blocking. Raises ImageFault."""
    try:
        manifest = json.loads(big_data_file(image.store, image.image_id, "manifest").read_text())
        config_key = str(manifest["config"]["digest"])
        config = parse_config(big_data_file(image.store, image.image_id, config_key).read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImageFault(
            f"image {image.image_id[:12]} in {image.store} has no readable configuration ({error}): pull it again",
            "invalid",
        ) from None
    layers = tuple(layer_directory(layer) for layer in layer_chain(snapshot, image))
    return ResolvedImage(image.image_id, layers, config)


def pinning_digest(image: ImageRecord) -> str:
    """The digest to pin the image by: its manifest list's if there is one, which serves nodes of every
    architecture, else its manifest's. Blocking."""
    for digest in image.digests:
        with contextlib.suppress(OSError, ValueError):
            manifest = json.loads(big_data_file(image.store, image.image_id, f"manifest-{digest}").read_text())
            if "manifests" in manifest:
                return digest
    return image.digest or image.digests[0]


def describe(snapshot: Snapshot, image: ImageRecord) -> StoredImage:
    size = 0
    with contextlib.suppress(ImageFault):
        size = sum(layer.size_bytes for layer in layer_chain(snapshot, image))
    return StoredImage(image.image_id, image.names, image.digests, size, image.created_at, image.read_only)


def set_names(own: Path, image_id: str, names: Sequence[str]) -> None:
    """Rewrite an image's names in the own store (skopeo can only delete whole images); blocking."""
    with locked(own / "overlay-images/images.lock", exclusive=True) as fd:
        path = own / "overlay-images/images.json"
        raws = _read_json(path)
        for raw in raws:
            if raw["id"] == image_id:
                raw["names"] = list(names)
        temporary = path.with_name(".images.json.tmp")
        temporary.write_text(json.dumps(raws))
        temporary.chmod(0o600)
        temporary.replace(path)
        # The lock file's content names the last writer: a new one tells other programs to read again.
        os.pwrite(fd, os.urandom(32).hex().encode(), 0)


def by_digest(snapshot: Snapshot, digest: str) -> ImageRecord | None:
    return next((image for image in snapshot.images if digest in image.digests), None)


def by_name(snapshot: Snapshot, name: str) -> ImageRecord | None:
    return next((image for image in snapshot.images if name in image.names), None)


def by_id(snapshot: Snapshot, prefix: str) -> list[ImageRecord]:
    """Images whose ID begins so; one in several stores counts once, the own store's first."""
    found: dict[str, ImageRecord] = {}
    for image in snapshot.images:
        if image.image_id.startswith(prefix):
            found.setdefault(image.image_id, image)
    return list(found.values())


def without(image: ImageRecord, names: Sequence[str]) -> ImageRecord:
    return replace(image, names=tuple(name for name in image.names if name not in names))
