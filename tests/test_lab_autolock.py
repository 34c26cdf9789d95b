"""Autolock on three real managers: what is on disk, who is asked for the key, and what a locked host still does."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.consensus.disk import Directory
from swarm.hostfiles import HostPaths
from swarm.lab import hosts, lab
from swarm.security import files
from swarm.security.raft_key import KEY_FILE, KeyFile, read_key_file
from swarm.security.unlock_key import parse
from tests.labs import Lab, keep_logs, lab_up, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

TOLD = (
    "Error: Swarm is encrypted and needs to be unlocked before it can be used. "
    'Please use "pyswarm swarm unlock" to unlock it.\n'
)


@pytest.fixture(scope="module")
def cluster(web_image: str, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Three managers that were locked from the beginning, and a task on each."""
    failed_before = request.session.testsfailed
    with lab_up("lock", 1, 2) as made:
        for name in ("w1", "w2", "m1"):
            made.pyswarm(name, "swarm", "leave", "--force")
        first = made.host("m1").address
        # On a busy machine an agent needs longer to start again than a node at defaults may be silent.
        patient = ("--dispatcher-heartbeat", "4s")
        assert "SWMKEY-1-" in made.pyswarm("m1", "swarm", "init", "--autolock", "--advertise-addr", first, *patient)
        token = made.pyswarm("m1", "swarm", "join-token", "-q", "manager").strip()
        for name in ("w1", "w2"):
            made.pyswarm(name, "swarm", "join", "--token", token, f"{first}:2377")
        made.pyswarm("m1", "service", "create", "--quiet", "--name", "web", "--mode", "global", web_image)
        yield made
        if request.session.testsfailed > failed_before:
            print(f"logs of the hosts: {keep_logs(made)}")


NAMES = ("m1", "w1", "w2")
"""All three are managers."""


def key_file(cluster: Lab, name: str) -> KeyFile:
    host = cluster.host(name)
    return read_key_file(Directory(HostPaths(host.state_dir, host.run_dir).raft))


def wrapped(cluster: Lab) -> set[str]:
    return {name for name in NAMES if key_file(cluster, name).is_wrapped}


def restart(cluster: Lab, name: str) -> None:
    """kill -9 of the agent and the manager; then the agent is started again."""
    hosts.kill(hosts.daemon_pids(cluster.host(name)), signal.SIGKILL)
    lab.start(cluster.plan, cluster.host(name))


def manager_pids(cluster: Lab, name: str) -> list[int]:
    words = ((pid, Path(f"/proc/{pid}/cmdline").read_bytes()) for pid in hosts.daemon_pids(cluster.host(name)))
    return [pid for pid, line in words if b"swarm.manager" in line]


def unlock(cluster: Lab, name: str, key: str) -> subprocess.CompletedProcess[str]:
    return cluster.try_run(name, sys.executable, "-m", "swarm.cli.main", "swarm", "unlock", text=f"{key}\n")


def status(cluster: Lab, name: str) -> str:
    return next(str(row["Status"]) for row in cluster.rows("m1", "node", "ls") if row["Hostname"] == name)


def tasks(cluster: Lab, name: str) -> set[int]:
    """Processes of containers on this host."""
    cgroups = ((pid, Path(f"/proc/{pid}/cgroup")) for pid in hosts.host_pids(cluster.host(name)))
    return {pid for pid, path in cgroups if path.exists() and f"{cluster.host(name).cgroup}/" in path.read_text()}


def test_every_manager_wraps_its_key_and_nobody_has_it_in_clear(cluster: Lab) -> None:
    shown = cluster.pyswarm("m1", "swarm", "unlock-key", "-q").strip()
    secrets = [parse(shown), shown.encode()]
    wait_for(lambda: wrapped(cluster) == set(NAMES), 10, "wrapped")
    for name in NAMES:
        opened = key_file(cluster, name).opened([parse(shown)])
        assert opened is not None
        secrets.append(opened)
        for pid in hosts.daemon_pids(cluster.host(name)):
            for what in ("cmdline", "environ"):
                assert shown.encode() not in Path(f"/proc/{pid}/{what}").read_bytes()
    for name in NAMES:
        for path in cluster.host(name).state_dir.rglob("*"):
            if path.is_file() and not path.is_symlink() and "storage" not in path.parts:
                data = path.read_bytes()
                assert not [secret for secret in secrets if secret in data], path
    for name in NAMES:
        path = cluster.host(name).state_dir / "certificates"
        wait_for(lambda: files.is_sealed(path), 10, "the private key is sealed")  # noqa: B023
    assert "SWMKEY" not in cluster.pyswarm("m1", "info", "--format", "json")


def test_an_agent_that_crashed_is_told_by_its_manager(cluster: Lab, web_image: str) -> None:
    (manager,) = manager_pids(cluster, "w1")
    before = {row["ID"] for row in cluster.running("web")}
    hosts.kill(list(set(hosts.daemon_pids(cluster.host("w1"))) - {manager}), signal.SIGKILL)
    lab.start(cluster.plan, cluster.host("w1"))
    image = ("--constraint", "node.hostname==w1", web_image)
    cluster.pyswarm("m1", "service", "create", "--quiet", "--name", "here", *image)
    assert [row["Node"] for row in cluster.running("here")] == ["w1"], "the agent has a session"
    cluster.pyswarm("m1", "service", "rm", "here")
    assert manager_pids(cluster, "w1") == [manager]
    assert {row["ID"] for row in cluster.running("web")} == before, "no task was replaced"


