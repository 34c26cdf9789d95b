"""Which templates a spec may hold. Nodes expand them (node/templates.py, which has the values); a typo is refused here,
before every task of the service would be rejected."""

from __future__ import annotations

import re

KNOWN = (
    ".Service.ID",
    ".Service.Name",
    ".Service.Labels",
    ".Node.ID",
    ".Node.Hostname",
    ".Node.Platform.OS",
    ".Node.Platform.Architecture",
    ".Node.Labels",
    ".Task.ID",
    ".Task.Name",
    ".Task.Slot",
)
_EXPRESSION = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}", re.DOTALL)
_LABEL = re.compile(r'\.(Service|Node)\.Labels\.\S+|index\s+\.(Service|Node)\.Labels\s+"[^"]*"')


def unknown_in(text: str) -> str:
    """The first template in `text` that no node can expand; "" = none."""
    for match in _EXPRESSION.finditer(text):
        expression = match.group(1)
        if not _LABEL.fullmatch(expression) and expression not in KNOWN:
            return match.group(0)
    return ""
