"""Logs: parsing, counting from the end, rotation without lost lines, following; pure and with a real conmon."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.inotify import Inotify
from node.interface import ResolvedImage
from node.logrotate import REOPEN_PATIENCE_S, rotate, rotation
from node.logs import Entry, parse, parse_time, read_log
from proto.dispatch_pb2 import LogLine, LogOptions
from tests.containers import Host, agent_namespace, host_in, load_tool_image, scratch_directory
from tests.waiting import until


def entry(number: int, text: str, stream: str = "stdout", mark: str = "F") -> str:
    return f"2026-11-23T21:00:{number % 60:02d}.500000000+00:00 {stream} {mark} {text}\n"


async def read(log: Path, **options: object) -> list[LogLine]:
    wanted = LogOptions(**{"tail": -1, **options})  # type: ignore[arg-type]
    return [line async for line in read_log("t1", log, wanted, Inotify(), lambda: True)]


async def texts(log: Path, **options: object) -> list[str]:
    return [line.data.decode() for line in await read(log, **options)]


def test_a_line_of_conmon_is_parsed() -> None:
    line = b"2026-11-23T21:06:37.184345131+00:00 stderr P  two words "
    assert parse(line) == Entry(1795467997.184345131, True, True, b" two words ")


@pytest.mark.parametrize("line", [b"", b"torn", b"2026 stdout F x", b"2026-11-23T21:06:37Z stdin F x"])
def test_a_torn_line_is_skipped(line: bytes) -> None:
    assert parse(line) is None


def test_times_with_another_zone() -> None:
    assert parse_time("2026-11-23T22:06:37.5+01:00") == parse_time("2026-11-23T21:06:37.5Z")


async def test_pieces_are_joined_per_stream_and_an_unfinished_line_is_not_lost(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        entry(0, "a", mark="P") + entry(1, "err", "stderr") + entry(2, "b") + entry(3, "c") + entry(4, "end", mark="P")
    )
    assert await texts(log) == ["err", "ab", "c", "end"]
    assert await texts(log, stderr=True) == ["err"]
    assert await texts(log, tail=1, stdout=True) == ["end"]
    assert await texts(log, tail=2, stdout=True) == ["c", "end"]
    assert await texts(log, tail=3, stdout=True) == ["ab", "c", "end"]


async def test_since_leaves_out_older_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(entry(number, str(number)) for number in range(10)))
    assert await texts(log, since=parse_time("2026-11-23T21:00:07Z")) == ["7", "8", "9"]


@given(
    lines=st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=3),
    tail=st.integers(-1, 70),
)
def test_tail_gives_exactly_the_last_lines_over_all_files(
    lines: list[tuple[int, bool]], cuts: list[int], tail: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However lines are spread over rotated files, and however long they are."""
    directory = tmp_path_factory.mktemp("tail")
    texts_ = [f"{number}:" + "x" * (size * 7) for number, (size, _) in enumerate(lines)]
    entries = [entry(n, text, "stderr" if lines[n][1] else "stdout") for n, text in enumerate(texts_)]
    edges = [0, *sorted(min(cut, len(lines)) for cut in cuts), len(lines)]
    parts = [entries[a:b] for a, b in itertools.pairwise(edges)]
    for age, part in enumerate(reversed(parts)):
        (directory / ("log" if age == 0 else f"log.{age}")).write_text("".join(part))

    got = asyncio.run(texts(directory / "log", tail=tail))
    assert got == (texts_ if tail < 0 else texts_[len(texts_) - min(tail, len(texts_)) :])


@pytest.mark.parametrize(
    ("size", "missing_s", "files", "steps"),
    [
        (99, 0, 3, []),
        (100, 0, 3, ["shift1", "rename", "reopen"]),
        (100, 0, 2, ["rename", "reopen"]),
        (100, 0, 1, ["rename", "reopen", "drop1"]),
        (None, 1, 3, []),  # being reopened: a second request would replace the new file
        (None, 10, 3, ["reopen"]),
    ],
)
def test_rotation_steps(size: int | None, missing_s: float, files: int, steps: list[str]) -> None:
    assert [action + suffix for action, suffix in rotation(size, missing_s, 100, files)] == steps


