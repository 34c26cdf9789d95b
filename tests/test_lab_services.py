"""Issue section 1 on a real lab of five hosts: services, names, ports, updates, drain, logs, bad input."""

from __future__ import annotations

import collections
import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest

from swarm.lab import hosts
from tests.labs import Lab, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


@pytest.fixture
def service(cluster: Lab, web_image: str) -> Iterator[str]:
    """`web`: five tasks on `net`, published at 8000; removed afterwards."""
    cluster.pyswarm("m1", "network", "create", "net")
    command = [
        "--name",
        "web",
        "--replicas",
        "5",
        "--network",
        "net",
        "--publish",
        "8000:80",
        "--restart-delay",
        "200ms",
    ]
    cluster.pyswarm("m1", "service", "create", *command, "--env", "NODE={{.Node.Hostname}}", web_image)
    yield "web"
    remove(cluster, "web")
    wait_for(lambda: cluster.try_pyswarm("m1", "network", "rm", "net").returncode == 0, 30, "network removed")


def remove(cluster: Lab, name: str) -> None:
    cluster.pyswarm("m1", "service", "rm", name)
    wait_for(lambda: not any(row["Name"] == name for row in cluster.rows("m1", "service", "ls")), 60, "removed")


def inside(cluster: Lab, row: dict[str, str], *argv: str) -> str:
    """Run a command in the network namespace of a task."""
    netns = cluster.host(row["Node"]).run_dir / "netns" / f"task-{row['ID']}"
    argv = ("nsenter", f"--net={netns}", *argv)
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30).stdout


def test_tasks_are_spread_and_every_manager_answers(cluster: Lab, service: str) -> None:
    spread = collections.Counter(row["Node"] for row in cluster.running(service))
    assert spread == dict.fromkeys(["m1", "m2", "m3", "w1", "w2"], 1)
    for manager in ("m1", "m2", "m3"):
        assert cluster.rows(manager, "service", "ls")[0]["Replicas"] == "5/5"


def test_a_published_port_is_balanced_from_every_host(cluster: Lab, service: str) -> None:
    for host in cluster.hosts:
        answers = {cluster.get(host, 8000) for _ in range(15)}
        assert len(answers) == 5, f"{host} reached {answers}"
        assert cluster.run(host, "curl", "-s", "--max-time", "5", "http://127.0.0.1:8000/")


def test_names_and_the_virtual_ip_from_inside_tasks(cluster: Lab, service: str) -> None:
    rows = cluster.running(service)
    for row in rows[:2]:
        (vip,) = inside(cluster, row, "dig", "+short", "@127.0.0.11", "web").split()
        tasks = inside(cluster, row, "dig", "+short", "@127.0.0.11", "tasks.web").split()
        assert len(set(tasks)) == 5
        assert inside(cluster, row, "dig", "+short", "@127.0.0.11", "web.net").split() == [vip]
        names = {inside(cluster, row, "dig", "+short", "@127.0.0.11", "-x", task).split(".")[0] for task in tasks}
        assert names == {"web"}
        answers = {inside(cluster, row, "curl", "-s", "--max-time", "5", f"http://{vip}/").strip() for _ in range(15)}
        assert len(answers) == 5


def test_tasks_reach_the_outside_and_full_size_packets_pass_between_hosts(cluster: Lab, service: str) -> None:
    one, other = (row for row in cluster.running(service) if row["Node"] in ("w1", "w2"))
    gateway = cluster.plan.gateway
    assert "1 received" in inside(cluster, one, "ping", "-c1", "-W3", gateway)
    address = inside(cluster, other, "ip", "-4", "-o", "addr", "show", "eth0").split()[3].partition("/")[0]
    assert "1 received" in inside(cluster, one, "ping", "-c1", "-W3", "-M", "do", "-s", "1422", address)


def test_scale_down_and_up_answers_with_what_is_left(cluster: Lab, service: str) -> None:
    cluster.pyswarm("m2", "service", "scale", "web=2")
    assert len(cluster.running(service)) == 2
    assert len({cluster.get("w1", 8000) for _ in range(8)}) == 2
    cluster.pyswarm("m3", "service", "scale", "web=0")
    with pytest.raises(OSError, match=r"refused|reset"):
        cluster.get("m1", 8000)
    cluster.pyswarm("m3", "service", "scale", "web=5")
    assert len({cluster.get("w1", 8000) for _ in range(15)}) == 5


