"""The part of Go's text/template that people use with --format. Pure.

`{{.Spec.Name}}`, `{{json .Spec}}`, `{{range .X}}...{{else}}...{{end}}`, `{{if .X}}...{{end}}`, `{{len .X}}`,
`{{index .Labels "a"}}`, `{{join .X ","}}`, parentheses and `|`. Variables, `with` and user templates
are not part of it; using them is an error, not an empty string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from swarm.errors import Invalid

_ACTION = re.compile(r"(\s*)\{\{(-\s)?\s*(.*?)\s*(\s-)?\}\}(\s*)", re.DOTALL)
_TOKEN = re.compile(r"""\s*(\(|\)|\||"(?:\\.|[^"\\])*"|`[^`]*`|-?\d+|(?:\.[A-Za-z_]\w*)+|\.|[A-Za-z]\w*)""")

Eval = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Show:
    value: Eval


@dataclass(frozen=True, slots=True)
class Block:
    """`range` repeats its body for each element, `if` shows it once; both may have an `else`."""

    word: str
    value: Eval
    body: tuple[Node, ...]
    other: tuple[Node, ...]


Node = Text | Show | Block


class Template:
    """A parsed template. Raises Invalid, quoting the source, when it cannot be parsed or evaluated."""

    def __init__(self, source: str) -> None:
        self.source = source
        # As docker does: a shell passes \t and \n literally.
        self._pieces = _split(source.replace("\\t", "\t").replace("\\n", "\n"))
        self._position = 0
        self._nodes, ended_by = self._parse()
        if ended_by:
            raise self._error(f"unexpected {{{{{ended_by}}}}}")

    def render(self, data: Any) -> str:
        try:
            return _render(self._nodes, data)
        except Invalid as error:
            raise self._error(str(error)) from None

    def _error(self, why: str) -> Invalid:
        return Invalid(f"template {self.source!r}: {why}")

    def _parse(self) -> tuple[tuple[Node, ...], str]:
        """Nodes up to the end or to an `else` or `end`, and that word."""
        nodes: list[Node] = []
        while self._position < len(self._pieces):
            is_action, piece = self._pieces[self._position]
            self._position += 1
            word, _, rest = piece.partition(" ")
            if not is_action:
                nodes.append(Text(piece))
            elif word in ("end", "else"):
                return tuple(nodes), word
            elif word in ("range", "if"):
                nodes.append(self._block(word, rest))
            elif not piece.startswith("/*"):
                nodes.append(Show(self._expression(piece)))
        return tuple(nodes), ""

    def _block(self, word: str, rest: str) -> Block:
        value = self._expression(rest)
        body, ended_by = self._parse()
        other: tuple[Node, ...] = ()
        if ended_by == "else":
            other, ended_by = self._parse()
        if ended_by != "end":
            raise self._error(f"{{{{{word}}}}} without {{{{end}}}}")
        return Block(word, value, body, other)

    def _expression(self, text: str) -> Eval:
        tokens: list[str] = []
        position = 0
        while position < len(text.rstrip()):
            match = _TOKEN.match(text, position)
            if match is None:
                raise self._error(f"cannot read {text[position:]!r}")
            tokens.append(match[1])
            position = match.end()
        value = self._pipeline(tokens)
        if tokens:
            raise self._error(f"unexpected {tokens[0]!r}")
        return value

    def _pipeline(self, tokens: list[str]) -> Eval:
        value = self._command(tokens, None)
        while tokens and tokens[0] == "|":
            tokens.pop(0)
            value = self._command(tokens, value)
        return value

    def _command(self, tokens: list[str], piped: Eval | None) -> Eval:
        if not tokens:
            raise self._error("missing value")
        if not tokens[0][0].isalpha() or tokens[0] in ("true", "false", "nil"):
            if piped is not None:
                raise self._error("a value cannot receive a pipe")
            return self._term(tokens)
        name = tokens.pop(0)
        function = FUNCTIONS.get(name)
        if function is None:
            raise self._error(f"function {name!r} is not defined; known: {', '.join(sorted(FUNCTIONS))}")
        arguments: list[Eval] = []
        while tokens and tokens[0] not in ("|", ")"):
            arguments.append(self._term(tokens))
        if piped is not None:
            arguments.append(piped)
        return lambda data: _call(name, function, [argument(data) for argument in arguments])

    def _term(self, tokens: list[str]) -> Eval:
        token = tokens.pop(0)
        if token == "(":
            inner = self._pipeline(tokens)
            if not tokens or tokens.pop(0) != ")":
                raise self._error("missing )")
            if tokens and len(tokens[0]) > 1 and tokens[0][0] == ".":
                path = tokens.pop(0)
                return lambda data: _walk(inner(data), path)
            return inner
        if token[0] == ".":
            return lambda data: _walk(data, token)
        if token in ("true", "false", "nil"):
            constant = {"true": True, "false": False, "nil": None}[token]
            return lambda _: constant
        if token[0] in '"`':
            literal = json.loads(token) if token[0] == '"' else token[1:-1]
            return lambda _: literal
        if re.fullmatch(r"-?\d+", token):
            return lambda _: int(token)
        raise self._error(f"unexpected {token!r}")


