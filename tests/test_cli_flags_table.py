"""docs/service-flags.md is true: it names every flag that is offered or refused, and all of Docker's are among them."""

from __future__ import annotations

import re
from pathlib import Path

from swarm.cli import flags

TABLE = Path(__file__).parents[1] / "docs" / "service-flags.md"
DOCKERS = """
    name mode replicas max-concurrent replicas-max-per-node constraint placement-pref label container-label env env-file
    mount network publish endpoint-mode secret config hostname host dns dns-option dns-search user group workdir
    entrypoint init tty read-only stop-signal stop-grace-period isolation credential-spec cap-add cap-drop ulimit sysctl
    oom-score-adj limit-cpu limit-memory limit-pids reserve-cpu reserve-memory memory-swap memory-swappiness
    generic-resource restart-condition restart-delay restart-max-attempts restart-window update-parallelism
    update-delay update-monitor update-failure-action update-max-failure-ratio update-order rollback-parallelism
    rollback-delay rollback-monitor rollback-failure-action rollback-max-failure-ratio rollback-order health-cmd
    health-interval health-timeout health-retries health-start-period health-start-interval no-healthcheck
    log-driver log-opt with-registry-auth no-resolve-image detach quiet image args force rollback
"""
"""Docker 28, `docker service create --help` and `update --help` (cli/command/service/opts.go)."""


def rows() -> dict[str, tuple[str, str]]:
    found = re.findall(r"^\| `--([a-z-]+)` \| ([^|]+) \| ([^|]+) \|", TABLE.read_text(), re.MULTILINE)
    return {name: (create.strip(), update.strip()) for name, create, update in found}


def test_every_flag_of_dockers_is_in_the_table() -> None:
    assert set(DOCKERS.split()) <= rows().keys()


def test_the_table_says_what_the_commands_do() -> None:
    lists = {flag.name for flag in flags.LISTS}
    create = {flag.name for flag in flags.CREATE}
    update = {flag.name for flag in flags.UPDATE} - {f"{name}-{form}" for name in lists for form in ("add", "rm")}
    for name, (created, updated) in rows().items():
        assert (created == "yes") == (name in create), name
        assert (created == "refused") == (name in flags.REFUSED_CREATE), name
        assert (updated == "-add, -rm") == (name in lists), name
        assert (updated == "yes") == (name in update), name
    refused = {name.removesuffix("-add").removesuffix("-rm") for name in flags.REFUSED_UPDATE}
    assert create | update | lists | refused | flags.REFUSED_CREATE.keys() == rows().keys()
