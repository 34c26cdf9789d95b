"""What a host does for its tasks, and what becomes of hosts: issue section 1 on a real lab of three.

The first half is about single tasks (mounts, limits, isolation, endings, logs), the second about nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from node.priority import NICENESS
from overlay import xfrm
from proto.control_pb2 import ClusterRequest, RotateTokenRequest
from proto.control_pb2_grpc import ControlStub
from proto.dispatch_pb2 import AgentMessage
from proto.dispatch_pb2_grpc import DispatcherStub
from proto.objects_pb2 import WORKER
from swarm.hostfiles import HostPaths
from swarm.lab import hosts
from swarm.security import files
from swarm.security.identity import MANAGER_NAME
from tests.labs import Lab, keep_logs, lab_up, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

MTLS_PORT = 2378
CALL_S = 10.0
NOW = ("--restart-delay", "0s", "--stop-signal", "KILL")
"""A shell as process 1 ignores SIGTERM: nothing is gained by waiting for it."""
DEFAULT_CAPABILITIES = 0xA80425FB
"""Docker's fourteen."""
NET_ADMIN, CHOWN = 1 << 12, 1 << 0


@pytest.fixture(scope="module")
def cluster(web_image: str, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """One manager and two workers."""
    failed_before = request.session.testsfailed
    with lab_up("more", 1, 2) as made:
        yield made
        if request.session.testsfailed > failed_before:
            print(f"logs of the hosts: {keep_logs(made)}")


@contextmanager
def service(cluster: Lab, name: str, options: tuple[str, ...], *image: str) -> Iterator[None]:
    cluster.pyswarm("m1", "service", "create", "--quiet", "--name", name, *NOW, *options, *image)
    try:
        yield
    finally:
        cluster.pyswarm("m1", "service", "rm", name)


def on(host: str) -> tuple[str, str]:
    return "--constraint", f"node.hostname=={host}"


def history(cluster: Lab, name: str) -> list[dict[str, str]]:
    return cluster.rows("m1", "service", "ps", "--no-trunc", name)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def pid_of(cluster: Lab, row: dict[str, str]) -> int:
    """Process 1 of a task, as the host sees it."""
    cgroup = Path("/sys/fs/cgroup/pids", cluster.host(row["Node"]).cgroup.lstrip("/"), row["ID"])
    if not cgroup.exists():  # cgroup v2
        cgroup = Path("/sys/fs/cgroup", cluster.host(row["Node"]).cgroup.lstrip("/"), row["ID"])
    return min(int(pid) for pid in (cgroup / "cgroup.procs").read_text().split())


def inside(cluster: Lab, row: dict[str, str], script: str) -> str:
    """What a shell in the task's namespaces says to the script, errors included."""
    argv = ["nsenter", "-t", str(pid_of(cluster, row)), "-m", "-u", "-i", "-n", "-p", "/bin/sh", "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    return (done.stdout + done.stderr).strip()


# ---------------------------------------------------------------- one task


def test_mounts_and_data_that_outlives_its_task(cluster: Lab, web_image: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from the host\n")
    mounts = (
        ("--mount", "type=volume,source=data,target=/data"),
        ("--mount", f"type=bind,source={tmp_path},target=/host"),
        ("--mount", f"type=bind,source={tmp_path},target=/look,readonly"),
        ("--mount", "type=tmpfs,target=/scratch,tmpfs-size=1m"),
    )
    options = ("--read-only", *on("w1"), *(word for mount in mounts for word in mount))
    command = ("sh", "-c", "echo ran >> /data/runs; exec sleep 1000")
    with service(cluster, "keeper", options, web_image, *command):
        cluster.pyswarm("m1", "service", "update", "--quiet", "--force", "--update-monitor", "0s", "keeper")
        (row,) = cluster.running("keeper")
        assert inside(cluster, row, "cat /data/runs").split() == ["ran", "ran"], "the volume survived the first task"
        assert inside(cluster, row, "cat /host/file /look/file").splitlines() == ["from the host"] * 2
        assert inside(cluster, row, "echo new > /host/new") == ""
        assert (tmp_path / "new").read_text() == "new\n"
        assert "Read-only" in inside(cluster, row, "echo no > /look/no")
        assert "Read-only" in inside(cluster, row, "echo no > /no")
        assert inside(cluster, row, "dd if=/dev/zero of=/scratch/a bs=1k count=500 2>&1; echo $?").endswith("0")
        assert "No space left" in inside(cluster, row, "dd if=/dev/zero of=/scratch/b bs=1k count=2000")
    volume = cluster.host("w1").state_dir / "volumes/data/_data/runs"
    assert volume.read_text() == "ran\nran\n", "and it survives the service"


def cgroup_value(cluster: Lab, row: dict[str, str], v1: str, v2: str) -> list[str]:
    below = f"{cluster.host(row['Node']).cgroup}/{row['ID']}".lstrip("/")
    controller = v1.partition("/")[0]
    path = Path("/sys/fs/cgroup", controller, below, v1.partition("/")[2])
    return (path if path.exists() else Path("/sys/fs/cgroup", below, v2)).read_text().split()


def test_limits_are_the_cgroups_and_the_kernel_enforces_them(cluster: Lab, web_image: str) -> None:
    options = ("--limit-memory", "64m", "--limit-cpu", "0.5", "--limit-pids", "20", "--reserve-memory", "32m")
    with service(cluster, "limited", options, web_image):
        (row,) = cluster.running("limited")
        assert cgroup_value(cluster, row, "memory/memory.limit_in_bytes", "memory.max") == [str(64 << 20)]
        reserved = cgroup_value(cluster, row, "memory/memory.soft_limit_in_bytes", "memory.low")
        assert reserved == [str(32 << 20)]
        assert cgroup_value(cluster, row, "cpu/cpu.cfs_quota_us", "cpu.max")[0] == "50000"
        assert cgroup_value(cluster, row, "pids/pids.max", "pids.max") == ["20"]
        cluster.pyswarm(
            "m1",
            "service",
            "update",
            "-d",
            "--reserve-memory",
            "0",
            "--limit-memory",
            "6m",
            "--args",
            OUT_OF_MEMORY,
            "limited",
        )

        def killed() -> str:
            return "".join(row["Error"] for row in history(cluster, "limited") if "memory" in row["Error"])

        assert "non-zero exit (137)" in wait_for(killed, 20, "the kernel ends a task that takes too much")


OUT_OF_MEMORY = "tail -c 50000000 /dev/zero"
"""tail keeps in memory what it shall show."""


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_a_task_is_confined(cluster: Lab, web_image: str) -> None:
    options = ("--cap-add", "NET_ADMIN", "--cap-drop", "chown", "--detach")
    script = "chown 1:1 /tmp; ip addr add 192.0.2.99/32 dev lo; unshare -U true; mount -t tmpfs x /mnt; exec sleep 1000"
    with (
        service(cluster, "confined", ("-d",), web_image),
        service(cluster, "bent", options, web_image, "sh", "-c", script),
    ):
        (plain,) = wait_for(lambda: cluster.running("confined"), 20, "confined runs")
        (bent,) = wait_for(lambda: cluster.running("bent"), 20, "bent runs")
        pid = pid_of(cluster, plain)
        now = status(pid)
        assert {int(now[key], 16) for key in ("CapEff", "CapPrm", "CapBnd")} == {DEFAULT_CAPABILITIES}
        assert (now["Seccomp"], now["NoNewPrivs"]) == ("2", "0")
        assert os.getpriority(os.PRIO_PROCESS, pid) == 0
        ours = hosts.daemon_pids(cluster.host(plain["Node"]))
        assert {os.getpriority(os.PRIO_PROCESS, each) for each in ours} == {NICENESS}
        assert int(status(pid_of(cluster, bent))["CapEff"], 16) == DEFAULT_CAPABILITIES & ~CHOWN | NET_ADMIN
        for kind in ("pid", "mnt", "uts", "ipc", "net"):
            seen = {Path(f"/proc/{some}/ns/{kind}").readlink() for some in ("self", pid, pid_of(cluster, bent))}
            assert len(seen) == 3, f"{kind} namespaces are their own"
        assert inside(cluster, plain, "ls /sys/firmware; cat /proc/keys") == ""
        assert inside(cluster, plain, "echo 1 > /proc/sys/vm/swappiness").endswith("Read-only file system")

        def said() -> str:
            done = cluster.try_pyswarm("m1", "service", "logs", "--raw", "bent")
            return done.stdout + done.stderr

        output = wait_for(lambda: "mount: " in said() and said(), 20, "the script came to its end")
        assert "chown: /tmp: Operation not permitted" in output
        assert "unshare: " in output, "no user namespaces under seccomp"
        assert "192.0.2.99" in inside(cluster, bent, "ip addr"), "NET_ADMIN was added"


def test_environment_hostname_and_templates(cluster: Lab, web_image: str) -> None:
    options = (
        *("--hostname", "{{.Service.Name}}-{{.Task.Slot}}-{{.Node.Hostname}}", "--env", "PLAIN=a b=c"),
        *("--env", 'WHERE={{.Node.Hostname}}/{{.Task.Name}}/{{index .Service.Labels "tier"}}', "--label", "tier=gold"),
        *("--user", "www", "--workdir", "/var", "--replicas", "2", *on("w2")),
    )
    with service(cluster, "named", options, web_image, "sleep", "1000"):
        for slot, row in enumerate(sorted(cluster.running("named"), key=lambda row: row["Name"]), 1):
            assert inside(cluster, row, "hostname") == f"named-{slot}-w2"
            assert f"named-{slot}-w2" in inside(cluster, row, "cat /etc/hostname /etc/hosts")
            pid = pid_of(cluster, row)
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
            assert "PLAIN=a b=c" in environment
            assert f"WHERE=w2/named.{slot}.{row['ID']}/gold" in environment
            assert status(pid)["Uid"].split()[0] == "33"
            assert Path(f"/proc/{pid}/cwd").readlink() == Path("/var")


def test_what_no_node_can_prepare_is_rejected_by_name_and_not_over_and_over(cluster: Lab, web_image: str) -> None:
    cluster.pyswarm("m1", "service", "create", "-d", "--name", "typo", "--user", "ghost", web_image)

    def rejected() -> int:
        return sum("ghost" in row["Error"] for row in history(cluster, "typo"))

    # The replacement is prepared, and rejected, while it waits its delay of five seconds: there it stops.
    wait_for(lambda: rejected() == 2, 20, "rejected by name")
    cluster.pyswarm("m1", "service", "logs", "typo")
    assert rejected() == 2
    cluster.pyswarm("m1", "service", "rm", "typo")


def test_logs_are_rotated_and_the_newest_lines_are_kept(cluster: Lab, web_image: str) -> None:
    """The agent looks every five seconds, so a burst may exceed max-size; what is beyond max-file goes."""
    options = ("--log-opt", "max-size=10k", "--log-opt", "max-file=2", *on("w1"))
    script = "i=0; while i=$((i+1)); do echo line $i; usleep 5000; done"
    with service(cluster, "chatty", options, web_image, "sh", "-c", script):
        (row,) = cluster.running("chatty")
        logs = cluster.host("w1").state_dir / "tasks" / row["ID"] / "logs"

        def kept() -> list[str]:
            return cluster.pyswarm("m1", "service", "logs", "--raw", "chatty").splitlines()

        wait_for(lambda: (logs / "log.1").exists() and kept()[0] != "line 1", 30, "the oldest lines are gone")
        assert {path.name for path in logs.iterdir()} <= {"log", "log.1"}
        numbers = [int(line.removeprefix("line ")) for line in kept()]
        assert numbers == list(range(numbers[0], numbers[-1] + 1)), "none is lost in between"
    assert "max-size" in refused(
        cluster.try_pyswarm("m1", "service", "create", "--log-opt", "max-size=many", web_image)
    )


def test_restart_policies_and_exit_codes(cluster: Lab, web_image: str) -> None:
    policies = {
        "never": ("none", "exit 3"),
        "done": ("on-failure", "exit 0"),
        "stubborn": ("any", "exit 7"),
    }
    for name, (condition, script) in policies.items():
        options = ["--name", name, "--restart-condition", condition, "--restart-max-attempts", "2", *NOW]
        cluster.pyswarm("m1", "service", "create", "-d", *options, web_image, "sh", "-c", script)

    def ended(name: str, count: int) -> list[dict[str, str]]:
        rows = history(cluster, name)
        return rows if len(rows) == count and all(row["DesiredState"] == "Shutdown" for row in rows) else []

    (never,) = wait_for(lambda: ended("never", 1), 20, "one task, not replaced")
    assert (never["CurrentState"].split()[0], never["Error"]) == ("Failed", '"task: non-zero exit (3)"')
    (done,) = wait_for(lambda: ended("done", 1), 20, "one task, complete")
    assert (done["CurrentState"].split()[0], done["Error"]) == ("Complete", "")
    stubborn = wait_for(lambda: ended("stubborn", 3), 20, "one task and two attempts more")
    assert {row["Error"] for row in stubborn} == {'"task: non-zero exit (7)"'}
    assert [row["Name"].startswith(" \\_ ") for row in stubborn] == [False, True, True]
    # They stay as they are, also when something else happens in the cluster.
    cluster.pyswarm("m1", "node", "update", "--label-add", "poke=1", "w1")
    assert [len(history(cluster, name)) for name in policies] == [1, 1, 3]
    cluster.pyswarm("m1", "service", "rm", *policies)


# ---------------------------------------------------------------- networks and ports


def test_a_host_mode_port_is_of_one_node_and_of_one_task(cluster: Lab, web_image: str) -> None:
    options = ("-d", "--replicas", "2", *on("w1"), "--publish", "published=8090,target=80,mode=host")
    with service(cluster, "pinned", options, web_image):
        (row,) = wait_for(lambda: cluster.running("pinned"), 20, "one runs")
        assert row["Ports"] == "*:8090->80/tcp"
        waiting = wait_for(
            lambda: [other for other in history(cluster, "pinned") if other["Error"]], 20, "the other is refused"
        )
        assert "host-mode port already in use on 1 node" in waiting[0]["Error"]
        assert cluster.get("w1", 8090)
        assert cluster.run("w1", "curl", "-s", "--max-time", "5", "http://127.0.0.1:8090/")
        for host in ("m1", "w2"):
            with pytest.raises(OSError, match=r"refused|reset"):
                cluster.get(host, 8090)
        cluster.pyswarm("m1", "service", "update", "-d", "--constraint-rm", "node.hostname==w1", "pinned")
        wait_for(lambda: len({row["Node"] for row in cluster.running("pinned")}) == 2, 30, "each on its own node")


def addresses(cluster: Lab, row: dict[str, str], name: str) -> set[str]:
    netns = cluster.host(row["Node"]).run_dir / "netns" / f"task-{row['ID']}"
    argv = ("nsenter", f"--net={netns}", "dig", "+short", "@127.0.0.11", name)
    return set(subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30).stdout.split())


def own_addresses(cluster: Lab, row: dict[str, str]) -> dict[str, str]:
    """Interface -> address."""
    lines = [line.split() for line in inside(cluster, row, "ip -4 -o addr").splitlines()]
    return {words[1]: words[3].partition("/")[0] for words in lines if words[1] != "lo"}


def test_dnsrr_internal_and_two_networks(cluster: Lab, web_image: str) -> None:
    cluster.pyswarm("m1", "network", "create", "front")
    cluster.pyswarm("m1", "network", "create", "--internal", "back")
    rr = ("-d", "--endpoint-mode", "dnsrr", "--network", "back", "--replicas", "3")
    both = ("-d", "--network", "front", "--network", "name=back,alias=bridge", *on("w1"))
    with service(cluster, "rr", rr, web_image), service(cluster, "both", both, web_image):
        tasks = wait_for(lambda: len(rows := cluster.running("rr")) == 3 and rows, 30, "rr runs")
        (row,) = wait_for(lambda: cluster.running("both"), 30, "both runs")
        wanted = {own_addresses(cluster, task)["eth0"] for task in tasks}
        assert len(wanted) == 3
        wait_for(lambda: addresses(cluster, row, "rr") == wanted, 10, "the name is the tasks")
        assert addresses(cluster, row, "tasks.rr") == wanted
        assert json.loads(cluster.pyswarm("m1", "service", "inspect", "rr"))[0]["Endpoint"].get("VirtualIPs", []) == []
        for address in wanted:
            assert " on nowhere" in inside(cluster, row, f"fetch http://{address}/")
        # Two networks: an address and a name on each, the way out over the one that has one.
        assert set(own_addresses(cluster, row)) == {"eth0", "eth1"}
        assert addresses(cluster, tasks[0], "both") == addresses(cluster, tasks[0], "bridge") != set()
        assert " on nowhere" in inside(cluster, tasks[0], "fetch http://both/")
        gateway = cluster.plan.gateway
        assert " 0% packet loss" in inside(cluster, row, f"ping -c1 -W2 {gateway}")
        assert " 0% packet loss" not in inside(cluster, tasks[0], f"ping -c1 -W2 {gateway}"), "internal: no way out"
        line = refused(cluster.try_pyswarm("m1", "service", "update", "--publish-add", "8099:80", "rr"))
        assert "dnsrr" in line
    wait_for(
        lambda: not cluster.try_pyswarm("m1", "network", "rm", "front", "back").stderr.count("in use"), 30, "removed"
    )


# ---------------------------------------------------------------- updates that go wrong


def env_of(cluster: Lab, name: str) -> list[str]:
    spec = json.loads(cluster.pyswarm("m1", "service", "inspect", name))[0]["Spec"]
    return list(spec["TaskTemplate"]["ContainerSpec"].get("Env", []))


def update_status(cluster: Lab, name: str) -> dict[str, str]:
    return dict(json.loads(cluster.pyswarm("m1", "service", "inspect", name))[0]["UpdateStatus"])


def test_a_failing_update_pauses_and_a_rollback_restores(cluster: Lab, web_image: str) -> None:
    options = ("--replicas", "2", "--env", "V=1", "--update-monitor", "500ms", "--rollback-monitor", "0s")
    with service(cluster, "rolled", options, web_image):
        assert "previous" in refused(cluster.try_pyswarm("m1", "service", "rollback", "rolled"))
        before = {row["ID"] for row in cluster.running("rolled")}
        command = ["--env-add", "V=2", "--no-resolve-image", "--image", "127.0.0.1:1/no/such:1", "rolled"]
        done = cluster.try_pyswarm("m1", "service", "update", *command)
        assert done.returncode == 1
        assert "update paused due to failure or early termination of task" in done.stderr.splitlines()[-1]
        assert update_status(cluster, "rolled")["State"] == "paused"
        assert "127.0.0.1:1" in update_status(cluster, "rolled")["Message"]
        kept = {row["ID"] for row in cluster.running("rolled")}
        assert len(kept & before) == 1, "only the first of two was touched"
        cluster.pyswarm("m1", "service", "rollback", "rolled")
        assert update_status(cluster, "rolled")["State"] == "rollback_completed"
        assert env_of(cluster, "rolled") == ["V=1"]
        running = cluster.running("rolled")
        assert len(running) == 2
        assert {row["ID"] for row in running} > kept & before, "what was right was left alone"
        failing = ["--args", "sh -c 'exit 9'", "--update-failure-action", "rollback", "rolled"]
        assert "rolled back" in refused_update(cluster, failing)
        wait_for(lambda: update_status(cluster, "rolled")["State"] == "rollback_completed", 20, "rolled back by itself")
        assert len(cluster.running("rolled")) == 2


def refused_update(cluster: Lab, words: list[str]) -> str:
    done = cluster.try_pyswarm("m1", "service", "update", *words)
    assert done.returncode == 1, done.stdout
    return done.stderr.splitlines()[-1]


# ---------------------------------------------------------------- nodes


def test_labels_place_tasks_and_node_ps_shows_them(cluster: Lab, web_image: str) -> None:
    cluster.pyswarm("m1", "node", "update", "--label-add", "zone=east", "--label-add", "disk=", "w2")
    labels = json.loads(cluster.pyswarm("m1", "node", "inspect", "w2"))[0]["Spec"]["Labels"]
    assert labels == {"zone": "east", "disk": ""}
    options = ("--constraint", "node.labels.zone==east", "--replicas", "2")
    with service(cluster, "eastern", options, web_image):
        assert {row["Node"] for row in cluster.running("eastern")} == {"w2"}
        listed = cluster.rows("m1", "node", "ps", "w2", "--filter", "desired-state=running")
        assert {row["Name"] for row in listed} == {"eastern.1", "eastern.2"}
        assert "eastern" not in cluster.pyswarm("m1", "node", "ps", "w1", "--filter", "desired-state=running")
        cluster.pyswarm("m1", "node", "update", "--label-rm", "zone", "--label-add", "disk=ssd", "w2")
        cluster.pyswarm("m1", "node", "update", "--label-add", "zone=east", "w1")
        wait_for(
            lambda: sorted(row["Node"] for row in cluster.running("eastern")) == ["w1", "w1"], 30, "moved to the label"
        )
    assert "nosuch" in refused(cluster.try_pyswarm("m1", "node", "update", "--label-rm", "nosuch", "w2"))


def channel(cluster: Lab, holder: str) -> grpc.Channel:
    """To m1's mTLS port, with the certificate that the holder has on its disk."""
    host = cluster.host(holder)
    pair = files.read_pair(HostPaths(host.state_dir, host.run_dir).certificates)
    credentials = grpc.ssl_channel_credentials(pair.root_ca_pem, pair.key_pem, pair.certificate_pem)
    target = f"{cluster.host('m1').address}:{MTLS_PORT}"
    return grpc.secure_channel(target, credentials, (("grpc.ssl_target_name_override", MANAGER_NAME),))


def denied(stub: ControlStub) -> str:
    calls: tuple[Callable[[], object], ...] = (
        lambda: stub.GetCluster(ClusterRequest(), timeout=CALL_S),
        lambda: stub.RotateJoinToken(RotateTokenRequest(role=WORKER), timeout=CALL_S),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError) as failure:
            call()
        assert failure.value.code() is grpc.StatusCode.PERMISSION_DENIED
    return str(failure.value.details())


def test_a_worker_s_certificate_opens_no_manager_s_api(cluster: Lab) -> None:
    token = cluster.pyswarm("m1", "swarm", "join-token", "-q", "worker")
    with channel(cluster, "m1") as managers:
        assert ControlStub(managers).GetCluster(ClusterRequest(), timeout=CALL_S).join_tokens.worker == token.strip()
    with channel(cluster, "w1") as workers:
        assert "needs the role manager" in denied(ControlStub(workers))
    root = files.read_pair(HostPaths(cluster.host("w1").state_dir, cluster.host("w1").run_dir).certificates).root_ca_pem
    target = f"{cluster.host('m1').address}:{MTLS_PORT}"
    options = (("grpc.ssl_target_name_override", MANAGER_NAME),)
    with grpc.secure_channel(target, grpc.ssl_channel_credentials(root), options) as nobody:
        with pytest.raises(grpc.RpcError) as failure:
            ControlStub(nobody).GetCluster(ClusterRequest(), timeout=CALL_S)
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE, "no certificate, no connection"
    assert cluster.pyswarm("m1", "swarm", "join-token", "-q", "worker") == token, "nothing was rotated"


def node_status(cluster: Lab) -> dict[str, str]:
    return {row["Hostname"]: row["Status"] for row in cluster.rows("m1", "node", "ls")}


def test_leaving_removing_and_joining_again_with_a_rotated_token(cluster: Lab, web_image: str) -> None:
    address = f"{cluster.host('m1').address}:2377"
    old = cluster.pyswarm("m1", "swarm", "join-token", "-q", "worker").strip()
    shown = cluster.pyswarm("m1", "swarm", "join-token", "--rotate", "worker")
    new = cluster.pyswarm("m1", "swarm", "join-token", "-q", "worker").strip()
    assert old != new
    assert f"pyswarm swarm join --token {new} {address}" in shown

    assert "--force" in refused(cluster.try_pyswarm("m1", "swarm", "leave"))
    assert node_status(cluster) == {"m1": "Ready", "w1": "Ready", "w2": "Ready"}
    assert "not down" in refused(cluster.try_pyswarm("m1", "node", "rm", "w2"))
    assert "manager" in refused(cluster.try_pyswarm("m1", "node", "rm", "--force", "m1"))

    with service(cluster, "web", ("--replicas", "3"), web_image):
        assert "w2" in {row["Node"] for row in cluster.running("web")}
        cluster.pyswarm("w2", "swarm", "leave")
        assert cluster.rows("w2", "info")[0]["Swarm"]["LocalNodeState"] == "inactive"
        wait_for(lambda: node_status(cluster)["w2"] == "Down", 20, "seen as down")
        wait_for(lambda: [row["Node"] for row in cluster.running("web")].count("w2") == 0, 20, "gone from w2")
        wait_for(lambda: len(cluster.running("web")) == 3, 20, "and back on the others")
        assert cluster.rows("w2", "info")[0]["ContainersRunning"] == 0
        line = refused(cluster.try_pyswarm("w2", "swarm", "join", "--token", old, address))
        assert "token" in line
        cluster.pyswarm("w2", "swarm", "join", "--token", new, address)
        listed = [row for row in cluster.rows("m1", "node", "ls") if row["Hostname"] == "w2"]
        assert sorted(row["Status"] for row in listed) == ["Down", "Ready"], "a new node beside the old one"
        assert "already" in refused(cluster.try_pyswarm("w2", "swarm", "join", "--token", new, address))
        cluster.pyswarm("m1", "service", "scale", "web=6")
        assert "w2" in {row["Node"] for row in cluster.running("web")}, "the old node's address is no obstacle"
        gone = next(row["ID"] for row in listed if row["Status"] == "Down")
        cluster.pyswarm("m1", "node", "rm", gone)
        assert node_status(cluster) == {"m1": "Ready", "w1": "Ready", "w2": "Ready"}
        assert gone in refused(cluster.try_pyswarm("m1", "node", "inspect", gone))


def test_a_node_removed_by_force_is_shut_out(cluster: Lab) -> None:
    hosts.kill(hosts.daemon_pids(cluster.host("w2")), signal.SIGKILL)
    with channel(cluster, "w2") as held:
        assert "needs the role manager" in denied(ControlStub(held))
        cluster.pyswarm("m1", "node", "rm", "--force", "w2")
        assert set(node_status(cluster)) == {"m1", "w1"}
        with pytest.raises(grpc.RpcError) as failure:
            next(DispatcherStub(held).Session(iter([AgentMessage()]), timeout=CALL_S))
        assert failure.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "was removed from this cluster" in str(failure.value.details())


@pytest.mark.skipif(xfrm.encrypts(), reason="this kernel can encrypt: tests/test_vm_esp.py has what it does then")
def test_a_network_that_no_host_can_encrypt_is_never_built_in_clear(cluster: Lab, web_image: str) -> None:
    assert "no network is encrypted" in refused(cluster.try_pyswarm("m1", "network", "rotate-keys"))
    assert "encrypted=perhaps" in refused(
        cluster.try_pyswarm("m1", "network", "create", "--opt", "encrypted=perhaps", "secret")
    )
    network_id = cluster.pyswarm("m1", "network", "create", "--opt", "encrypted", "secret").strip()
    with service(cluster, "safe", ("--detach", "--network", "secret"), web_image):
        reason = "no suitable node (no encryption of networks on "
        wait_for(lambda: reason in history(cluster, "safe")[0]["Error"], 20, "the task says why it waits")
        assert "its kernel lacks ESP" in cluster.pyswarm("m1", "explain", "safe")
        assert "Key 4 was distributed" in cluster.pyswarm("m1", "network", "rotate-keys")
    namespaces = [path.name for host in cluster.plan.hosts for path in (host.run_dir / "netns").glob("net-*")]
    assert f"net-{network_id[:12]}" not in namespaces
    wait_for(lambda: cluster.try_pyswarm("m1", "network", "rm", "secret").returncode == 0, 30, "network removed")