def _split(source: str) -> list[tuple[bool, str]]:
    """(is an action, its text) in order; `{{-` and `-}}` swallow the white space beside them."""
    pieces: list[tuple[bool, str]] = []
    position = 0
    for match in _ACTION.finditer(source):
        before, trim_left, inside, trim_right, after = match.groups()
        text = source[position : match.start()] + ("" if trim_left else before)
        if text:
            pieces.append((False, text))
        pieces.append((True, inside))
        position = match.end() if trim_right else match.end() - len(after)
    if source[position:]:
        pieces.append((False, source[position:]))
    return pieces


def _walk(value: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        if not isinstance(value, Mapping):
            raise Invalid(f"can't evaluate field {name} in {_text(value)!r}")
        if name not in value:
            raise Invalid(f"there is no field {name}; known: {', '.join(map(str, value)) or 'none'}")
        value = value[name]
    return value


def _render(nodes: tuple[Node, ...], data: Any) -> str:
    out: list[str] = []
    for node in nodes:
        match node:
            case Text(text):
                out.append(text)
            case Show(value):
                out.append(_text(value(data)))
            case Block("range", value, body, other):
                found = value(data) or ()
                elements = [found[key] for key in sorted(found)] if isinstance(found, Mapping) else list(found)
                out.extend(_render(body, element) for element in elements)
                if not elements:
                    out.append(_render(other, data))
            case Block(_, value, body, other):
                out.append(_render(body if value(data) else other, data))
    return "".join(out)


def _text(value: Any) -> str:
    """As Go prints values."""
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "map[" + " ".join(f"{key}:{_text(value[key])}" for key in sorted(value)) + "]"
    if isinstance(value, list | tuple):
        return "[" + " ".join(map(_text, value)) + "]"
    return str(value)


def _call(name: str, function: Callable[..., Any], arguments: list[Any]) -> Any:
    try:
        return function(*arguments)
    except (TypeError, LookupError, ValueError, AttributeError) as error:
        raise Invalid(f"{name}: {error}") from None


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = value.get(key, "") if isinstance(value, Mapping) else value[key]
    return value


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "json": lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")),
    "join": lambda items, separator: separator.join(map(_text, items)),
    "split": lambda text, separator: text.split(separator),
    "index": _index,
    "len": len,
    "upper": str.upper,
    "lower": str.lower,
    "title": str.title,
    "truncate": lambda text, length: text[:length],
    "print": lambda *values: "".join(map(_text, values)),
    "println": lambda *values: " ".join(map(_text, values)) + "\n",
    "eq": lambda value, *others: value in others,
    "ne": lambda value, other: value != other,
    "not": lambda value: not value,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
}
