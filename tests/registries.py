"""A real registry with a password: Debian's docker-registry, spoken to over plain HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.containers import scratch_directory
from tests.waiting import wait_until

PASSWORD_HASH = "user:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a"
"""htpasswd -B of "secret"."""


def tool(*argv: str | Path) -> None:
    subprocess.run(argv, check=True, timeout=60)


def packed(password: str) -> str:
    """Credentials as a service's spec carries them."""
    return base64.b64encode(json.dumps({"username": "user", "password": password}).encode()).decode()


@dataclass(frozen=True)
class Registry:
    address: str
    """host:port"""
    directory: Path

    auth: str = packed("secret")
    wrong: str = packed("wrong")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def push(self, archive: Path, name: str) -> None:
        target = f"docker://{self.address}/{name}"
        login = ("--dest-creds", "user:secret", "--dest-tls-verify=false", "--preserve-digests")
        tool("skopeo", "copy", "-q", *login, f"oci-archive:{archive}", target)

    def push_list(self, name: str, digest: str, size: int) -> str:
        """A manifest list whose only member is `digest`; returns its own digest."""
        body = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.index.v1+json",
                "manifests": [
                    {
                        "mediaType": "application/vnd.oci.image.manifest.v1+json",
                        "digest": digest,
                        "size": size,
                        "platform": {"architecture": architecture, "os": "linux"},
                    }
                    for architecture in ("amd64", "arm64")
                ],
            }
        )
        url = f"http://{self.address}/v2/{name.replace(':', '/manifests/')}"
        kind = "Content-Type: application/vnd.oci.image.index.v1+json"
        tool("curl", "-sf", "-u", "user:secret", "-X", "PUT", "--data-binary", body, "-H", kind, url)
        return "sha256:" + hashlib.sha256(body.encode()).hexdigest()


def login_file(path: Path, registry: str, password: str = "secret") -> Path:
    """What `skopeo login` or `docker login` would have written."""
    entry = {"auth": base64.b64encode(f"user:{password}".encode()).decode()}
    path.write_text(json.dumps({"auths": {registry: entry}}))
    return path


@contextmanager
def registry_up(name: str, listen: str = "") -> Iterator[Registry]:
    """A registry that is called by the address `name`, and listens there or at `listen`."""
    with scratch_directory() as directory, closing(socket.socket()) as probe:
        probe.bind((listen or name, 0))
        port = probe.getsockname()[1]
        probe.close()
        (directory / "htpasswd").write_text(PASSWORD_HASH + "\n")
        (directory / "config.yml").write_text(
            f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {directory}/data}}}}\n"
            f"http: {{addr: '{listen or name}:{port}'}}\n"
            f"auth: {{htpasswd: {{realm: test, path: {directory}/htpasswd}}}}\n"
        )
        log = (directory / "log").open("wb")
        process = subprocess.Popen(
            ["docker-registry", "serve", str(directory / "config.yml")], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_until(lambda: _listens(name, port), what="the registry")
            yield Registry(f"{name}:{port}", directory)
        finally:
            process.kill()
            process.wait(10)
            log.close()


def _listens(host: str, port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex((host, port)) == 0
