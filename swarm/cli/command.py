"""What the commands share: Go-style boolean flags, listing options, and partial failures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import click

from swarm.cli.failure import Failure
from swarm.cli.listing import Row, render
from swarm.cli.template import Template
from swarm.cli.units import parse_bool
from swarm.errors import Invalid

F = TypeVar("F", bound=Callable[..., Any])


class GoCommand(click.Command):
    """Accepts --flag=true and --flag=false for switches, as Docker's command does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest, values = split_switches(args, *self._option_kinds(), self.allow_interspersed_args)
        result = super().parse_args(ctx, rest)
        ctx.params.update(values)
        return result

    def _option_kinds(self) -> tuple[dict[str, str], frozenset[str]]:
        """(spelling of a switch -> its parameter, spellings of options that take a value)."""
        switches: dict[str, str] = {}
        valued: set[str] = set()
        for param in self.params:
            if isinstance(param, click.Option) and param.is_flag and param.name:
                switches |= dict.fromkeys(param.opts, param.name)
            elif isinstance(param, click.Option):
                valued.update(param.opts)
        return switches, frozenset(valued)


def split_switches(
    args: Sequence[str], switches: Mapping[str, str], valued: Iterable[str], interspersed: bool
) -> tuple[list[str], dict[str, bool]]:
    """Take `--switch=BOOL` out of the arguments: (the others, parameter -> value). Pure.
    Stops at "--" and, unless `interspersed`, at the first positional argument."""
    rest: list[str] = []
    values: dict[str, bool] = {}
    position = 0
    while position < len(args):
        argument = args[position]
        if argument == "--" or (not argument.startswith("-") and not interspersed):
            break
        option, equals, value = argument.partition("=")
        if equals and option in switches:
            try:
                values[switches[option]] = parse_bool(value)
            except Invalid as error:
                raise Invalid(f'invalid value "{value}" for {option}: {error}') from None
        else:
            rest.append(argument)
            if argument in valued and position + 1 < len(args):
                position += 1
                rest.append(args[position])
        position += 1
    return [*rest, *args[position:]], values


def command(group: click.Group, name: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Register a command of a group."""
    return group.command(name, cls=GoCommand, **settings)


def listing_options(*, no_trunc: bool = True, filters: str = "") -> Callable[[F], F]:
    """--format, --quiet, and where they apply --no-trunc and --filter (`filters`: its keys)."""

    def decorate(function: F) -> F:
        wrapped: Any = function
        if filters:
            wrapped = click.option(
                "--filter", "-f", "filters", multiple=True, metavar="KEY=VALUE", help=f"Show only: {filters}."
            )(wrapped)
        if no_trunc:
            wrapped = click.option("--no-trunc", is_flag=True, help="Do not shorten output.")(wrapped)
        wrapped = click.option("--quiet", "-q", is_flag=True, help="Only IDs.")(wrapped)
        result: F = click.option(
            "--format", "form", metavar="FORMAT", help="table, json, or a Go template such as '{{.ID}}'."
        )(wrapped)
        return result

    return decorate


def show_rows(rows: Sequence[Row], columns: Mapping[str, str], form: str | None, quiet: bool, key: str = "ID") -> None:
    """Print a listing."""
    text = "\n".join(row[key] for row in rows) if quiet and not form else render(rows, columns, form)
    if text:
        click.echo(text)


def parse_filters(texts: Iterable[str], known: Iterable[str]) -> dict[str, list[str]]:
    """KEY=VALUE of --filter; a key may come several times. Raises Invalid."""
    names = tuple(known)
    filters: dict[str, list[str]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise Invalid(f'invalid value "{text}" for --filter: write KEY=VALUE')
        if key not in names:
            raise Invalid(f'invalid filter "{key}": known here are {", ".join(names)}')
        filters.setdefault(key, []).append(value)
    return filters


def label_filter(values: Iterable[str]) -> dict[str, str]:
    """ "zone" (any value) or "zone=a" as a map for the API."""
    return dict(value.partition("=")[::2] for value in values)


def inspect_all(refs: Sequence[str], find: Callable[[str], Any], form: str | None, pretty: Any = None) -> None:
    """Print each object as JSON (a list), by template (one each), or by `pretty`; what is missing
    is told at the end and makes the exit status 1."""
    from json import dumps

    found: list[Any] = []
    failures: list[str] = []
    for ref in refs:
        try:
            found.append(find(ref))
        except Failure as failure:
            failures.append(failure.message)
    if pretty is not None:
        click.echo("\n".join(pretty(item) for item in found))
    elif form and form != "json":
        template = Template(form)
        for item in found:
            click.echo(template.render(item))
    elif form == "json":
        for item in found:
            click.echo(dumps(item, ensure_ascii=False, separators=(",", ":")))
    else:
        click.echo(dumps(found, ensure_ascii=False, indent=4))
    finish(failures)


def for_each(refs: Sequence[str], act: Callable[[str], str]) -> None:
    """Do it to each, print what `act` returns; failures are told and make the exit status 1."""
    failures: list[str] = []
    for ref in refs:
        try:
            click.echo(act(ref))
        except Failure as failure:
            failures.append(failure.message)
    finish(failures)


def finish(failures: Sequence[str]) -> None:
    """Raise one Failure that tells all, if there are any."""
    if failures:
        raise Failure("\nError: ".join(failures))


def given(params: Mapping[str, Any]) -> dict[str, Any]:
    """click's parameters without those the user left out; names as on the command line.
    A switch counts as given when it is not None, so that --read-only=false can switch off."""
    return {name.replace("_", "-"): value for name, value in params.items() if value is not None and value != ()}
