"""`pyswarm network doctor`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import click
from google.protobuf.json_format import MessageToDict

from proto.control_pb2 import Diagnosis, DoctorProgress, DoctorReply, DoctorReport, DoctorRequest
from swarm.cli.client import connect
from swarm.cli.command import GoCommand
from swarm.cli.completing import service_names
from swarm.cli.failure import Failure
from swarm.cli.listing import align

QUIET_S = 1.0
"""An examination that takes longer tells how far it is."""


@click.command(cls=GoCommand)
@click.argument("ref", metavar="[SERVICE]", default="", shell_complete=service_names)
@click.option("--format", "-f", "form", metavar="FORMAT", help="json for machines; text for people if not given.")
def doctor(ref: str, form: str | None) -> None:
    """Check the networks from every host concerned; say what is broken, why, and how to mend it.

    Of one service, or of all networks and nodes. Exits with 1 when something is broken. Programs that publish ports
    see connections that are closed at once.

    \b
    Example:
      pyswarm network doctor
      pyswarm network doctor web
    """
    if form not in (None, "json"):
        raise Failure(f"invalid value '{form}' for --format: json is known")
    client = connect()
    report = _followed(client.control_stream(client.control.ExamineNetworks, DoctorRequest(ref=ref)))
    if form:
        click.echo(json.dumps(MessageToDict(report, always_print_fields_with_no_presence=True), indent=2))
    else:
        click.echo(shown(report))
    if any(each.severity == Diagnosis.BROKEN for each in report.diagnoses):
        sys.exit(1)


def _followed(replies: Iterator[DoctorReply]) -> DoctorReport:
    started_s = time.monotonic()
    for reply in replies:
        if reply.HasField("report"):
            return reply.report
        if time.monotonic() - started_s > QUIET_S:
            click.echo(progress_line(reply.progress), err=True)
    raise Failure("the manager ended the examination without a report: try again")


def progress_line(progress: DoctorProgress) -> str:
    return f"{progress.tried} of {progress.probes} probes, {progress.answered} of {progress.nodes} nodes done"


def shown(report: DoctorReport) -> str:
    """The checks as a table, then each finding with its cause and remedy."""
    rows = [[each.name, str(each.passed), str(each.failed), str(each.unknown)] for each in report.checks]
    lines = [align([["CHECK", "PASSED", "FAILED", "UNKNOWN"], *rows])]
    for each in report.diagnoses:
        severity = Diagnosis.Severity.Name(each.severity).lower()
        lines.append(f"\n{severity}: {each.subject}: {each.what}")
        lines += [f"  why:   {each.why}"] if each.why else []
        lines.append(f"  mend:  {each.remedy}")
    broken = sum(each.severity == Diagnosis.BROKEN for each in report.diagnoses)
    lines.append(f"\n{broken} broken" if broken else "\nhealthy")
    return "\n".join(lines)
