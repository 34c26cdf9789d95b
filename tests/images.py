"""Real OCI images, built offline and reproducibly from the host's static busybox.

`build_web_image` is what most tests run: a web server that says who it is. `build_image` makes any other.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BUSYBOX = Path("/bin/busybox")
WEB_IMAGE = "pyswarm/web:1"
TOOL_IMAGE = "pyswarm/tool:1"

WEB_SCRIPT = """#!/bin/sh
# PID 1: serve one page that names this task and its node; on SIGTERM stop accepting, let the requests that are
# being answered finish, exit 0. The page is a file in memory, so that hundreds of requests a second are cheap.
server=
stop() {
    [ -n "$server" ] && kill "$server" 2>/dev/null
    tries=0
    # Each connection is served by a child of httpd, which outlives its parent: wait for those, 2 s at most.
    while pidof httpd >/dev/null && [ $tries -lt 100 ]; do usleep 20000; tries=$((tries + 1)); done
    exit 0
}
trap stop TERM INT
mkdir -p /dev/shm/www
echo "$(hostname) on ${NODE:-nowhere}" > /dev/shm/www/index.html
echo "$(hostname) serves on port ${PORT:-80}"
httpd -f -p "${PORT:-80}" -h /dev/shm/www &
server=$!
wait "$server"
"""

FETCH_SCRIPT = """#!/bin/sh
# fetch http://name[:port]/path: wget by name. The static wget cannot resolve names itself (it would need the
# host's glibc plug-ins), so nslookup does; its own -T option crashes, so timeout(1) it is.
url=${1#http://}
hostport=${url%%/*}
path=/${url#*/}
[ "$url" = "$hostport" ] && path=/
name=${hostport%%:*}
port=80
[ "$name" = "$hostport" ] || port=${hostport##*:}
case $name in
    *[!0-9.]*)
        address=$(nslookup -type=a "$name" | awk '/^Name:/ {found=1} found && /^Address/ {print $NF; exit}')
        ;;
    *) address=$name ;;
esac
[ -n "$address" ] || { echo "fetch: cannot resolve $name" >&2; exit 1; }
exec timeout 10 wget -q -O - --header "Host: $hostport" "http://$address:$port$path"
"""

_ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nwww:x:33:33:www:/var/www:/bin/sh\n",
    "etc/group": "root:x:0:\nwww:x:33:\nextra:x:44:www\n",
}


def _entry(name: str, kind: bytes, mode: int, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)  # owner 0:0 and time 0 by default: the same bytes every time
    info.type, info.mode, info.size, info.linkname = kind, mode, size, link
    return info


def layer(files: Mapping[str, tuple[bytes, int]], links: Mapping[str, str], directories: Sequence[str] = ()) -> bytes:
    """An uncompressed layer: path -> (content, mode), path -> link target, and empty directories."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        parents = {str(parent) for path in (*files, *links) for parent in Path(path).parents if str(parent) != "."}
        tar.addfile(_entry(".", tarfile.DIRTYPE, 0o755))
        for directory in sorted(parents | set(directories)):
            mode = 0o1777 if directory == "tmp" else 0o755
            tar.addfile(_entry(directory, tarfile.DIRTYPE, mode))
        for path, (content, mode) in sorted(files.items()):
            tar.addfile(_entry(path, tarfile.REGTYPE, mode, len(content)), io.BytesIO(content))
        for path, target in sorted(links.items()):
            tar.addfile(_entry(path, tarfile.SYMTYPE, 0o777, link=target))
    return stream.getvalue()


def busybox_layer(extra: Mapping[str, str] | None = None) -> bytes:
    """A small userland: busybox under all its names, accounts, and executable scripts in `extra`."""
    applets = subprocess.run([BUSYBOX, "--list"], capture_output=True, check=True, timeout=10).stdout.decode().split()
    files = {"bin/busybox": (BUSYBOX.read_bytes(), 0o755), "bin/fetch": (FETCH_SCRIPT.encode(), 0o755)}
    files |= {path: (text.encode(), 0o644) for path, text in _ACCOUNTS.items()}
    files |= {path: (text.encode(), 0o755) for path, text in (extra or {}).items()}
    links = {f"bin/{name}": "busybox" for name in applets if name != "busybox"}
    return layer(files, links, ("dev", "etc", "proc", "root", "run", "sys", "tmp", "var/www"))


def _blob(data: bytes) -> tuple[str, bytes]:
    return "sha256:" + hashlib.sha256(data).hexdigest(), data


def build_image(path: Path, name: str, layers: Sequence[bytes], config: Mapping[str, Any]) -> str:
    """Write an OCI archive; returns the digest of its manifest. `config`: Entrypoint, Cmd, Env, User, ..."""
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    blobs = [_blob(data) for data in layers]
    image_config = {
        "created": "1970-01-01T00:00:00Z",
        "architecture": architecture,
        "os": "linux",
        "config": dict(config),
        "rootfs": {"type": "layers", "diff_ids": [digest for digest, _ in blobs]},
    }
    config_digest, config_data = _blob(json.dumps(image_config, sort_keys=True).encode())
    prefix = "application/vnd.oci.image."
    manifest = {
        "schemaVersion": 2,
        "mediaType": prefix + "manifest.v1+json",
        "config": {"mediaType": prefix + "config.v1+json", "digest": config_digest, "size": len(config_data)},
        "layers": [{"mediaType": prefix + "layer.v1.tar", "digest": d, "size": len(data)} for d, data in blobs],
    }
    manifest_digest, manifest_data = _blob(json.dumps(manifest, sort_keys=True).encode())
    index = {
        "schemaVersion": 2,
        "manifests": [
            {
                "mediaType": prefix + "manifest.v1+json",
                "digest": manifest_digest,
                "size": len(manifest_data),
                "annotations": {"org.opencontainers.image.ref.name": name} if name else {},
            }
        ],
    }
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode()}
    for digest, data in (*blobs, (config_digest, config_data), (manifest_digest, manifest_data)):
        files["blobs/sha256/" + digest.removeprefix("sha256:")] = data
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for file, data in files.items():
            tar.addfile(_entry(file, tarfile.REGTYPE, 0o644, len(data)), io.BytesIO(data))
    return manifest_digest


def build_web_image(path: Path, name: str = WEB_IMAGE) -> str:
    """A web server on port 80 (env PORT) that answers GET / with "<hostname> on <env NODE>"."""
    config = {"Cmd": ["/bin/web"], "ExposedPorts": {"80/tcp": {}}}
    return build_image(path, name, [busybox_layer({"bin/web": WEB_SCRIPT})], config)


def build_tool_image(path: Path, name: str = TOOL_IMAGE, **config: Any) -> str:
    """The same userland with another configuration, /bin/sh by default; two layers, the upper one hides /gone."""
    base = layer({"gone": (b"x", 0o644), "data/kept": (b"from the image\n", 0o640)}, {})
    upper = layer({".wh.gone": (b"", 0o644)}, {})
    return build_image(path, name, [busybox_layer(), base, upper], {"Cmd": ["/bin/sh"], **config})
