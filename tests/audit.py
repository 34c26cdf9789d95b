"""What the tests of the audit's failures share."""

from __future__ import annotations

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