def test_a_task_that_dies_is_replaced_and_stays_in_the_history(cluster: Lab, service: str) -> None:
    victim = cluster.running(service)[0]
    host = victim["Node"]
    pids = [int(pid) for pid in hosts.host_pids(cluster.host(host)) if victim["ID"] in _cgroup(pid)]
    hosts.kill(pids, signal.SIGKILL)
    wait_for(lambda: victim["ID"] not in {row["ID"] for row in cluster.running(service)}, 20, "death seen")
    wait_for(lambda: len(cluster.running(service)) == 5, 20, "replaced")
    history = cluster.rows("m1", "service", "ps", "--no-trunc", service)
    dead = next(row for row in history if row["ID"] == victim["ID"])
    assert dead["CurrentState"].startswith("Failed")
    assert "non-zero exit (137)" in dead["Error"]


def _cgroup(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cgroup") as file:
            return file.read()
    except OSError:
        return ""


def test_update_start_first_replaces_every_task(cluster: Lab, service: str) -> None:
    before = {row["ID"] for row in cluster.running(service)}
    command = [
        "service",
        "update",
        "--env-add",
        "A=2",
        "--update-order",
        "start-first",
        "--update-parallelism",
        "0",
        service,
    ]
    cluster.pyswarm("m1", *command)
    running = cluster.running(service)
    assert len(running) == 5
    assert not before & {row["ID"] for row in running}
    inspected = json.loads(cluster.pyswarm("m1", "service", "inspect", service))[0]
    assert inspected["UpdateStatus"]["State"] == "completed"
    assert "Name:" in cluster.pyswarm("m1", "service", "inspect", "--pretty", service)


def test_drain_moves_tasks_and_active_takes_new_ones(cluster: Lab, service: str) -> None:
    cluster.pyswarm("m1", "node", "update", "--availability", "drain", "--wait", "w1")
    rows = cluster.running(service)
    assert "w1" not in {row["Node"] for row in rows}
    assert len(rows) == 5
    cluster.pyswarm("m1", "node", "update", "--availability", "active", "w1")
    assert cluster.pyswarm("m2", "service", "rebalance", service).splitlines()[-1] == "web: 1 tasks moved"
    assert collections.Counter(row["Node"] for row in cluster.running(service))["w1"] == 1
    assert cluster.pyswarm("m3", "service", "rebalance", service) == "web: even already\n"


def test_logs_come_from_every_host(cluster: Lab, service: str) -> None:
    lines = cluster.pyswarm("m2", "service", "logs", service).splitlines()
    assert len({line.split("|")[0] for line in lines}) == 5
    assert all("serves on port 80" in line for line in lines)


def test_events_tell_what_happened_and_end_when_asked(cluster: Lab, service: str) -> None:
    cluster.pyswarm("m1", "service", "scale", "--detach", "web=6")
    wait_for(lambda: len(cluster.running(service)) == 6, 30, "scaled")
    asked = ["events", "--since", "5m", "--until", "0s", "--filter", f"service={service}"]
    for manager in ("m1", "m3"):
        lines = cluster.pyswarm(manager, *asked).splitlines()
        assert any("service update" in line and "replicas.new=6, replicas.old=5" in line for line in lines)
        assert sum(" task running " in line for line in lines) >= 6
    event = json.loads(cluster.pyswarm("m1", *asked, "--format", "json").splitlines()[-1])
    assert (event["Type"], event["Actor"]["Attributes"]["service"]) == ("task", "web")


def test_a_global_service_runs_once_on_each_matching_node(cluster: Lab, web_image: str) -> None:
    command = ["--name", "everywhere", "--mode", "global", "--constraint", "node.role==worker", web_image]
    cluster.pyswarm("m1", "service", "create", *command)
    assert sorted(row["Node"] for row in cluster.running("everywhere")) == ["w1", "w2"]
    remove(cluster, "everywhere")


def test_commands_in_tasks_of_any_host(cluster: Lab, service: str) -> None:
    rows = {row["Name"]: row for row in cluster.running(service)}
    for name in ("web.2", "web.4"):
        assert rows[name]["Node"] in cluster.pyswarm("m2", "service", "exec", name, "cat", "/dev/shm/www/index.html")
    done = cluster.try_pyswarm("m3", "service", "exec", "-t", "-w", "/tmp", "web", "sh", "-c", "pwd; tty; exit 9")
    assert (done.returncode, done.stdout.split()) == (9, ["/tmp", "/dev/pts/0"]), done.stderr
    done = cluster.try_pyswarm("m1", "service", "exec", "web.9", "true")
    assert done.stderr == "Error: no task of web.9 runs: see why with `pyswarm explain web.9`\n"


def test_the_disk_of_a_host(cluster: Lab, service: str) -> None:
    rows = {row["Type"]: row for row in cluster.rows("m1", "system", "df")}
    assert rows["Containers"]["Active"] == "1"
    cluster.pyswarm("m1", "system", "prune", "--all", "--volumes", "--force")
    assert len(cluster.running(service)) == 5
    assert cluster.pyswarm("m1", "service", "exec", service, "echo", "alive") == "alive\n"


def test_jobs_complete_as_often_as_asked(cluster: Lab, web_image: str) -> None:
    """TestReplicatedJob of the reference; a second iteration, and a global job."""
    command = ["--name", "sum", "--entrypoint", "sh -c 'sleep 0.3'", web_image]
    modes = ["--mode", "replicated-job", "--replicas", "5", "--max-concurrent", "2"]
    assert "job progress: 5 out of 5 complete" in cluster.pyswarm("m1", "service", "create", *modes, *command)
    shown = cluster.rows("m2", "service", "ls")[0]
    assert (shown["Mode"], shown["Replicas"]) == ("replicated job", "0/0 (5/5 completed)")
    states = {
        (row["DesiredState"], row["CurrentState"].split()[0]) for row in cluster.rows("m1", "service", "ps", "sum")
    }
    assert states == {("Complete", "Complete")}
    assert "job progress: 3 out of 3 complete" in cluster.pyswarm("m1", "service", "scale", "sum=3")
    assert len(cluster.rows("m1", "service", "ps", "sum")) == 3
    remove(cluster, "sum")
    cluster.pyswarm("m1", "service", "create", "--mode", "global-job", *command)
    assert len({row["Node"] for row in cluster.rows("m1", "service", "ps", "sum")}) == 5
    failing = ["--name", "no", "--restart-condition", "none", "--entrypoint", "sh -c 'exit 3'", web_image]
    failed = cluster.try_pyswarm("m1", "service", "create", "--mode", "replicated-job", *failing)
    assert failed.returncode != 0
    assert "1 of 1 executions failed for good" in failed.stdout + failed.stderr
    remove(cluster, "no")
    remove(cluster, "sum")


def test_a_task_runs_when_it_is_healthy_and_an_unhealthy_one_is_replaced(cluster: Lab, web_image: str) -> None:
    check = "test -e /dev/shm/well || { echo taken ill; false; }"
    command = ["--detach", "--name", "frail", "--health-cmd", check, "--health-interval", "300ms"]
    command += ["--health-retries", "2", "--health-start-period", "30s"]
    start = ["--entrypoint", "sh -c 'sleep 1; touch /dev/shm/well; sleep 2; rm /dev/shm/well; sleep 1000'"]
    cluster.pyswarm("m1", "service", "create", *command, *start, "--restart-delay", "0s", web_image)

    def errors() -> str:
        return "".join(row["Error"] for row in cluster.rows("m1", "service", "ps", "--no-trunc", "frail"))

    wait_for(lambda: len(cluster.running("frail")) == 1, 20, "healthy")
    wait_for(lambda: "unhealthy: its health check failed 2 times: taken ill" in errors(), 20, "told")
    wait_for(lambda: len(cluster.running("frail")) == 1, 20, "replaced")
    remove(cluster, "frail")


def offer(cluster: Lab, name: str, *resources: str) -> None:
    """Start the host's daemon again, with these generic resources."""
    host = cluster.host(name)
    hosts.kill(hosts.daemon_pids(host), signal.SIGTERM)
    hosts.start_daemon(replace(cluster.plan, generic_resources=resources), host)


def test_generic_resources_are_given_out_told_to_the_container_and_lost_with_the_node(
    cluster: Lab, web_image: str
) -> None:
    offer(cluster, "w1", "gpu=GPU1", "gpu=GPU2", "licence=3")
    wait_for(lambda: "gpu=GPU1" in cluster.pyswarm("m1", "node", "inspect", "--pretty", "w1"), 20, "offered")
    command = ["--detach", "--name", "cards", "--replicas", "3", "--restart-delay", "0s", web_image]
    cluster.pyswarm("m1", "service", "create", "--generic-resource", "gpu=1,licence=1", *command)
    wait_for(lambda: {row["Node"] for row in cluster.running("cards")} == {"w1"}, 20, "placed")
    wait_for(lambda: "w1: lacks 1 of 1 gpu" in cluster.pyswarm("m2", "explain", "cards"), 20, "told")
    first, second = (row["ID"] for row in cluster.running("cards"))
    got = [cluster.pyswarm("m1", "service", "exec", task, "env").split() for task in (first, second)]
    assert sorted(word for words in got for word in words if "_GPU=" in word) == [
        "DOCKER_RESOURCE_GPU=GPU1",
        "DOCKER_RESOURCE_GPU=GPU2",
    ]
    assert all("DOCKER_RESOURCE_LICENCE=1" in words for words in got)
    offer(cluster, "w1", "gpu=GPU2", "licence=3")
    offer(cluster, "w2", "gpu=OTHER", "licence=1")
    wait_for(lambda: {row["Node"] for row in cluster.running("cards")} == {"w1", "w2"}, 30, "moved")
    assert "gpu GPU2: cards" in cluster.pyswarm("m1", "explain", "w1")
    cluster.pyswarm("m1", "service", "update", "--generic-resource-rm", "gpu", "cards")
    assert len(cluster.running("cards")) == 3
    remove(cluster, "cards")
    for name in ("w1", "w2"):
        offer(cluster, name)


def test_a_missing_image_rejects_the_task_with_the_reason(cluster: Lab) -> None:
    command = ["service", "create", "--detach", "--no-resolve-image", "--name", "ghost", "127.0.0.1:1/no/such:1"]
    cluster.pyswarm("m1", *command)

    def rejected() -> list[str]:
        rows = cluster.rows("m1", "service", "ps", "--no-trunc", "ghost")
        return [row["Error"] for row in rows if row["CurrentState"].startswith("Rejected")]

    errors = wait_for(rejected, 30, "rejected")
    assert "127.0.0.1:1" in errors[0]
    remove(cluster, "ghost")


def test_an_unsatisfiable_constraint_is_explained(cluster: Lab, web_image: str) -> None:
    command = ["service", "create", "--detach", "--name", "nowhere", "--constraint", "node.hostname==x", web_image]
    cluster.pyswarm("m1", *command)

    def reason() -> str:
        return "".join(row["Error"] for row in cluster.rows("m1", "service", "ps", "--no-trunc", "nowhere"))

    wait_for(lambda: "no suitable node (scheduling constraints not satisfied on 5 nodes)" in reason(), 20, "explained")
    for subject in ("nowhere", "nowhere.1"):
        assert "w1: does not satisfy node.hostname==x" in cluster.pyswarm("m2", "explain", subject)
    assert "takes new tasks" in cluster.pyswarm("m2", "explain", "w1")
    remove(cluster, "nowhere")


BAD_INPUT = [
    (["service", "inspect", "nosuch"], "no such service: nosuch"),
    (["service", "scale", "nosuch=3"], "nosuch"),
    (["service", "rm", "nosuch"], "nosuch"),
    (["node", "inspect", "nosuch"], "nosuch"),
    (["network", "inspect", "nosuch"], "nosuch"),
    (["service", "create", "--network", "nosuch", "IMAGE"], "nosuch"),
    (["service", "create", "--name", "web", "IMAGE"], "web"),
    (["service", "create", "--replicas", "-1", "IMAGE"], "replicas"),
    (["service", "create", "--publish", "70000:80", "IMAGE"], "70000"),
    (["service", "create", "--publish", "8000:80", "IMAGE"], "8000"),
    (["service", "create", "--constraint", "node.rol==x", "IMAGE"], "node.rol"),
    (["service", "create", "--mount", "type=bind,source=/no/such/path,target=/x", "IMAGE"], "/no/such/path"),
    (["network", "rm", "net"], "in use"),
    (["network", "create", "net"], "net"),
    (["service", "create", "127.0.0.1:1/no/such:1"], "127.0.0.1:1"),
]


@pytest.mark.parametrize(("argv", "word"), BAD_INPUT, ids=[" ".join(argv[:4]) for argv, _ in BAD_INPUT])
def test_bad_input_is_one_clear_line_and_changes_nothing(
    cluster: Lab, standing: str, web_image: str, argv: list[str], word: str
) -> None:
    before = cluster.pyswarm("m1", "service", "ls", "--format", "json")
    done = cluster.try_pyswarm("m1", *[web_image if item == "IMAGE" else item for item in argv])
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert word in lines[0]
    assert cluster.pyswarm("m1", "service", "ls", "--format", "json") == before


@pytest.fixture(scope="module")
def standing(cluster: Lab, web_image: str) -> Iterator[str]:
    """A service that stands while all bad input is tried."""
    cluster.pyswarm("m1", "network", "create", "net")
    command = ["--name", "web", "--network", "net", "--publish", "8000:80", web_image]
    cluster.pyswarm("m1", "service", "create", *command)
    yield "web"
    remove(cluster, "web")
    wait_for(lambda: cluster.try_pyswarm("m1", "network", "rm", "net").returncode == 0, 30, "network removed")


def test_unknown_options_are_usage_errors(cluster: Lab) -> None:
    assert cluster.try_pyswarm("m1", "service", "create", "--no-such-flag", "x").returncode == 2
