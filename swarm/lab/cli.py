"""`pyswarm lab ...`: clusters of hosts on one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import click

from swarm.cli.generic import parse_offered
from swarm.lab import hosts as lab_hosts
from swarm.lab import lab as labs
from swarm.lab.plan import DEFAULT_NAME, Plan
from swarm.lab.shell import LabError

T = TypeVar("T")
_PASS_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@click.group()
def lab() -> None:
    """Clusters of real hosts on this machine, each in its own network namespace.

    \b
    pyswarm lab up --managers 3 --workers 2
    pyswarm lab exec m1 -- pyswarm node ls
    pyswarm lab down
    """
    if os.geteuid() != 0:
        raise click.ClickException("a lab makes network namespaces: run it as root")


def _lab_and_rest(words: Sequence[str]) -> tuple[Plan, list[str]]:
    """The optional lab name that may come before the other words."""
    if words and words[0] in labs.names() and labs.load(words[0]).host(words[0]) is None:
        return labs.load(words[0]), list(words[1:])
    return labs.load(DEFAULT_NAME), list(words)


def _print_nodes(plan: Plan) -> None:
    """`node ls` as the first manager answers it."""
    manager = next(host for host in plan.hosts if host.manager)
    subprocess.run(
        [sys.executable, "-m", "swarm.cli.main", "-H", f"unix://{manager.socket}", "node", "ls"], check=False
    )


@lab.command()
@click.argument("name", default=DEFAULT_NAME)
@click.option("--managers", default=3, show_default=True, help="Hosts m1, m2, ... that replicate the swarm's state.")
@click.option("--workers", default=2, show_default=True, help="Hosts w1, w2, ... that only run tasks.")
@click.option(
    "--insecure-registry", "insecure", multiple=True, metavar="HOST[:PORT]",
    help="Registry that every host speaks to unverified.",
)  # fmt: skip
@click.option(
    "--node-generic-resource", "generic", multiple=True, metavar="KIND=VALUE",
    help="What tasks may reserve on every host, such as gpu=2.",
)  # fmt: skip
def up(name: str, managers: int, workers: int, insecure: tuple[str, ...], generic: tuple[str, ...]) -> None:
    """Make a lab, or complete it: run again, it changes nothing that is right."""
    parse_offered(generic, "node-generic-resource")  # every daemon would refuse it, in a log that nobody watches

    def say(line: str) -> None:
        click.echo(line, err=True)

    _guard(lambda: labs.up(name, managers, workers, say, insecure_registries=insecure, generic_resources=generic))
    _print_nodes(labs.load(name))


@lab.command()
@click.argument("name", required=False)
def down(name: str | None) -> None:
    """Remove a lab: no process, namespace, mount, link, rule, cgroup or file of it is left."""
    _guard(lambda: labs.down(name or DEFAULT_NAME))


@lab.command("load")
@click.option("-i", "--input", "archive", required=True, type=click.Path(exists=True, dir_okay=False), help="Archive.")
def load_image(archive: str) -> None:
    """Load an image archive into the machine's store, which every host of every lab reads."""
    for name in _guard(lambda: labs.load_image(Path(archive))):
        click.echo(f"Loaded image: {name}")


@lab.command("ls")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="Names only.")
def list_labs(form: str, quiet: bool) -> None:
    """List the labs of this machine."""
    rows: list[dict[str, object]] = [
        {"Name": name, "Subnet": plan.subnet, "Hosts": len(plan.hosts)} for name, plan in _all_labs()
    ]
    _print_rows(rows, form, quiet, "Name")


def _all_labs() -> list[tuple[str, Plan]]:
    return [(name, labs.load(name)) for name in labs.names()]


@lab.command()
@click.argument("name", required=False)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="Names of hosts only.")
def status(name: str | None, form: str, quiet: bool) -> None:
    """Show the hosts of a lab."""
    plan = _guard(lambda: labs.load(name or DEFAULT_NAME))
    rows: list[dict[str, object]] = []
    for host in plan.hosts:
        power = "on" if host.netns_path.exists() else "off"
        daemon = "running" if power == "on" and lab_hosts.daemon_pids(host) else "down"
        row: dict[str, object] = {
            "Host": host.name,
            "Address": host.address,
            "Role": "manager" if host.manager else "worker",
        }
        rows.append({**row, "Power": power, "Daemon": daemon, "Log": str(host.log)})
    _print_rows(rows, form, quiet, "Host")


