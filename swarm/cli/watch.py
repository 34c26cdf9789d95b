"""Waiting for a service to converge: follows Control.WatchService and draws progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING

import click

from proto.control_pb2 import WatchEvent, WatchRequest
from proto.objects_pb2 import Service, Task
from swarm.cli.client import Client
from swarm.cli.failure import ApiFailure, Failure
from swarm.cli.progress import STABLE_S, STEPS_ALL, Outcome, Progress, measure
from swarm.cli.retry import DELAY_MAX_S, FIRST_DELAY_S

if TYPE_CHECKING:
    from rich.console import RenderableType

LOST_MAX_S = 60.0
"""How long managers may be away before waiting ends: far beyond any election; then nobody leads."""
EVENTS_MAX = 1000
"""Events waiting to be drawn; the stream is held back beyond this."""
BAR_CHARACTERS = 50
SHOW_TASKS_S = 5.0
"""A plain log repeats what holds things up at most this often."""

Say = Callable[[str], None]


class Picture:
    """What the stream has told so far."""

    def __init__(self) -> None:
        self.service = Service()
        self.tasks: dict[str, Task] = {}
        self.nodes_eligible = 0
        self.removed = False

    def learn(self, event: WatchEvent) -> None:
        if event.snapshot:
            self.tasks.clear()
        if event.HasField("service"):
            self.service.CopyFrom(event.service)
        self.tasks.update((task.id, task) for task in event.tasks)
        for task_id in event.removed_task_ids:
            self.tasks.pop(task_id, None)
        self.nodes_eligible = event.nodes_eligible
        self.removed = event.service_removed or self.service.pending_delete


def wait_converged(client: Client, service_id: str, name: str, quiet: bool, rolling_back: bool = False) -> None:
    """Return once the service has been converged for STABLE_S. Ctrl-C leaves with a hint, the service
    goes on. Raises Failure when an update paused or was rolled back, or the service was removed."""
    try:
        with _display(quiet) as show:
            _follow(client, service_id, name, show, rolling_back)
    except KeyboardInterrupt:
        if not quiet:
            click.echo(
                f"Operation continuing in background.\nUse `pyswarm service ps {name}` to check progress.", err=True
            )
        return
    if not quiet:
        click.echo("verify: Service converged")


def _follow(client: Client, service_id: str, name: str, show: Display, rolling_back: bool) -> None:
    picture = Picture()
    stable_since_s: float | None = None
    for event in _events(client, service_id, name, show.say):
        now_s = time.monotonic()
        if event is not None:
            picture.learn(event)
            if picture.removed:
                raise Failure(f"service {name} was removed while waiting for it")
            progress = measure(picture.service, picture.tasks.values(), picture.nodes_eligible, rolling_back)
            show.draw(progress)
            if progress.outcome is Outcome.FAILED:
                raise Failure(progress.note)
            is_converged = progress.outcome is Outcome.CONVERGED
            stable_since_s = (stable_since_s or now_s) if is_converged else None
        if stable_since_s is not None and now_s - stable_since_s >= STABLE_S:
            return


def _events(client: Client, service_id: str, name: str, say: Say) -> Iterator[WatchEvent | None]:
    """Events for ever, and None whenever STABLE_S / 4 pass without one. A lost stream is opened anew,
    which is said once per loss; it begins with a snapshot, so nothing is missed."""
    lost_since_s: float | None = None
    pause_s = FIRST_DELAY_S
    while True:
        queue: Queue[WatchEvent | Exception] = Queue(EVENTS_MAX)
        Thread(target=_pump, args=(client, service_id, queue), daemon=True).start()
        failure: ApiFailure | None = None
        while failure is None:
            try:
                item = queue.get(timeout=STABLE_S / 4)
            except Empty:
                yield None
                continue
            if isinstance(item, WatchEvent):
                lost_since_s, pause_s = None, FIRST_DELAY_S
                yield item
            elif isinstance(item, ApiFailure) and item.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"):
                failure = item
            elif isinstance(item, ApiFailure) and item.code == "NOT_FOUND":
                raise Failure(f"service {name} was removed while waiting for it")
            else:
                raise item
        now_s = time.monotonic()
        if lost_since_s is None:
            lost_since_s = now_s
            say("lost the manager or its leader: connecting again (the service goes on meanwhile)")
        elif now_s - lost_since_s > LOST_MAX_S:
            raise Failure(
                f"no manager with a leader for {LOST_MAX_S:g} s ({failure.message}). The service's change is stored; "
                f"see `pyswarm service ps {name}` later"
            )
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, DELAY_MAX_S)


def _pump(client: Client, service_id: str, queue: Queue[WatchEvent | Exception]) -> None:
    """Move one stream's events to the queue, last why it ended. A thread, so that the reader can look
    at the clock and at Ctrl-C while nothing happens."""
    try:
        for event in client.control_stream(client.control.WatchService, WatchRequest(service_id=service_id)):
            queue.put(event)
        queue.put(ApiFailure("the manager ended the stream", "UNAVAILABLE"))
    except Exception as error:  # handed over, and raised where it is understood
        queue.put(error)


# ---------------------------------------------------------------- drawing


class Display:
    """Plain lines, each only when it says something new."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._last = ""
        self._noted_s = 0.0

    def draw(self, progress: Progress) -> None:
        line = progress.overall
        trouble = progress.note or next((bar.error for bar in progress.bars if bar.error), "")
        if trouble and progress.outcome is Outcome.WORKING:
            line = f"{line} ({trouble})"
        if line == self._last or self._quiet:
            return
        if trouble and line.partition(" (")[0] == self._last.partition(" (")[0]:
            # Tasks that fail in turn would fill a log: the same count with another reason waits.
            if time.monotonic() - self._noted_s < SHOW_TASKS_S:
                return
            self._noted_s = time.monotonic()
        self._last = line
        click.echo(line)

    def say(self, line: str) -> None:
        if not self._quiet:
            click.echo(line, err=True)


class LiveDisplay(Display):
    """Bars that are redrawn in place, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(quiet=False)
        self._progress = Progress(0, 0, (), Outcome.WORKING)  # Live draws as soon as it is made
        self.live = Live(console=Console(highlight=False), refresh_per_second=10, get_renderable=self._renderable)

    def draw(self, progress: Progress) -> None:
        self._progress = progress

    def say(self, line: str) -> None:
        self.live.console.print(line)

    def _renderable(self) -> RenderableType:
        from rich.text import Text

        return Text("\n".join(bar_lines(self._progress)), no_wrap=True, overflow="ellipsis")


def bar_lines(progress: Progress) -> list[str]:
    """The picture as Docker draws it. Pure."""
    lines = [progress.overall]
    if progress.note and progress.outcome is Outcome.WORKING:
        lines.append(progress.note)
    width = max((len(bar.key) for bar in progress.bars), default=0)
    for bar in progress.bars:
        if bar.error:
            lines.append(f"{bar.key:<{width}}: {bar.state:<9} {bar.error}")
        elif bar.state:
            filled = BAR_CHARACTERS * bar.step // STEPS_ALL
            drawn = "=" * max(0, filled - 1) + ">" if filled else ""
            lines.append(f"{bar.key:<{width}}: {bar.state:<9} [{drawn:<{BAR_CHARACTERS}}]")
        else:
            lines.append(f"{bar.key:<{width}}:")
    return lines


@contextmanager
def _display(quiet: bool) -> Iterator[Display]:
    if quiet or not sys.stdout.isatty():
        yield Display(quiet)
        return
    display = LiveDisplay()
    with display.live:
        yield display
