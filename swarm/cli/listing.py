"""Rows to text: Docker's aligned tables, one JSON object per line, or a template per row. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from swarm.cli.template import Template
from swarm.errors import Invalid

COLUMN_MIN = 10
COLUMN_GAP = 3
"""As docker's tab writer: a column is at least 10 wide and 3 wider than its content."""

Row = Mapping[str, str]
_FIELD = re.compile(r"\{\{-?\s*(?:\w+\s+)?\.(\w+)\s*-?\}\}")
_HEADERS = {"NetworkID": "NETWORK ID", "TLSStatus": "TLS STATUS"}


def header(field: str) -> str:
    """ "CurrentState" -> "CURRENT STATE"."""
    return _HEADERS.get(field) or re.sub(r"(?<=[a-z])(?=[A-Z])", " ", field).upper()


def render(rows: Sequence[Row], columns: Mapping[str, str], form: str | None) -> str:
    """The listing as text, without a last newline. `columns`: field -> heading of the default table.
    `form`: None or "table", "json", "table TEMPLATE" or TEMPLATE. Raises Invalid."""
    if form in (None, "", "table"):
        return align([list(columns.values()), *([row[field] for field in columns] for row in rows)])
    assert form is not None
    if form == "json":
        return "\n".join(json.dumps(dict(row), ensure_ascii=False) for row in rows)
    if form.startswith("table "):
        source = form.removeprefix("table ").strip()
        template = Template(source)
        headings = _FIELD.sub(lambda match: columns.get(match[1]) or header(match[1]), source).replace("\\t", "\t")
        return align([line.split("\t") for line in [headings, *(template.render(row) for row in rows)]])
    if "{{" not in form:
        raise Invalid(f'--format "{form}" is not known: use table, json, or a template such as {{{{.ID}}}}')
    template = Template(form)
    return "\n".join(template.render(row) for row in rows)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns; the last cell of a line is not padded."""
    widths = [0] * max(len(line) for line in lines)
    for line in lines:
        for index, cell in enumerate(line[:-1]):
            widths[index] = max(widths[index], COLUMN_MIN, len(cell) + COLUMN_GAP)
    return "\n".join(
        "".join(cell.ljust(width) for cell, width in zip(line, [*widths[: len(line) - 1], 0], strict=True)).rstrip()
        for line in lines
    )