def _print_rows(rows: Sequence[dict[str, object]], form: str, quiet: bool, key: str) -> None:
    if quiet:
        for row in rows:
            click.echo(row[key])
    elif form == "json":
        for row in rows:
            click.echo(json.dumps(row))
    elif rows:
        columns = list(rows[0])
        widths = [max(len(column), *(len(str(row[column])) for row in rows)) + 3 for column in columns]
        for cells in [columns, *([str(row[column]) for column in columns] for row in rows)]:
            text = "".join(
                str(cell).upper().ljust(width) if cells is columns else str(cell).ljust(width)
                for cell, width in zip(cells, widths, strict=True)
            )
            click.echo(text.rstrip())


@lab.command("exec", context_settings=_PASS_ON)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[NAME] HOST -- COMMAND [ARG ...]")
def exec_(words: tuple[str, ...]) -> None:
    """Run a command as if on that host: its network, its hostname, its daemon."""
    plan, rest = _guard(lambda: _lab_and_rest(words))
    host = _guard(lambda: labs.find_host(plan, rest[0] if rest else ""))
    command = rest[2:] if rest[1:2] == ["--"] else rest[1:]
    if not command:
        raise click.UsageError("say what to run: pyswarm lab exec m1 -- COMMAND")
    if not host.netns_path.exists():
        raise click.ClickException(f"{host.name} is off: `pyswarm lab start {host.name}`")
    argv = [*lab_hosts.entering(host), *command]
    environment = {**os.environ, "PYSWARM_HOST": f"unix://{host.socket}"}
    # The command of this installation, also when its virtual environment is not on the caller's path.
    environment["PATH"] = (
        f"{os.path.dirname(sys.executable)}:{environment.get('PATH', '/usr/sbin:/usr/bin:/sbin:/bin')}"
    )
    os.execvpe(argv[0], argv, environment)


@lab.command()
@click.argument("words", nargs=-1, metavar="[NAME] HOST")
@click.option("--signal", "name", default="KILL", show_default=True, help="KILL, TERM, STOP, CONT, ...")
@click.option("--host", "whole", is_flag=True, help="The whole host, as a power cut: its containers as well.")
def kill(words: tuple[str, ...], name: str, whole: bool) -> None:
    """Signal a host's daemon processes; its containers stay."""
    plan, rest = _guard(lambda: _lab_and_rest(words))
    host = _guard(lambda: labs.find_host(plan, rest[0] if rest else ""))
    try:
        number = signal.Signals[f"SIG{name.removeprefix('SIG').upper()}"]
    except KeyError:
        raise click.ClickException(f"no such signal: {name}") from None
    if whole:
        _guard(lambda: lab_hosts.pull_plug(host))
        return
    _guard(lambda: lab_hosts.kill(lab_hosts.daemon_pids(host), number))


@lab.command()
@click.argument("words", nargs=-1, metavar="[NAME] HOST")
def start(words: tuple[str, ...]) -> None:
    """Start what `kill` ended."""
    plan, rest = _guard(lambda: _lab_and_rest(words))
    host = _guard(lambda: labs.find_host(plan, rest[0] if rest else ""))
    _guard(lambda: labs.start(plan, host))


@lab.command(context_settings=_PASS_ON)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[NAME] HOST,HOST -- HOST,HOST [-- ...]")
def partition(words: tuple[str, ...]) -> None:
    """Cut the network between groups of hosts, both ways."""
    plan, rest = _guard(lambda: _lab_and_rest(words))
    groups = [word.split(",") for word in rest if word != "--"]
    sides = _guard(lambda: [[labs.find_host(plan, name) for name in group] for group in groups])
    if len(sides) < 2:
        raise click.UsageError("name two sides at least: pyswarm lab partition m1,w1 -- m2,m3,w2")
    _guard(lambda: labs.partition(plan, sides))


@lab.command()
@click.argument("name", required=False)
def heal(name: str | None) -> None:
    """End a partition."""
    _guard(lambda: labs.heal(labs.load(name or DEFAULT_NAME)))


def _guard(action: Callable[[], T]) -> T:
    """Run it; a LabError becomes one line and exit status 1."""
    try:
        return action()
    except LabError as error:
        raise click.ClickException(str(error)) from None
