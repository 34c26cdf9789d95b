"""The user's credentials for an image's registry: from Docker's and containers' files."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from swarm.cli.images import DOCKER_HUB, registry_of
from swarm.errors import Invalid

HELPER_S = 10.0
"""A credential helper may ask a keychain, not a person."""
_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", "docker.io")


def auth_files(environ: Mapping[str, str]) -> list[Path]:
    """Where credentials may be, first match wins: as skopeo and then docker look for them. Pure."""
    home = Path(environ.get("HOME") or "/root")
    files = [Path(environ["REGISTRY_AUTH_FILE"])] if environ.get("REGISTRY_AUTH_FILE") else []
    if runtime_dir := environ.get("XDG_RUNTIME_DIR"):
        files.append(Path(runtime_dir) / "containers/auth.json")
    files.append(Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "containers/auth.json")
    files.append(Path(environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json")
    return files


def find_credentials(image: str, environ: Mapping[str, str]) -> str:
    """base64 of {"username","password"} for the image's registry; "" = none stored. Raises Invalid."""
    for path in auth_files(environ):
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise Invalid(f"cannot read registry credentials from {path}: {error}") from None
        if isinstance(content, dict) and (pair := _pair(content, image, path)):
            packed = json.dumps({"username": pair[0], "password": pair[1]})
            return base64.b64encode(packed.encode()).decode()
    return ""


def entry_keys(image: str) -> Iterator[str]:
    """Keys under which an auth file may hold the image's credentials, most specific first. Pure."""
    registry = registry_of(image)
    path = image.partition("@")[0]
    if path.partition("/")[0] == registry:
        parts = path.split("/")
        yield from ("/".join(parts[:count]) for count in range(len(parts) - 1, 1, -1))
    if registry == DOCKER_HUB:
        yield from _HUB_KEYS
    else:
        yield from (registry, f"https://{registry}", f"https://{registry}/v1/", f"https://{registry}/v2/")


def _pair(content: Mapping[str, Any], image: str, path: Path) -> tuple[str, str] | None:
    helpers = content.get("credHelpers") or {}
    for key in entry_keys(image):
        entry = (content.get("auths") or {}).get(key) or {}
        if packed := entry.get("auth"):
            return decode_auth(packed, path)
        if helper := helpers.get(key):
            return _ask_helper(helper, key)
        if entry and content.get("credsStore"):
            return _ask_helper(content["credsStore"], key)
    return None


def decode_auth(packed: str, path: Path) -> tuple[str, str]:
    """ "dXNlcjpwdw==" -> ("user", "pw"). Raises Invalid."""
    try:
        user, colon, password = base64.b64decode(packed, validate=True).decode().partition(":")
    except ValueError:
        colon = ""
    if not colon:
        raise Invalid(f"the credentials in {path} are damaged: log in to the registry again")
    return user, password.rstrip("\0")


def _ask_helper(helper: str, server: str) -> tuple[str, str]:
    command = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [command, "get"], input=server, capture_output=True, text=True, timeout=HELPER_S, check=True
        )
        answer = json.loads(done.stdout)
        return answer["Username"], answer["Secret"]
    except subprocess.CalledProcessError as error:
        why = (error.stdout or error.stderr).strip() or f"exit status {error.returncode}"
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        why = str(error)
    raise Invalid(f"{command} gave no credentials for {server}: {why}")
