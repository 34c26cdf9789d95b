"""One line of `service logs`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proto.dispatch_pb2 import LogLine
from proto.objects_pb2 import Task
from swarm.cli.rows import ID_SHORT
from swarm.cli.units import format_time


@dataclass(frozen=True, slots=True)
class LogFormat:
    timestamps: bool = False
    raw: bool = False
    no_trunc: bool = False
    no_task_ids: bool = False
    no_resolve: bool = False


def format_line(line: LogLine, task: Task, node_names: Mapping[str, str], form: LogFormat) -> bytes:
    """ "wpinst.3.q7xk2v9m1c0b@w1    | text", as Docker; `raw` only the text. Bytes pass unchanged."""
    stamp = format_time(line.timestamp).encode() + b" " if form.timestamps else b""
    text = line.data.removesuffix(b"\n")
    if form.raw:
        return stamp + text
    return stamp + _source(line, task, node_names, form).encode() + b"    | " + text


def _source(line: LogLine, task: Task, node_names: Mapping[str, str], form: LogFormat) -> str:
    node_id = line.node_id or task.node_id
    name = task.service_id if form.no_resolve else task.service_annotations.name
    parts = [name, str(task.slot or node_id)] if name else []
    if not form.no_task_ids or not name:
        parts.append(line.task_id if form.no_trunc else line.task_id[:ID_SHORT])
    return f"{'.'.join(parts)}@{node_names.get(node_id, node_id)}"
