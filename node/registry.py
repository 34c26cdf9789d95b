"""Names of images, and what skopeo is told and says. Pure; `images.py` runs it."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import re
from dataclasses import dataclass

from node.interface import ImageFault

_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_DOMAIN = re.compile(r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?")
_TAG = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_IMAGE_ID = re.compile(r"(?:sha256:)?([0-9a-f]{12,64})")


@dataclass(frozen=True, slots=True)
class Reference:
    """A normalised name: docker.io/library/web:latest@sha256:..."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def repository(self) -> str:
        return f"{self.domain}/{self.path}"

    @property
    def tagged(self) -> str:
        """Repository and tag, as the store's names are written; the tag defaults to latest."""
        return f"{self.repository}:{self.tag or 'latest'}"

    @property
    def familiar(self) -> str:
        """As people write it: without docker.io and library/."""
        name = self.repository
        if self.domain == "docker.io":
            name = self.path.removeprefix("library/") if self.path.count("/") == 1 else self.path
        tag = f":{self.tag}" if self.tag else ""
        return name + tag + (f"@{self.digest}" if self.digest else "")


def parse_reference(name: str) -> Reference:
    """Docker's rules: the first part is a registry when it has a dot or a colon or is "localhost"; a lone name is
    one of docker.io/library; no tag and no digest means latest. Raises ImageFault(invalid)."""
    rest, at, digest = name.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise ImageFault(f"invalid image name {name!r}: the digest must be sha256: and 64 hex digits", "invalid")
    head, slash, tail = rest.partition("/")
    if slash and ("." in head or ":" in head or head == "localhost"):
        domain, path = head, tail
    else:
        domain, path = "docker.io", rest
    path, colon, tag = path.partition(":")
    if domain in ("docker.io", "index.docker.io"):
        domain = "docker.io"
        path = path if "/" in path else f"library/{path}"
    if not _DOMAIN.fullmatch(domain) or not _NAME.fullmatch(path) or (colon and not _TAG.fullmatch(tag)):
        raise ImageFault(
            f"invalid image name {name!r}: write [registry[:port]/]name[:tag][@digest], lower case", "invalid"
        )
    return Reference(domain, path, tag if tag or digest else "latest", digest)


def image_id_prefix(ref: str) -> str:
    """The hexadecimal prefix if `ref` may be an image ID, else ""."""
    match = _IMAGE_ID.fullmatch(ref)
    return match[1] if match else ""


def store_names(reference: Reference) -> tuple[str, ...]:
    """Names under which a store may hold it. podman and buildah put "localhost/" before a short name."""
    names = [reference.tagged]
    if reference.domain == "docker.io":
        short = reference.path.removeprefix("library/")
        names.append(f"localhost/{short}:{reference.tag or 'latest'}")
    return tuple(names)


def plain_http(domain: str, insecure: frozenset[str]) -> bool:
    """Registries that may be spoken to without TLS: those on this host, and those that the operator named."""
    host = domain.rpartition(":")[0] if re.search(r":[0-9]+$", domain) else domain
    if domain in insecure or host in insecure or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def auth_file(domain: str, registry_auth: str) -> str:
    """The text of a containers-auth.json(5) for `registry_auth`: base64 of JSON with username and password, or
    identitytoken. Raises ImageFault(invalid)."""
    try:
        padded = registry_auth + "=" * (-len(registry_auth) % 4)
        given = json.loads(base64.urlsafe_b64decode(padded.replace("+", "-").replace("/", "_")))
        entry: dict[str, str] = {}
        if token := given.get("identitytoken"):
            entry["identitytoken"] = str(token)
        user, password = str(given.get("username", "")), str(given.get("password", ""))
        entry["auth"] = base64.b64encode(f"{user}:{password}".encode()).decode()
    except (ValueError, binascii.Error, AttributeError):
        raise ImageFault(
            "invalid registry credentials: expected base64 of JSON with username and password; log in again", "invalid"
        ) from None
    return json.dumps({"auths": {domain: entry}})


_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("no_space", ("no space left on device", "disk quota exceeded")),
    ("invalid", ("no image found in manifest list", "unsupported manifest", "unsupported docker v2s1")),
    ("not_found", ("manifest unknown", "name unknown", "repository name not known", "not found", "status 404")),
    (
        "denied",
        ("unauthorized", "authentication required", "denied", "invalid username/password", "status 401", "status 403"),
    ),
    (
        "unreachable",
        (
            "no such host",
            "connection refused",
            "i/o timeout",
            "no route to host",
            "network is unreachable",
            "deadline exceeded",
            "tls handshake",
            "connection reset",
            "server misbehaving",
            "temporary failure in name resolution",
            "x509:",
            "tls:",
            "http response to https client",
            "too many requests",
            "toomanyrequests",
            "500 internal",
            "502 bad",
            "503 service",
            "504 gateway",
        ),
    ),
)
_EXPLAINED = {
    "no_space": "no space left on this node's image store; remove images (pyswarm image rm) or enlarge the disk",
    "not_found": "{domain} has no such image; check the name and the tag",
    "denied": "{domain} refuses access: it does not exist or needs a login (--with-registry-auth)",
    "unreachable": "cannot reach {domain}: {reason}",
    "invalid": "{reason}",
    "failed": "{reason}",
}


def classify(stderr: str) -> tuple[str, str]:
    """(kind, reason) of a failed skopeo run; the reason is its last line, without decoration."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    fatal = [line for line in lines if "level=fatal" in line] or lines[-1:] or ["skopeo gave no reason"]
    match = re.search(r'msg="((?:[^"\\]|\\.)*)"', fatal[-1])
    reason = match[1].replace('\\"', '"').replace("\\\\", "\\") if match else fatal[-1].strip()
    low = reason.lower()
    kind = next((kind for kind, signs in _KINDS if any(sign in low for sign in signs)), "failed")
    # "x: y: z: connection refused": the end says it; the beginning repeats the name.
    return kind, reason if len(reason) <= 300 else "..." + reason[-300:]


def pull_fault(reference: Reference, stderr: str) -> ImageFault:
    """One clear line for a failed pull."""
    kind, reason = classify(stderr)
    if kind == "unreachable":
        reason = reason.rpartition('": ')[2] or reason
    why = _EXPLAINED[kind].format(domain=reference.domain, reason=reason)
    return ImageFault(f"cannot pull {reference.familiar}: {why}", kind)
