"""`network doctor` as people and machines see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto import control_pb2 as control
from proto.control_pb2 import CheckCount, Diagnosis, DoctorProgress, DoctorReply, DoctorReport
from tests.cli_servers import Host, Script, manager_info, reply, serving

BROKEN = Diagnosis(
    severity=Diagnosis.BROKEN,
    subject="w1 - w2",
    what="packets of the overlays do not pass between them",
    why="on w2, chain input of table inet guard drops them: udp dport 4789 drop",
    remedy="on w2: nft delete rule inet guard input handle 4",
)
WARNING = Diagnosis(subject="w1", what="a program listens at 0.0.0.0", remedy="move it")
COUNTS = [CheckCount(name="underlay", passed=6), CheckCount(name="overlay", passed=4, failed=2, unknown=1)]
PROGRESS = DoctorReply(progress=DoctorProgress(nodes=3, answered=1, probes=20, tried=7))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    agent, manager = Script(Info=reply(manager_info())), Script()
    with serving(tmp_path, agent, manager):
        yield Host(tmp_path, agent, manager)


def says(host: Host, *diagnoses: Diagnosis) -> None:
    report = DoctorReply(report=DoctorReport(checks=COUNTS, diagnoses=diagnoses))
    host.manager.answers["ExamineNetworks"] = lambda request, context: iter([PROGRESS, report])


def test_findings_come_with_cause_and_remedy_and_exit_with_1(host: Host) -> None:
    says(host, BROKEN, WARNING)
    assert host.pyswarm("network", "doctor", "web", status=1).stdout.splitlines() == [
        "CHECK      PASSED    FAILED    UNKNOWN",
        "underlay   6         0         0",
        "overlay    4         2         1",
        "",
        "broken: w1 - w2: packets of the overlays do not pass between them",
        "  why:   on w2, chain input of table inet guard drops them: udp dport 4789 drop",
        "  mend:  on w2: nft delete rule inet guard input handle 4",
        "",
        "warning: w1: a program listens at 0.0.0.0",
        "  mend:  move it",
        "",
        "1 broken",
    ]
    assert host.manager.requests("ExamineNetworks") == [control.DoctorRequest(ref="web")]


def test_warnings_alone_are_healthy(host: Host) -> None:
    says(host, WARNING)
    assert host.pyswarm("network", "doctor").stdout.splitlines()[-1] == "healthy"


def test_json_has_every_field(host: Host) -> None:
    says(host, BROKEN)
    found = json.loads(host.pyswarm("network", "doctor", "--format", "json", status=1).stdout)
    assert found["diagnoses"][0]["severity"] == "BROKEN"
    assert found["diagnoses"][0]["remedy"] == BROKEN.remedy
    assert found["checks"][0] == {"name": "underlay", "passed": 6, "failed": 0, "unknown": 0}
    assert "json is known" in host.pyswarm("network", "doctor", "--format", "yaml", status=1).stderr


def test_a_stream_that_ends_early_is_an_error(host: Host) -> None:
    host.manager.answers["ExamineNetworks"] = lambda request, context: iter([PROGRESS])
    assert "without a report" in host.pyswarm("network", "doctor", status=1).stderr
