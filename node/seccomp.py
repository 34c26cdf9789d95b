"""Docker's seccomp profile, resolved for one container, and the cache of its compiled form.

Compiling the filter is half of the CPU that a container's start takes. crun leaves the compiled program
beside its state; handing it back by an annotation skips the compilation. The annotation is experimental,
so every container's status is checked in /proc, and the first that came up unfiltered ends the practice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ANNOTATION = "run.oci.seccomp_bpf_data"
PROGRAM_BYTES_MAX = 8 * 4096
"""BPF_MAXINSNS instructions of 8 bytes: what the kernel takes."""
_GOARCH = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}
_SCMP_ARCH = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64", "s390x": "SCMP_ARCH_S390X"}


def goarch(machine: str) -> str:
    """`uname -m` in Go's (and so the image formats') words."""
    return _GOARCH.get(machine, machine)


def kernel_version(release: str) -> tuple[int, int]:
    """ "6.1.0-18-amd64" -> (6, 1)."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _applies(rule: Mapping[str, Any], caps: frozenset[str], arch: str, kernel: tuple[int, int]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if includes.get("arches") and arch not in includes["arches"]:
        return False
    if arch in (excludes.get("arches") or ()):
        return False
    if not caps.issuperset(includes.get("caps") or ()):
        return False
    if caps.intersection(excludes.get("caps") or ()):
        return False
    if includes.get("minKernel") and kernel < kernel_version(includes["minKernel"]):
        return False
    return not (excludes.get("minKernel") and kernel >= kernel_version(excludes["minKernel"]))


def resolve(profile: Mapping[str, Any], caps: Iterable[str], machine: str, kernel: tuple[int, int]) -> dict[str, Any]:
    """A profile in Docker's format -> the OCI field linux.seccomp for these capabilities and this kernel."""
    held, arch = frozenset(caps), goarch(machine)
    native = _SCMP_ARCH.get(machine, "SCMP_ARCH_" + machine.upper())
    mapped = next((entry for entry in profile.get("archMap") or () if entry["architecture"] == native), None)
    syscalls: list[dict[str, Any]] = []
    for rule in profile["syscalls"]:
        if not _applies(rule, held, arch, kernel):
            continue
        entry: dict[str, Any] = {"names": rule["names"], "action": rule["action"]}
        if rule.get("args"):
            entry["args"] = [
                {key: arg[key] for key in ("index", "value", "valueTwo", "op") if key in arg} for arg in rule["args"]
            ]
        if rule.get("errnoRet") is not None:
            entry["errnoRet"] = rule["errnoRet"]
        syscalls.append(entry)
    resolved: dict[str, Any] = {
        "defaultAction": profile["defaultAction"],
        "architectures": [native, *(mapped.get("subArchitectures") or () if mapped else ())],
        "syscalls": syscalls,
    }
    if profile.get("defaultErrnoRet") is not None:
        resolved["defaultErrnoRet"] = profile["defaultErrnoRet"]
    return resolved


class SeccompFilters:
    """Resolved profiles by capability set, and their compiled programs in `cache_dir`.
    `runtime_version` is part of the key: another libseccomp may compile differently."""

    def __init__(self, cache_dir: Path, runtime_version: str, enabled: bool) -> None:
        self._dir = cache_dir
        self._version = runtime_version
        self._distrusted = cache_dir / "distrusted"
        self._enabled = enabled and not self._distrusted.exists()
        self._profile: dict[str, Any] = json.loads(Path(__file__).with_name("docker-seccomp-default.json").read_text())
        self._resolved: dict[tuple[str, ...], tuple[str, dict[str, Any]]] = {}
        self._programs: dict[str, str] = {}

    def section(self, caps: Iterable[str]) -> tuple[str, dict[str, Any]]:
        """(key, linux.seccomp) for a container with these capabilities."""
        names = tuple(sorted(caps))
        if names not in self._resolved:
            section = resolve(self._profile, names, platform.machine(), kernel_version(platform.release()))
            text = json.dumps([section, self._version, platform.release(), platform.machine()], sort_keys=True)
            self._resolved[names] = (hashlib.sha256(text.encode()).hexdigest()[:32], section)
        return self._resolved[names]

    def annotations(self, key: str) -> dict[str, str]:
        """The annotation with the compiled program, when it is known and trusted."""
        if not self._enabled:
            return {}
        if key not in self._programs:
            try:
                self._programs[key] = base64.b64encode((self._dir / key).read_bytes()).decode()
            except OSError:
                return {}
        return {ANNOTATION: self._programs[key]}

    def learn(self, key: str, program: Path) -> None:
        """Keep what the runtime compiled for a container that had no annotation."""
        if not self._enabled or key in self._programs:
            return
        try:
            data = program.read_bytes()
        except OSError:
            return
        # The kernel takes whole 8-byte instructions only; anything else was caught half written.
        if not data or len(data) % 8 or len(data) > PROGRAM_BYTES_MAX:
            return
        self._dir.mkdir(parents=True, exist_ok=True)
        temporary = self._dir / f".{key}.{os.getpid()}"
        temporary.write_bytes(data)
        temporary.replace(self._dir / key)

    def distrust(self) -> None:
        """A container came up without a filter: never use compiled programs on this host again."""
        self._enabled = False
        self._dir.mkdir(parents=True, exist_ok=True)
        self._distrusted.touch()


def filtered(pid: int) -> bool:
    """Whether the process runs under a seccomp filter (mode 2). Raises OSError when it is gone."""
    return "\nSeccomp:\t2\n" in Path(f"/proc/{pid}/status").read_text()
