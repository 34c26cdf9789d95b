"""What the tests of the audit's failures share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from swarm.consensus.engine import Engine
from swarm.consensus.kernel import Message
from swarm.consensus.membership import MemberId
from swarm.consensus.sanitizer import Judge, LogView, Verdict, View, judge
from tests.sim.net import Net, write


def believing(*kinds: str) -> Judge:
    """The sanitizer without its rules for messages of these types: the kernel gets them as they come."""

    def rules(view: View, log: LogView, sender: MemberId, message: Message) -> Verdict:
        if message["type"] in kinds:
            return Verdict(message, heard_leader=message["type"] == "append_entries")
        return judge(view, log, sender, message)

    return rules


def stored(net: Net, engine: Engine, *payloads: bytes) -> None:
    outcomes = [write(engine, payload) for payload in payloads]
    net.until(lambda: all(outcome.is_stored for outcome in outcomes))


def force_leader(net: Net, name: str) -> Engine:
    """Make `name` the leader, as if the one before had handed over."""
    net.elect()
    net.step(20)
    engine = net.engines[name]
    engine.election.take_over()
    net.until(lambda: engine.is_leader() and net.leader() is engine)
    net.step(20)
    return engine


def bare(scenario: str, directory: Path) -> subprocess.CompletedProcess[bytes]:
    """Run one scenario of `bare_kernel.py` in a process of its own."""
    script = str(Path(__file__).with_name("bare_kernel.py"))
    argv = [sys.executable, script, scenario, str(directory)]
    return subprocess.run(argv, capture_output=True, timeout=60, check=False)


def shown(scenario: str, directory: Path) -> dict[str, Any]:
    """What it printed."""
    result: dict[str, Any] = json.loads(bare(scenario, directory).stdout)
    return result