def test_a_manager_that_crashed_is_started_again_without_a_question(cluster: Lab) -> None:
    (before,) = manager_pids(cluster, "w1")
    hosts.kill([before], signal.SIGKILL)
    wait_for(lambda: manager_pids(cluster, "w1") not in ([], [before]), 15, "another manager process")
    assert len(cluster.rows("w1", "node", "ls")) == 3


def test_a_restarted_host_is_locked_until_it_gets_the_right_key_and_its_tasks_go_on(cluster: Lab) -> None:
    old = cluster.pyswarm("m1", "swarm", "unlock-key", "-q").strip()
    running = wait_for(lambda: tasks(cluster, "w2"), 20, "the task runs")
    restart(cluster, "w2")
    for words in (("node", "ls"), ("service", "ls"), ("swarm", "unlock-key")):
        done = cluster.try_pyswarm("w2", *words)
        assert (done.returncode, done.stderr) == (1, TOLD)
    assert "Swarm: locked\n" in cluster.pyswarm("w2", "info")
    assert not manager_pids(cluster, "w2")
    wait_for(lambda: status(cluster, "w2") == "Down", 15, "the others do not hear of a locked host")
    assert running <= tasks(cluster, "w2"), "its containers go on"
    refused = cluster.try_pyswarm("w2", "swarm", "leave")
    assert "--force" in refused.stderr

    rotated = cluster.pyswarm("m1", "swarm", "unlock-key", "--rotate")
    assert rotated.startswith("Successfully rotated manager unlock key.\n")
    new = cluster.pyswarm("m1", "swarm", "unlock-key", "-q").strip()
    assert new != old
    assert new in rotated
    file = key_file(cluster, "w2")
    wrong = unlock(cluster, "w2", new)  # w2 has not heard of it
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("Error: swarm could not be unlocked: invalid key provided")
    assert key_file(cluster, "w2") == file
    assert "Swarm: locked\n" in cluster.pyswarm("w2", "info")

    done = unlock(cluster, "w2", old)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    wait_for(lambda: key_file(cluster, "w2").opened([parse(new)]) is not None, 15, "caught up and wrapped anew")
    assert key_file(cluster, "w2").opened([parse(old)]) is None
    wait_for(lambda: len(cluster.rows("w2", "node", "ls")) == 3, 15, "w2 answers")
    wait_for(lambda: status(cluster, "w2") == "Ready" and len(cluster.running("web")) == 3, 20, "back at work")
    (pid,) = manager_pids(cluster, "w2")
    hosts.kill([pid], signal.SIGKILL)
    wait_for(lambda: manager_pids(cluster, "w2") not in ([], [pid]), 15, "the agent knows the new key by now")


def test_all_managers_locked_at_once_are_unlocked_one_by_one(cluster: Lab) -> None:
    key = cluster.pyswarm("m1", "swarm", "unlock-key", "-q").strip()
    hosts.kill([pid for name in NAMES for pid in hosts.daemon_pids(cluster.host(name))], signal.SIGKILL)
    for name in NAMES:
        lab.start(cluster.plan, cluster.host(name))
    for name in NAMES:
        assert "Swarm: locked\n" in cluster.pyswarm(name, "info")
        assert unlock(cluster, name, key).returncode == 0
    assert [row["Name"] for row in cluster.rows("w1", "service", "ls")] == ["web"]


def test_a_demoted_manager_is_not_locked_and_a_promoted_one_is(cluster: Lab) -> None:
    certificates = cluster.host("w1").state_dir / "certificates"
    cluster.pyswarm("m1", "node", "demote", "w1")
    wait_for(lambda: not manager_pids(cluster, "w1") and not files.is_sealed(certificates), 20, "a worker")
    restart(cluster, "w1")
    assert "Swarm: active\n" in cluster.pyswarm("w1", "info")
    wait_for(lambda: status(cluster, "w1") == "Ready", 15, "w1 is a worker")
    cluster.pyswarm("m1", "node", "promote", "w1")
    wait_for(lambda: manager_pids(cluster, "w1") and files.is_sealed(certificates), 20, "locked again")
    wait_for(lambda: len(cluster.rows("w1", "node", "ls")) == 3, 15, "w1 answers")


def test_autolock_is_turned_off_and_on_and_a_locked_host_can_leave(cluster: Lab) -> None:
    assert cluster.pyswarm("w1", "swarm", "update", "--autolock=false") == "Swarm updated.\n"
    wait_for(lambda: not wrapped(cluster), 15, "in clear")
    w2 = cluster.host("w2").state_dir / "certificates"
    wait_for(lambda: not files.is_sealed(w2), 10, "the private key is in clear")
    restart(cluster, "w2")
    wait_for(lambda: len(cluster.rows("w2", "node", "ls")) == 3, 20, "not locked")
    assert "SWMKEY-1-" in cluster.pyswarm("w1", "swarm", "update", "--autolock=true")
    wait_for(lambda: wrapped(cluster) == set(NAMES), 15, "wrapped")
    restart(cluster, "w2")
    assert cluster.try_pyswarm("w2", "node", "ls").stderr == TOLD
    cluster.pyswarm("w2", "swarm", "leave", "--force")
    assert "Swarm: inactive\n" in cluster.pyswarm("w2", "info")
    assert not (cluster.host("w2").state_dir / "raft" / KEY_FILE).exists()
