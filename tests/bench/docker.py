"""Docker Swarm doing the same work, in a network namespace of its own with directories of its own."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType

from tests.labs import wait_for

NETNS = "pybench-docker"
ADDRESS = "192.168.199.2"
IMAGE = "pyswarm/web:1"
DOCKERD, DOCKER = "/usr/sbin/dockerd", "/usr/bin/docker"
START_TIMEOUT_S = 60


class DockerSwarm:
    def __init__(self, scratch: Path, oci_archive: Path) -> None:
        self._root = scratch / "docker"
        self._socket = scratch / "docker.sock"
        self._archive = oci_archive
        self._runs = 0

    @staticmethod
    def installed() -> bool:
        return Path(DOCKERD).exists() and Path(DOCKER).exists()

    def __enter__(self) -> DockerSwarm:
        subprocess.run(["ip", "netns", "del", NETNS], capture_output=True, check=False)
        for command in (
            f"netns add {NETNS}",
            f"-n {NETNS} link set lo up",
            f"-n {NETNS} link add eth0 type veth peer name eth0p",
            f"-n {NETNS} addr add {ADDRESS}/24 dev eth0",
            f"-n {NETNS} link set eth0 up",
            f"-n {NETNS} link set eth0p up",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        with open(self._root.with_suffix(".log"), "ab") as log:
            self._daemon = subprocess.Popen(
                [
                    *("nsenter", f"--net=/run/netns/{NETNS}", DOCKERD, "-H", f"unix://{self._socket}"),
                    *("--data-root", str(self._root / "data"), "--exec-root", str(self._root / "exec")),
                    *("-p", str(self._root.with_suffix(".pid"))),
                ],
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: self._try("info") == 0, START_TIMEOUT_S, "dockerd starts")
        archive = self._root.with_suffix(".tar")
        subprocess.run(
            ["skopeo", "copy", "-q", f"oci-archive:{self._archive}", f"docker-archive:{archive}:{IMAGE}"], check=True
        )
        self._docker("load", "-q", "-i", str(archive))
        self._docker("swarm", "init", "--advertise-addr", ADDRESS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._try("swarm", "leave", "--force")
        self._daemon.terminate()
        self._daemon.wait(30)
        subprocess.run(["ip", "netns", "del", NETNS], check=False)
        subprocess.run(
            ["sh", "-c", f"grep ' {self._root}' /proc/mounts | cut -d' ' -f2 | xargs -r umount -l"], check=False
        )
        shutil.rmtree(self._root, ignore_errors=True)

    def scale_once(self, before: int, after: int) -> float:
        """Seconds from `docker service scale` to that many running tasks."""
        self._runs += 1
        name, network = f"wpinst{self._runs}", f"wpnet{self._runs}"
        self._docker("network", "create", "-d", "overlay", network)
        self._docker(
            "service",
            "create",
            "-d",
            "--no-resolve-image",
            "--name",
            name,
            "--replicas",
            str(before),
            "--network",
            network,
            IMAGE,
        )
        wait_for(lambda: self._running(name) == before, 120, "docker: created")
        started_at = time.monotonic()
        self._docker("service", "scale", "-d", f"{name}={after}")
        wait_for(lambda: self._running(name) == after, 240, "docker: scaled")
        took_s = time.monotonic() - started_at
        self._docker("service", "rm", name)
        wait_for(lambda: not self._docker("ps", "-aq").split(), 240, "docker: removed")
        return took_s

    def _running(self, service: str) -> int:
        states = self._docker(
            "service", "ps", service, "--filter", "desired-state=running", "--format", "{{.CurrentState}}"
        )
        return sum(1 for line in states.splitlines() if line.startswith("Running"))

    def _try(self, *argv: str) -> int:
        return subprocess.run(
            [DOCKER, "-H", f"unix://{self._socket}", *argv], capture_output=True, check=False
        ).returncode

    def _docker(self, *argv: str) -> str:
        return subprocess.run(
            [DOCKER, "-H", f"unix://{self._socket}", *argv], capture_output=True, text=True, check=True
        ).stdout
