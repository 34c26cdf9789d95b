"""Image names as people write them: what registry they mean, and how they are shown. Pure."""

from __future__ import annotations

import re

DOCKER_HUB = "docker.io"


def registry_of(name: str) -> str:
    """ "ghcr.io/a/b:1" -> "ghcr.io"; a first part without dot, colon or "localhost" means docker.io."""
    first, slash, _ = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return DOCKER_HUB if first == "index.docker.io" else first
    return DOCKER_HUB


def without_digest(name: str) -> str:
    """The name as `service ls` shows it: the digest goes where a tag or name remains, and so does
    the docker.io prefix that resolving added."""
    shown = name.partition("@")[0] or name
    shown = shown.removeprefix("docker.io/library/").removeprefix("docker.io/")
    return shown or name


def repository_and_tag(name: str) -> tuple[str, str]:
    """For `image ls`: ("localhost:5000/web", "1")."""
    base, _, digest = name.partition("@")
    match = re.fullmatch(r"(.+?)(?::([\w][\w.-]*))?", base)
    if match is None:
        return "<none>", "<none>"
    return match[1], match[2] or ("<none>" if digest else "latest")


def short_id(image_id: str) -> str:
    """12 digits of "sha256:..."."""
    return image_id.removeprefix("sha256:")[:12]


def base_name(name: str) -> str:
    """ "localhost:5000/team/web:1@sha256:..." -> "web"."""
    return repository_and_tag(name)[0].rpartition("/")[2]
