"""Images on a real lab: a private registry, credentials, digests, plain HTTP, a full disk; issue section 1."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from swarm.lab import hosts
from tests.images import WEB_SCRIPT, build_image, busybox_layer
from tests.labs import Lab, lab_up, wait_for
from tests.registries import Registry, login_file, registry_up

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

ADDRESS = "203.0.113.7"
"""Of TEST-NET-3 (RFC 5737): an address of this machine that every host of the lab reaches by its default route."""


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    own = f"{ADDRESS}/32"
    subprocess.run(["ip", "addr", "replace", own, "dev", "lo"], check=True, timeout=10)
    try:
        # On every address, so that the same registry also has names that no daemon was told to trust.
        with registry_up(ADDRESS, "0.0.0.0") as made:
            yield made
    finally:
        subprocess.run(["ip", "addr", "del", own, "dev", "lo"], check=True, timeout=10)


@pytest.fixture(scope="module")
def cluster(registry: Registry) -> Iterator[Lab]:
    with lab_up("more2", 1, 1, [registry.address]) as made:
        yield made


@pytest.fixture
def logged_in(registry: Registry, tmp_path: Path) -> Path:
    return login_file(tmp_path / "auth.json", registry.address)


def build(path: Path, mark: str, name: str = "") -> str:
    """A web image that answers "... on <mark>"; no other image has its digest, so nobody has it already."""
    return build_image(
        path, name, [busybox_layer({"bin/web": WEB_SCRIPT})], {"Cmd": ["/bin/web"], "Env": [f"NODE={mark}"]}
    )


def push(registry: Registry, directory: Path, name: str, mark: str) -> str:
    """Returns the digest."""
    digest = build(directory / "pushed.tar", mark)
    registry.push(directory / "pushed.tar", name)
    return digest


def with_login(cluster: Lab, login: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    words = ("env", f"REGISTRY_AUTH_FILE={login}", sys.executable, "-m", "swarm.cli.main", *argv)
    return cluster.try_run("m1", *words)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    return last


def rejection(cluster: Lab, service: str) -> str:
    """Why a task of the service was rejected, as soon as one was."""

    def reasons() -> str:
        rows = cluster.rows("m1", "service", "ps", "--no-trunc", service)
        return "".join(row["Error"] for row in rows if row["CurrentState"].startswith("Rejected"))

    return str(wait_for(reasons, 30, "rejected"))


def names(cluster: Lab, host: str) -> set[str]:
    return {f"{row['Repository']}:{row['Tag']}" for row in cluster.rows(host, "image", "ls")}


def test_pull_list_and_remove(cluster: Lab, registry: Registry, logged_in: Path, tmp_path: Path) -> None:
    digest = push(registry, tmp_path, "team/pulled:1", "pulled")
    name = f"{registry.address}/team/pulled:1"
    assert "login" in refused(cluster.try_pyswarm("m1", "image", "pull", name))
    done = with_login(cluster, logged_in, "image", "pull", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"Digest: {digest}", name]

    (row,) = [
        row for row in cluster.rows("m1", "image", "ls") if row["Repository"] == f"{registry.address}/team/pulled"
    ]
    assert (row["Tag"], row["Digest"], row["ReadOnly"]) == ("1", digest, "false")
    table = cluster.pyswarm("m1", "image", "ls").splitlines()
    assert re.split(r"\s{2,}", table[0].strip()) == ["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"]
    assert any(line.split()[:3] == [f"{registry.address}/team/pulled", "1", row["ID"]] for line in table)
    assert row["ID"] in cluster.pyswarm("m1", "image", "ls", "-q").split()
    assert name not in names(cluster, "w1"), "each host pulls into its own store"

    removed = cluster.pyswarm("m1", "image", "rm", name)
    assert f"Untagged: {name}" in removed
    assert "Deleted: " in removed
    assert row["ID"] not in cluster.pyswarm("m1", "image", "ls", "-q").split()
    assert "no such image" in refused(cluster.try_pyswarm("m1", "image", "rm", name))


def test_load_an_archive_and_run_it_on_this_host(cluster: Lab, tmp_path: Path) -> None:
    build(tmp_path / "a.tar", "loaded", "me/loaded:1")
    assert "Loaded image: me/loaded:1" in cluster.pyswarm("m1", "image", "load", "-i", str(tmp_path / "a.tar"))
    assert "me/loaded:1" in names(cluster, "m1")
    command = ["--name", "loaded", "--constraint", "node.hostname==m1", "--publish", "8001:80", "me/loaded:1"]
    cluster.pyswarm("m1", "service", "create", *command)
    assert cluster.get("w1", 8001).endswith(" on loaded")
    assert "used by tasks" in refused(cluster.try_pyswarm("m1", "image", "rm", "me/loaded:1"))
    cluster.pyswarm("m1", "service", "rm", "loaded")
    wait_for(lambda: cluster.try_pyswarm("m1", "image", "rm", "me/loaded:1").returncode == 0, 30, "free to be removed")
    (tmp_path / "junk").write_bytes(b"junk")
    done = cluster.try_pyswarm("m1", "image", "load", "-i", str(tmp_path / "junk"))
    assert f"cannot load {tmp_path}/junk: it is not an image archive" in refused(done)
    assert len(done.stderr.splitlines()) == 1
    assert "absent.tar" in refused(cluster.try_pyswarm("m1", "image", "load", "-i", "/no/absent.tar"))


def test_a_private_image_runs_everywhere_by_the_digest_it_was_created_with(
    cluster: Lab, registry: Registry, logged_in: Path, tmp_path: Path
) -> None:
    digest = push(registry, tmp_path, "team/web:1", "first")
    name = f"{registry.address}/team/web:1"
    options = ["--name", "web", "--publish", "8000:80", "--constraint", "node.role==worker", "--with-registry-auth"]
    done = with_login(cluster, logged_in, "service", "create", *options, name)
    assert done.returncode == 0, done.stderr
    assert push(registry, tmp_path, "team/web:1", "second") != digest, "the tag moves"
    cluster.pyswarm("m1", "service", "update", "-d", "--constraint-rm", "node.role==worker", "--replicas", "2", "web")
    running = wait_for(
        lambda: len({row["Node"] for row in cluster.running("web")}) == 2 and cluster.running("web"), 30, "on both"
    )
    assert {row["Image"] for row in running} == {f"{name}@{digest}"}
    assert {row["Image"] for row in cluster.rows("m1", "service", "ps", "web")} == {name}
    assert {cluster.get("m1", 8000).rpartition(" on ")[2] for _ in range(8)} == {"first"}
    assert {
        row["Digest"] for row in cluster.rows("w1", "image", "ls", "--filter", f"reference={registry.address}/*")
    } == {digest}
    spec = json.loads(cluster.pyswarm("m1", "service", "inspect", "web"))
    assert "secret" not in json.dumps(spec)
    assert "c2VjcmV0" not in json.dumps(spec), "credentials are not shown"
    cluster.pyswarm("m1", "service", "rm", "web")


def test_without_credentials_nothing_is_created_or_the_task_is_rejected(
    cluster: Lab, registry: Registry, logged_in: Path, tmp_path: Path
) -> None:
    push(registry, tmp_path, "team/closed:1", "closed")
    name = f"{registry.address}/team/closed:1"
    assert "--with-registry-auth" in refused(with_login(cluster, logged_in, "service", "create", "--name", "no", name))
    wrong = login_file(tmp_path / "wrong.json", registry.address, "guessed")
    command = ["service", "create", "--name", "no", "--with-registry-auth", name]
    assert "refuses access" in refused(with_login(cluster, wrong, *command))
    assert "no" not in {row["Name"] for row in cluster.rows("m1", "service", "ls")}
    command = ["service", "create", "--detach", "--no-resolve-image", "--name", "closed", name]
    cluster.pyswarm("m1", *command)
    assert f"{registry.address} refuses access" in rejection(cluster, "closed")
    # The cure: credentials given later reach the nodes with the next tasks.
    done = with_login(cluster, logged_in, "service", "update", "--with-registry-auth", "--image", name, "closed")
    assert done.returncode == 0, done.stderr
    assert len(cluster.running("closed")) == 1
    cluster.pyswarm("m1", "service", "rm", "closed")


def test_an_image_that_the_registry_does_not_have(cluster: Lab, registry: Registry, logged_in: Path) -> None:
    before = cluster.pyswarm("m1", "service", "ls", "--format", "json")
    for name in (f"{registry.address}/team/nosuch:1", f"{registry.address}/nosuch@sha256:{'0' * 64}"):
        done = with_login(cluster, logged_in, "service", "create", "--with-registry-auth", name)
        assert "no such image" in refused(done)
        assert len(done.stderr.splitlines()) == 1
    assert cluster.pyswarm("m1", "service", "ls", "--format", "json") == before


def test_plain_http_is_for_configured_registries_only(cluster: Lab, registry: Registry, tmp_path: Path) -> None:
    push(registry, tmp_path, "team/plain:1", "plain")
    other = f"{cluster.plan.gateway}:{registry.port}"
    login = login_file(tmp_path / "other.json", other)
    reason = refused(with_login(cluster, login, "image", "pull", f"{other}/team/plain:1"))
    assert other in reason
    assert "HTTP response to HTTPS client" in reason
    command = ["service", "create", "--with-registry-auth", f"{other}/team/plain:1"]
    assert "--no-resolve-image" in refused(with_login(cluster, login, *command))


@contextmanager
def small_disk(cluster: Lab, host: str, size: str) -> Iterator[None]:
    """The host's image store on a disk of this size, as its daemon sees it."""
    (daemon, *_) = hosts.daemon_pids(cluster.host(host))
    store = cluster.host(host).state_dir / "storage"
    entering = ["nsenter", "-t", str(daemon), "-m"]
    subprocess.run(
        [*entering, "mount", "-t", "tmpfs", "-o", f"size={size}", "pyswarm-more2", str(store)], check=True, timeout=10
    )
    try:
        yield
    finally:
        subprocess.run([*entering, "umount", "-l", str(store)], check=True, timeout=10)


def test_a_full_disk_rejects_the_task_with_the_reason(
    cluster: Lab, registry: Registry, logged_in: Path, tmp_path: Path
) -> None:
    push(registry, tmp_path, "team/big:1", "big")
    options = ["--name", "big", "--constraint", "node.hostname==w1", "--with-registry-auth", "--restart-delay", "200ms"]
    with small_disk(cluster, "w1", "1m"):
        name = f"{registry.address}/team/big:1"
        done = with_login(cluster, logged_in, "service", "create", "--detach", *options, name)
        assert done.returncode == 0, done.stderr
        assert "no space left on this node" in rejection(cluster, "big")
    wait_for(lambda: len(cluster.running("big")) == 1, 30, "runs once there is space")
    cluster.pyswarm("m1", "service", "rm", "big")