@pytest.fixture(scope="module")
def ground() -> Iterator[tuple[Path, ResolvedImage]]:
    with scratch_directory() as directory:
        image = asyncio.run(load_tool_image(directory))
        with agent_namespace(directory / "run"):
            yield directory, image


@pytest.fixture
async def host(ground: tuple[Path, ResolvedImage]) -> AsyncIterator[Host]:
    async with host_in(*ground) as host:
        yield host


@pytest.mark.root
async def test_output_and_errors_of_a_container_are_told_apart(host: Host) -> None:
    await host.started("t1", shell="echo out; echo err >&2; printf unfinished")
    await host.runtime.wait("t1")
    assert await host.lines("t1", stdout=True) == ["out", "unfinished"]
    assert await host.lines("t1", stderr=True) == ["err"]
    assert sorted(await host.lines("t1")) == ["err", "out", "unfinished"]


@pytest.mark.root
async def test_following_through_rotations_loses_nothing_and_ends_with_the_container(host: Host) -> None:
    """Each rotation comes while the container writes; it goes on to the next round only after that."""
    rounds, each = 5, 4_000
    write = f"while [ $i -lt $((r*{each})) ]; do echo line $i; i=$((i+1)); done"
    shell = f"i=0; for r in $(seq {rounds}); do {write}; until [ -e /tmp/go$r ]; do sleep 0.01; done; done"
    await host.started("t1", shell=shell, log_max_bytes=50_000, log_max_files=90)
    following = asyncio.create_task(host.lines("t1", follow=True))
    for number in range(1, rounds + 1):
        await until(lambda: _rotates(host))
        await host.runtime.rotate_logs()
        assert (await host.runtime.exec("t1", ["touch", f"/tmp/go{number}"], 20.0))[0] == 0
    written = [f"line {number}" for number in range(rounds * each)]
    assert await following == written
    assert (host.state / f"tasks/t1/logs/log.{rounds}").exists()
    assert await host.lines("t1") == written


def _rotates(host: Host) -> bool:
    log = host.state / "tasks/t1/logs/log"
    return log.exists() and log.stat().st_size > 50_000


@pytest.mark.root
async def test_following_ends_when_the_task_is_removed(host: Host) -> None:
    await host.started("t1", shell="echo up; exec sleep 100")
    following = asyncio.create_task(host.lines("t1", follow=True))
    await until(lambda: (host.state / "tasks/t1/logs/log").stat().st_size)
    await host.runtime.remove("t1")
    async with asyncio.timeout(10):
        assert await following in (["up"], [])


@pytest.mark.root
async def test_rotation_bounds_the_disk_that_a_log_takes(host: Host) -> None:
    shell = "while :; do echo some words that fill the log; done"
    await host.started("t1", shell=shell, log_max_bytes=10_000, log_max_files=2)
    logs = host.state / "tasks/t1/logs"
    rotations = 0
    while rotations < 5:
        await until(lambda: (logs / "log").exists() and (logs / "log").stat().st_size > 10_000)
        await host.runtime.rotate_logs()
        rotations += 1
    await until((logs / "log").exists)
    assert {path.name for path in logs.iterdir()} == {"log", "log.1"}


@pytest.mark.root
async def test_a_rotation_that_was_cut_short_is_finished_by_the_next(host: Host) -> None:
    await host.started("t1", shell="read x; echo one; while :; do sleep 0.05; echo two; done")
    log = host.state / "tasks/t1/logs/log"
    await until(log.exists)
    log.rename(log.with_name("log.1"))  # and then the agent was killed
    rotate(log, log.parent.parent / "ctl", 1000, 3, missing_s=REOPEN_PATIENCE_S)
    await until(log.exists)
    await until(lambda: "two" in log.read_text())
    assert (await host.lines("t1"))[0] == "one"


async def test_rotating_the_log_of_a_dead_monitor_does_not_wait(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("x" * 100)
    os.mkfifo(tmp_path / "ctl")
    assert not rotate(tmp_path / "log", tmp_path / "ctl", 10, 2)
    assert (tmp_path / "log.1").exists()
