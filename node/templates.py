"""The subset of Go templates that services may use in env, hostname and mounts: `{{.Task.Slot}}`,
`{{.Service.Name}}`, `{{.Node.Hostname}}`, `{{index .Service.Labels "zone"}}` and the like. Anything else between
braces is refused by name: a typo must not become a literal environment variable."""

from __future__ import annotations

import re
from collections.abc import Mapping

from node.interface import RuntimeFault
from proto.objects_pb2 import ContainerSpec, NodeDescription, Task

_EXPRESSION = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}", re.DOTALL)
_INDEX = re.compile(r'index\s+\.(Service|Node)\.Labels\s+"([^"]*)"')


def task_name(task: Task) -> str:
    """`<service>.<slot>.<task ID>`; tasks of global services carry the node's ID in place of the slot."""
    return f"{task.service_annotations.name}.{task.slot or task.node_id}.{task.id}"


def values_for(task: Task, node: NodeDescription, node_labels: Mapping[str, str]) -> dict[str, str]:
    """Expression -> value, for one task on this node."""
    values = {
        ".Service.ID": task.service_id,
        ".Service.Name": task.service_annotations.name,
        ".Node.ID": task.node_id,
        ".Node.Hostname": node.hostname,
        ".Node.Platform.OS": node.platform.os,
        ".Node.Platform.Architecture": node.platform.architecture,
        ".Task.ID": task.id,
        ".Task.Name": task_name(task),
        ".Task.Slot": str(task.slot) if task.slot else task.node_id,
    }
    for kind, labels in (("Service", task.service_annotations.labels), ("Node", node_labels)):
        values[f".{kind}.Labels"] = f"map[{' '.join(f'{key}:{labels[key]}' for key in sorted(labels))}]"  # as Go prints
        for key, value in labels.items():
            values[f".{kind}.Labels.{key}"] = value
    return values


def expand(text: str, values: Mapping[str, str], field: str) -> str:
    """`text` with its templates replaced. Raises RuntimeFault naming the expression and the field."""
    if "{{" not in text:
        return text

    def replaced(match: re.Match[str]) -> str:
        expression = match.group(1)
        index = _INDEX.fullmatch(expression)
        if index is not None:
            return values.get(f".{index.group(1)}.Labels.{index.group(2)}", "")
        if expression.startswith((".Service.Labels.", ".Node.Labels.")):
            return values.get(expression, "")  # as Go's map lookup: an absent label is empty
        try:
            return values[expression]
        except KeyError:
            known = ", ".join(sorted(key for key in values if ".Labels." not in key))
            raise RuntimeFault(f"template {match.group(0)} in {field} is not known; known are {known}") from None

    return _EXPRESSION.sub(replaced, text)


def expanded(spec: ContainerSpec, values: Mapping[str, str]) -> ContainerSpec:
    """A copy with env, hostname and mounts expanded. Raises RuntimeFault."""
    copy = ContainerSpec()
    copy.CopyFrom(spec)
    copy.env[:] = [expand(entry, values, f"env {entry.partition('=')[0]}") for entry in spec.env]
    copy.hostname = expand(spec.hostname, values, "hostname")
    for mount in copy.mounts:
        mount.source = expand(mount.source, values, f"mount source of {mount.target}")
        mount.target = expand(mount.target, values, f"mount target {mount.target}")
    return copy
