"""What an image archive contains: docker-archive (`docker save`) or oci-archive. Blocking, reads the index only."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

from node.interface import ImageFault
from node.registry import parse_reference

INDEX_BYTES_MAX = 4_000_000
"""Of manifest.json and index.json; theirs are a few kilobytes."""
_REF_NAME = "org.opencontainers.image.ref.name"
_FULL_NAMES = ("io.containerd.image.name", _REF_NAME)


@dataclass(frozen=True, slots=True)
class ArchiveImage:
    source: str
    """skopeo's name for it."""
    names: tuple[str, ...]
    """Normalised, with tag; () = the archive does not say."""


def _member(tar: tarfile.TarFile, name: str) -> bytes | None:
    for spelling in (name, "./" + name):
        try:
            file = tar.extractfile(spelling)
        except KeyError:
            continue
        if file is not None:
            return file.read(INDEX_BYTES_MAX)
    return None


def _docker(path: Path, text: bytes) -> list[ArchiveImage]:
    images = []
    for number, entry in enumerate(json.loads(text)):
        tags = tuple(parse_reference(tag).tagged for tag in entry.get("RepoTags") or ())
        images.append(ArchiveImage(f"docker-archive:{path}:@{number}", tags))
    return images


def _oci(path: Path, text: bytes) -> list[ArchiveImage]:
    images = []
    entries = json.loads(text).get("manifests") or []
    for entry in entries:
        notes = entry.get("annotations") or {}
        # A bare tag ("latest") says nothing about the repository.
        full = next((notes[key] for key in _FULL_NAMES if any(mark in notes.get(key, "") for mark in "/:")), "")
        names = (parse_reference(full).tagged,) if full else ()
        ref = notes.get(_REF_NAME, "")
        if len(entries) > 1 and not ref:
            raise ImageFault("the archive holds several images without names: save them one by one", "invalid")
        images.append(ArchiveImage(f"oci-archive:{path}" + (f":{ref}" if ref else ""), names))
    return images


def read_archive(path: Path) -> list[ArchiveImage]:
    """The images of an archive. Raises ImageFault(invalid) for a file that is none; it speaks
    of "the archive", since the file may be a copy whose name means nothing to the user."""
    try:
        with tarfile.open(path) as tar:
            docker = _member(tar, "manifest.json")
            index = _member(tar, "index.json") if docker is None else None
        images = _docker(path, docker) if docker is not None else _oci(path, index) if index is not None else []
    except (tarfile.TarError, OSError, EOFError) as error:
        why = " ".join(str(error).split())  # tarfile lists every compression it tried, one a line
        raise ImageFault(f"it is not an image archive: {why}", "invalid") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise ImageFault(f"its index is damaged: {error}", "invalid") from None
    if not images:
        raise ImageFault("it is not an image archive: neither manifest.json nor index.json names an image", "invalid")
    return images
