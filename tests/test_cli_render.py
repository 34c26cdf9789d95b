"""Objects to text: templates, tables, rows, Docker's JSON, pretty pages, log lines and progress."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto import objects_pb2 as pb
from proto.control_pb2 import ServiceCounts, WatchEvent
from proto.dispatch_pb2 import LogLine
from proto.local_pb2 import Image
from swarm.cli import retry
from swarm.cli.docker_shape import node_json, service_json
from swarm.cli.listing import align, header, render
from swarm.cli.loglines import LogFormat, format_line
from swarm.cli.pretty import pretty_node, pretty_service
from swarm.cli.progress import BARS_MAX, Outcome, Progress, measure
from swarm.cli.rows import image_rows, node_row, service_row, task_rows
from swarm.cli.template import Template
from swarm.cli.watch import Picture, bar_lines
from swarm.errors import Invalid

DATA = {"ID": "x1", "Spec": {"Name": "web", "Labels": {"b": "2", "a": "1"}, "On": True}, "List": [1, 2], "None": None}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{.ID}}", "x1"),
        ("{{.Spec.Name}}\\t{{ .ID }}", "web\tx1"),
        ("{{json .Spec.Labels}}", '{"b":"2","a":"1"}'),
        ("{{.Spec.Labels}}", "map[a:1 b:2]"),
        ("{{.List}} {{.None}} {{.Spec.On}}", "[1 2] <no value> true"),
        ("{{range .List}}<{{.}}>{{end}}", "<1><2>"),
        ("{{range .Spec.Labels}}{{.}}{{else}}none{{end}}", "12"),
        ("{{if .None}}a{{else}}b{{end}}", "b"),
        ('{{index .Spec.Labels "a"}}{{index .Spec.Labels "z"}}', "1"),
        ('{{join .List ","}} {{len .List}}', "1,2 2"),
        ("{{.Spec.Name | upper | json}}", '"WEB"'),
        ("{{(index .List 1)}}{{ with_dot }}", None),
        ("{{(.Spec).Name}}", "web"),
        ("a {{- .ID -}} b", "ax1b"),
        ('{{if eq .Spec.Name "web" "api"}}yes{{end}}', "yes"),
    ],
)
def test_templates(source: str, text: str | None) -> None:
    if text is None:
        with pytest.raises(Invalid, match=r"not defined|cannot read"):
            Template(source).render(DATA)
    else:
        assert Template(source).render(DATA) == text


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{.Nope}}", "there is no field Nope; known: ID"),
        ("{{.ID.More}}", "can't evaluate field More"),
        ("{{range .List}}", "without {{end}}"),
        ("{{end}}", "unexpected"),
        ("{{}}", "missing value"),
        ("{{frob .ID}}", "frob"),
        ("{{(.ID}}", r"missing \)"),
        ("{{index .List 9}}", "index: "),
        ("{{$x := 1}}", "cannot read"),
    ],
)
def test_bad_templates_say_why_and_quote_themselves(source: str, why: str) -> None:
    with pytest.raises(Invalid, match=why) as caught:
        Template(source).render(DATA)
    assert repr(source) in str(caught.value)


@given(st.text(alphabet='ab \n{}.-|()"`1'))
def test_any_template_renders_or_is_refused(source: str) -> None:
    with contextlib.suppress(Invalid):
        Template(source).render({"a": "1"})


COLUMNS = {"ID": "NETWORK ID", "CurrentState": "CURRENT STATE"}
ROWS = [
    {"ID": "a", "CurrentState": "Running", "Extra": "e"},
    {"ID": "long-identifier", "CurrentState": "", "Extra": "f"},
]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (None, "NETWORK ID        CURRENT STATE\na                 Running\nlong-identifier"),
        ("{{.ID}}={{.Extra}}", "a=e\nlong-identifier=f"),
        ("table {{.Extra}}\\t{{.ID}}", "EXTRA     NETWORK ID\ne         a\nf         long-identifier"),
    ],
)
def test_listing_formats(form: str | None, text: str) -> None:
    assert render(ROWS, COLUMNS, form) == text


def test_listing_as_json_is_an_object_a_line() -> None:
    assert [json.loads(line) for line in render(ROWS, COLUMNS, "json").splitlines()] == ROWS


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(Invalid, match="xml"):
        render(ROWS, COLUMNS, "xml")


def test_headings_come_from_field_names() -> None:
    assert (header("DesiredState"), header("ID"), header("NetworkID")) == ("DESIRED STATE", "ID", "NETWORK ID")
    assert align([["a", "b"]]) == "a         b"


# ---------------------------------------------------------------- objects


def service(replicas: int = 2, **fields: Any) -> pb.Service:
    made = pb.Service(id="svc0000000000000000000000", spec_version=5, **fields)
    made.meta.version = 7
    made.spec.annotations.name = "web"
    made.spec.replicated.replicas = replicas
    made.spec.task.container.image = "docker.io/library/web:1@sha256:ab"
    made.spec.task.networks.add(network_id="net1", aliases=["w"])
    made.spec.endpoint.ports.add(target_port=80, published_port=8000)
    return made


def task(slot: int, state: pb.TaskState.ValueType = pb.TASK_RUNNING, **fields: Any) -> pb.Task:
    made = pb.Task(id=f"task{slot}{fields.pop('suffix', '')}".ljust(25, "z"), slot=slot, service_id="svc", **fields)
    made.service_annotations.name = "web"
    made.status.state = state
    made.status.timestamp = 700
    if "desired_state" not in fields:
        made.desired_state = pb.TASK_RUNNING
    made.spec.CopyFrom(service().spec.task)
    return made


def test_a_service_row() -> None:
    row = service_row(service(), ServiceCounts(running=1, desired=2))
    assert row == {
        "ID": "svc000000000",
        "Name": "web",
        "Mode": "replicated",
        "Replicas": "1/2",
        "Image": "web:1",
        "Ports": "*:8000->80/tcp",
    }


def test_tasks_are_listed_by_slot_with_their_history_below() -> None:
    old = task(2, pb.TASK_FAILED, suffix="old", node_id="n1", desired_state=pb.TASK_SHUTDOWN)
    old.meta.created_at, old.status.err = 1, "task: non-zero exit (3): and a longer story"
    new = task(2, node_id="n2")
    new.meta.created_at = 2
    rows = task_rows([old, task(10), new], lambda node_id: {"n1": "w1"}.get(node_id, node_id), 1000, no_trunc=False)
    assert [row["Name"] for row in rows] == ["web.2", " \\_ web.2", "web.10"]
    assert rows[0]["CurrentState"] == "Running 5 minutes ago"
    assert (rows[1]["Node"], rows[1]["DesiredState"]) == ("w1", "Shutdown")
    assert rows[1]["Error"] == '"task: non-zero exit (3): and …"'
    full = task_rows([old], str, 1000, no_trunc=True)[0]
    assert full["Error"] == '"task: non-zero exit (3): and a longer story"'
    assert full["ID"] == old.id


def test_a_waiting_task_shows_why_no_node_takes_it() -> None:
    waiting = task(1, pb.TASK_PENDING)
    waiting.status.message = "no suitable node (insufficient resources on 2 nodes)"
    assert "no suitable node" in task_rows([waiting], str, 1000, no_trunc=True)[0]["Error"]


def node(node_id: str, role: pb.NodeRole.ValueType = pb.WORKER) -> pb.Node:
    made = pb.Node(id=node_id, role=role)
    made.spec.desired_role = role
    made.description.hostname = f"host-{node_id}"
    made.status.state = pb.NodeStatus.READY
    return made


def test_node_rows() -> None:
    manager = node("m", pb.MANAGER)
    assert node_row(manager, "m")["ManagerStatus"] == "Unreachable"
    manager.manager_status.reachable = True
    assert node_row(manager, "m")["ManagerStatus"] == "Reachable"
    manager.manager_status.leader = True
    row = node_row(manager, "m")
    assert (row["ID"], row["Status"], row["Availability"], row["ManagerStatus"]) == ("m *", "Ready", "Active", "Leader")
    assert node_row(node("w"), "m")["ManagerStatus"] == ""


def test_image_rows_have_a_line_for_each_name() -> None:
    image = Image(id="sha256:0123456789abcdef", names=["localhost:5000/web:1", "web:2"], size_bytes=1, created_at=1)
    rows = image_rows([image, Image(id="ff")], now=86400 * 3, no_trunc=False)
    assert [(row["Repository"], row["Tag"], row["ID"]) for row in rows] == [
        ("localhost:5000/web", "1", "0123456789ab"),
        ("web", "2", "0123456789ab"),
        ("<none>", "<none>", "ff"),
    ]


def test_service_json_has_dockers_shape_and_hides_credentials() -> None:
    made = service()
    made.spec.task.container.registry_auth = "c2VjcmV0"
    made.spec.update.max_failure_ratio = 0.1
    shape = service_json(made)
    assert shape["Version"] == {"Index": 7}
    assert shape["Spec"]["Mode"] == {"Replicated": {"Replicas": 2}}
    template = shape["Spec"]["TaskTemplate"]
    assert template["ContainerSpec"]["StopGracePeriod"] == 10_000_000_000
    assert template["Networks"] == [{"Target": "net1", "Aliases": ["w"]}]
    assert shape["Spec"]["UpdateConfig"]["MaxFailureRatio"] == 0.1
    assert shape["Spec"]["EndpointSpec"]["Ports"][0]["PublishedPort"] == 8000
    assert "c2VjcmV0" not in json.dumps(shape)


def test_node_json() -> None:
    assert "ManagerStatus" not in node_json(node("w"))
    assert node_json(node("m", pb.MANAGER))["ManagerStatus"]["Reachability"] == "unreachable"


def test_inspect_says_whether_clients_addresses_are_kept_and_how_connections_are_shared_out() -> None:
    made = service()
    made.endpoint.spec.CopyFrom(made.spec.endpoint)
    assert service_json(made)["Endpoint"]["ClientAddresses"] == "kept"
    made.masquerading_nodes.extend(["w1", "w2"])
    assert service_json(made)["Endpoint"]["ClientAddresses"] == "masqueraded for tasks on w1, w2"
    made.spec.endpoint.balance, made.spec.endpoint.weight_label = pb.SOURCE_HASH, "node.labels.size"
    made.spec.endpoint.ports[0].host_ip = "192.0.2.1"
    shape = service_json(made)["Spec"]["EndpointSpec"]
    assert (shape["Balance"], shape["BalanceWeight"]) == ("source", "node.labels.size")
    assert shape["Ports"][0]["HostIP"] == "192.0.2.1"
    lines = [" ".join(line.split()) for line in pretty_service(made, {}).splitlines()]
    for line in (
        "Client Addresses: masqueraded for tasks on w1, w2",
        "Balance: source",
        "Balance Weight: node.labels.size",
    ):
        assert line in lines
    del made.endpoint.spec.ports[:]
    assert "ClientAddresses" not in service_json(made)["Endpoint"]


def test_pretty_pages() -> None:
    made = service()
    made.spec.task.resources.limits.memory_bytes = 64 << 20
    made.endpoint.virtual_ips.add(network_id="net1", address="10.0.1.2/24")
    lines = [" ".join(line.split()) for line in pretty_service(made, {"net1": "wpnet"}).splitlines()]
    for line in ("Name: web", "Replicas: 2", "Memory: 64MiB", "Networks: wpnet", "PublishedPort: 8000"):
        assert line in lines
    assert "Virtual IP: 10.0.1.2/24 (wpnet)" in lines
    assert "State:" in pretty_node(node("w"))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (LogFormat(), b"web.3.task3zzzzzzz@w1    | hello"),
        (LogFormat(raw=True), b"hello"),
        (LogFormat(no_task_ids=True), b"web.3@w1    | hello"),
        (LogFormat(no_trunc=True), b"web.3.task3zzzzzzzzzzzzzzzzzzzz@w1    | hello"),
        (LogFormat(no_resolve=True, no_task_ids=True), b"svc.3@n1    | hello"),
        (LogFormat(raw=True, timestamps=True), b"1970-01-01T00:00:01.000000000Z hello"),
    ],
)
def test_log_lines(form: LogFormat, text: bytes) -> None:
    line = LogLine(task_id=task(3).id, node_id="n1", data=b"hello\n", timestamp=1)
    names = {} if form.no_resolve else {"n1": "w1"}
    assert format_line(line, task(3), names, form) == text


# ---------------------------------------------------------------- progress


def test_a_service_converges_when_every_slot_runs_todays_spec() -> None:
    starting = [task(1), task(2, pb.TASK_STARTING)]
    assert measure(service(), starting, 0).outcome is Outcome.WORKING
    progress = measure(service(), [task(1), task(2)], 0)
    assert (progress.outcome, progress.overall) == (Outcome.CONVERGED, "overall progress: 2 out of 2 tasks")


def test_scaling_does_not_make_running_tasks_outdated_but_a_new_image_does() -> None:
    scaled = service()
    scaled.spec_version = 9
    scaled.spec.task.container.registry_auth = "x"
    assert measure(scaled, [task(1), task(2)], 0).outcome is Outcome.CONVERGED
    scaled.spec.task.container.image = "web:2"
    assert measure(scaled, [task(1), task(2)], 0).running == 0


def test_tasks_to_be_stopped_do_not_count_and_surplus_ones_are_waited_for() -> None:
    stopping = task(2, desired_state=pb.TASK_SHUTDOWN)
    progress = measure(service(), [task(1), stopping], 0)
    assert (progress.running, progress.outcome) == (1, Outcome.WORKING)
    assert measure(service(), [task(1), task(2), task(3)], 0).outcome is Outcome.WORKING


def test_scaling_down_may_leave_any_slots() -> None:
    progress = measure(service(), [task(4), task(5)], 0)
    assert (progress.outcome, [bar.key for bar in progress.bars]) == (Outcome.CONVERGED, ["4/2", "5/2"])
    assert [bar.key for bar in measure(service(), [task(4)], 0).bars] == ["1/2", "4/2"]


def test_a_global_service_waits_for_every_eligible_node() -> None:
    made = service()
    getattr(made.spec, "global").SetInParent()
    tasks = [task(0, suffix=name, node_id=name) for name in ("n1", "n2")]
    assert measure(made, tasks, 3).outcome is Outcome.WORKING
    assert measure(made, tasks, 2).outcome is Outcome.CONVERGED
    assert [bar.key for bar in measure(made, tasks, 2).bars] == ["n1", "n2"]


def execution(slot: int, state: pb.TaskState.ValueType, **fields: Any) -> pb.Task:
    fields.setdefault("desired_state", pb.TASK_COMPLETE)
    return task(slot, state, job_iteration=1, **fields)


def a_job(total: int) -> pb.Service:
    made = service()
    made.spec.replicated_job.total_completions = total
    made.job_status.iteration = 1
    return made


def test_a_job_converges_when_it_is_complete() -> None:
    former = task(2, pb.TASK_COMPLETE, job_iteration=0, suffix="former")
    progress = measure(a_job(2), [former, execution(1, pb.TASK_COMPLETE), execution(2, pb.TASK_RUNNING)], 0)
    assert (progress.outcome, progress.overall) == (Outcome.WORKING, "job progress: 1 out of 2 complete")
    assert [(bar.key, bar.state) for bar in progress.bars] == [("1/2", "complete"), ("2/2", "running")]
    done = [execution(1, pb.TASK_COMPLETE), execution(2, pb.TASK_COMPLETE)]
    assert measure(a_job(2), done, 0).outcome is Outcome.CONVERGED


def test_a_job_that_cannot_complete_any_more_says_so() -> None:
    lost = execution(2, pb.TASK_FAILED, desired_state=pb.TASK_SHUTDOWN, reason="failed; no attempts left")
    assert measure(a_job(3), [lost, execution(1, pb.TASK_COMPLETE)], 0).outcome is Outcome.WORKING
    progress = measure(a_job(2), [lost, execution(1, pb.TASK_COMPLETE)], 0)
    assert progress.outcome is Outcome.FAILED
    assert progress.note == "1 of 2 executions failed for good: failed; no attempts left"


def test_a_jobs_row_has_dockers_words() -> None:
    shown = service_row(a_job(5), ServiceCounts(running=1, desired=1, completed=3, total=5))
    assert (shown["Mode"], shown["Replicas"]) == ("replicated job", "1/1 (3/5 completed)")


@pytest.mark.parametrize(
    ("state", "version", "asked", "outcome"),
    [
        (pb.UpdateStatus.UPDATING, 5, False, Outcome.WORKING),
        (pb.UpdateStatus.COMPLETED, 5, False, Outcome.CONVERGED),
        (pb.UpdateStatus.PAUSED, 5, False, Outcome.FAILED),
        (pb.UpdateStatus.PAUSED, 4, False, Outcome.CONVERGED),
        (pb.UpdateStatus.ROLLBACK_STARTED, 5, False, Outcome.WORKING),
        (pb.UpdateStatus.ROLLBACK_COMPLETED, 5, False, Outcome.FAILED),
        (pb.UpdateStatus.ROLLBACK_COMPLETED, 5, True, Outcome.CONVERGED),
        (pb.UpdateStatus.ROLLBACK_PAUSED, 5, True, Outcome.FAILED),
    ],
)
def test_the_updates_state_decides_first(
    state: pb.UpdateStatus.State.ValueType, version: int, asked: bool, outcome: Outcome
) -> None:
    made = service()
    made.update_status.state, made.update_status.spec_version, made.update_status.message = state, version, "why"
    progress = measure(made, [task(1), task(2)], 0, rolling_back=asked)
    assert progress.outcome is outcome
    assert ("why" in progress.note) == (outcome is Outcome.FAILED or state == pb.UpdateStatus.ROLLBACK_STARTED)


def test_bars_show_what_went_wrong_and_vanish_for_large_services() -> None:
    failed = task(1, pb.TASK_REJECTED, suffix="old", desired_state=pb.TASK_SHUTDOWN)
    failed.status.err = "no such image"
    failed.meta.created_at = 1
    waiting = task(1, pb.TASK_NEW)
    waiting.meta.created_at = 2
    lines = bar_lines(measure(service(), [waiting, failed, task(2)], 0))
    assert lines[0] == "overall progress: 1 out of 2 tasks"
    assert "no such image" in lines[1]
    assert lines[2].startswith("2/2: running   [====")
    assert measure(service(replicas=BARS_MAX + 1), [], 0).bars == ()


def test_a_picture_forgets_what_a_new_snapshot_does_not_hold() -> None:
    picture = Picture()
    picture.learn(WatchEvent(snapshot=True, service=service(), tasks=[task(1), task(2)]))
    picture.learn(WatchEvent(removed_task_ids=[task(1).id]))
    assert list(picture.tasks) == [task(2).id]
    picture.learn(WatchEvent(snapshot=True, tasks=[task(3)]))
    assert list(picture.tasks) == [task(3).id]
    picture.learn(WatchEvent(service_removed=True))
    assert picture.removed


def test_an_empty_progress_draws() -> None:
    assert bar_lines(Progress(0, 0, (), Outcome.WORKING, "allocating")) == [
        "overall progress: 0 out of 0 tasks",
        "allocating",
    ]


def test_retries_back_off_and_end() -> None:
    assert retry.delay_s("NOT_FOUND", 1, 0) is None
    assert [retry.delay_s("UNAVAILABLE", attempt, 0) for attempt in (1, 2, 3, 9)] == [0.1, 0.2, 0.4, 1.0]
    assert retry.delay_s("UNAVAILABLE", 1, retry.TOTAL_S) is None
    assert retry.keeps_request_id("DEADLINE_EXCEEDED")
    assert not retry.keeps_request_id("ABORTED")
