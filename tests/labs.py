"""A lab for tests and benchmarks, and the words to work in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swarm.lab import hosts, lab
from swarm.lab.plan import Host, Plan
from tests.images import build_web_image

WEB_IMAGE = "pyswarm/web:1"
COMMAND_TIMEOUT_S = 120
LAB_PREFIX = "PYSWARM_TEST_LAB_PREFIX"
"""Environment variable that keeps the labs of tests that run at once apart."""


class CommandFailed(AssertionError):
    def __init__(self, argv: Sequence[str], done: subprocess.CompletedProcess[str]) -> None:
        super().__init__(f"{' '.join(argv)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")


class Lab:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @property
    def hosts(self) -> list[str]:
        return [host.name for host in self.plan.hosts]

    def host(self, name: str) -> Host:
        return lab.find_host(self.plan, name)

    def try_run(
        self, host: str, *argv: str, timeout_s: float = COMMAND_TIMEOUT_S, text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as if on that host."""
        where = self.host(host)
        environment = {**os.environ, "PYSWARM_HOST": f"unix://{where.socket}"}
        return subprocess.run(
            [*hosts.entering(where), *argv],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=environment,
            input=text,
        )

    def run(self, host: str, *argv: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        done = self.try_run(host, *argv, timeout_s=timeout_s)
        if done.returncode:
            raise CommandFailed(argv, done)
        return done.stdout

    def try_pyswarm(
        self, host: str, *argv: str, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        return self.try_run(host, sys.executable, "-m", "swarm.cli.main", *argv, timeout_s=timeout_s)

    def pyswarm(self, host: str, *argv: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        done = self.try_pyswarm(host, *argv, timeout_s=timeout_s)
        if done.returncode:
            raise CommandFailed(["pyswarm", *argv], done)
        return done.stdout

    def rows(self, host: str, *argv: str) -> list[dict[str, Any]]:
        """A listing as dictionaries."""
        return [json.loads(line) for line in self.pyswarm(host, *argv, "--format", "json").splitlines()]

    def spawn(self, host: str, *argv: str) -> subprocess.Popen[str]:
        where = self.host(host)
        environment = {**os.environ, "PYSWARM_HOST": f"unix://{where.socket}"}
        return subprocess.Popen(
            [*hosts.entering(where), sys.executable, "-m", "swarm.cli.main", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def leader(self, asked: str = "m1") -> str:
        for row in self.rows(asked, "node", "ls"):
            if row["ManagerStatus"] == "Leader":
                return str(row["Hostname"])
        raise AssertionError("no leader")

    def running(self, service: str, asked: str = "m1") -> list[dict[str, Any]]:
        """Tasks that run and are wanted."""
        return [
            row
            for row in self.rows(asked, "service", "ps", "--no-trunc", service, "--filter", "desired-state=running")
            if row["CurrentState"].startswith("Running")
        ]

    def get(self, host: str, port: int, timeout_s: float = 5.0) -> str:
        """The body that the published port of a host answers with, asked from the machine outside."""
        return http_get(self.host(host).address, port, timeout_s)


def http_get(address: str, port: int, timeout_s: float = 5.0) -> str:
    import http.client

    connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        body = response.read().decode().strip()
        if response.status != 200:
            raise OSError(f"status {response.status}")
        return body
    finally:
        connection.close()


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The condition's first true value; exceptions of a cluster in motion count as false until the deadline."""
    deadline = time.monotonic() + timeout_s
    last: object = None
    while True:
        try:
            last = condition()
            if last:
                return last
        except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s:g} s; last seen: {last}")
        time.sleep(0.05)


def keep_logs(cluster: Lab) -> Path:
    """Copy the logs of a lab that is about to go, for whoever looks into a failure."""
    kept = Path("/tmp") / f"pyswarm-logs-{cluster.plan.name}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for path in cluster.plan.state_dir.glob("*/*.log"):
        shutil.copy(path, kept / f"{path.parent.name}-{path.name}")
    return kept


def load_web_image(directory: Path) -> None:
    """The small web image in the machine's store, unless it is there."""
    archive = directory / "web.tar"
    build_web_image(archive)
    lab.load_image(archive)


@contextmanager
def lab_up(name: str, managers: int, workers: int, insecure_registries: Sequence[str] = ()) -> Iterator[Lab]:
    """A lab for the time of the block; one that an aborted run left behind is removed first. The environment variable
    PYSWARM_TEST_LAB_PREFIX keeps the labs of two checkouts that are tested at once apart."""
    name = os.environ.get(LAB_PREFIX, "") + name
    if name in lab.names():
        lab.down(name)
    lab.up(name, managers, workers, lambda line: None, insecure_registries=insecure_registries)
    try:
        yield Lab(lab.load(name))
    finally:
        lab.down(name)
