"""What a message from another member may do: the rules of Raft that the kernel does not keep by itself.

Pure: (what this member is, its log, sender, message) -> what to hand to the kernel and what to answer. The numbers S2
to S12 are the scenarios of the audit in which the bare kernel loses or falsely acknowledges writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from swarm.consensus.kernel import Message
from swarm.consensus.membership import MemberId


class LogView(Protocol):
    @property
    def first_index(self) -> int: ...

    @property
    def last_index(self) -> int: ...

    def term_at(self, index: int) -> int | None: ...


@dataclass(frozen=True, slots=True)
class View:
    """One member at one moment."""

    leads: bool
    leader: MemberId | None
    term: int
    decided: int
    """Entries up to here are committed, as far as is known here."""
    others: frozenset[MemberId]
    learners: frozenset[MemberId]
    """Who gets the log from this leader, but is no member yet."""
    voters: frozenset[MemberId]
    """Whose votes of this term have been counted."""
    silence_s: float
    """Since a leader was heard."""
    sticky_s: float
    """No vote is given against a leader heard within this time."""


@dataclass(frozen=True, slots=True)
class Verdict:
    deliver: Message | None = None
    reply: Message | None = None
    heard_leader: bool = False
    """The sender leads in a term that counts here."""
    refused: str = ""
    """Why nothing was delivered."""


Judge = Callable[[View, LogView, MemberId, Message], Verdict]


def judge(view: View, log: LogView, sender: MemberId, message: Message) -> Verdict:
    match message["type"]:
        case "append_entries":
            return _append_entries(view, log, sender, message)
        case "next_node_idx":
            return _acknowledgement(view, log, sender, message)
        case "request_vote":
            return _vote_request(view, sender, message)
        case "response_vote":
            return _vote(view, sender, message)
        case "timeout_now":
            if sender != view.leader or message["term"] != view.term:
                return Verdict(refused="only the leader hands leadership over")
            return Verdict(deliver=message)
    return Verdict(refused=f"{message['type']!r} is nothing for the kernel")


def _vote_request(view: View, sender: MemberId, message: Message) -> Verdict:
    """Leader stickiness (S12): whoever comes back with a high term does not depose a leader that works."""
    if sender in view.learners:
        return Verdict(refused="a learner is no candidate")
    if not message["transfer"] and (view.leads or view.silence_s < view.sticky_s):
        return Verdict(refused="a leader is at work")
    return Verdict(deliver=message)


def _vote(view: View, sender: MemberId, message: Message) -> Verdict:
    """One vote per voter and term, of members only (S11)."""
    if sender not in view.others:
        return Verdict(refused="no member")
    if message["term"] != view.term or sender in view.voters:
        return Verdict(refused="the vote does not count")
    return Verdict(deliver=message)


def _acknowledgement(view: View, log: LogView, sender: MemberId, message: Message) -> Verdict:
    """Acknowledgements count only in the term that they were made for (S5), and never beyond the log."""
    if not view.leads or sender not in view.others | view.learners or message["term"] != view.term:
        return Verdict(refused="the acknowledgement does not count")
    wanted = message["next_node_idx"]
    if wanted > log.last_index + 1:
        if message["success"]:
            return Verdict(refused="it acknowledges entries that do not exist")
        message = message | {"next_node_idx": log.last_index + 1}
    elif wanted < 1:
        return Verdict(refused="there is no such entry")
    return Verdict(deliver=message)


def _append_entries(view: View, log: LogView, sender: MemberId, message: Message) -> Verdict:
    term = message["term"]
    if term < view.term:
        # The kernel stays silent; then a leader of a lower term and a member of a higher one wait for ever.
        return Verdict(reply={"type": "higher_term", "term": view.term}, refused="a leader of the past")
    if view.leads and term == view.term:
        return Verdict(refused="two leaders in one term: one of them is not of this cluster")
    if "prevLogIdx" not in message:
        # A piece of a snapshot says nothing about our log, so it must not commit any of it (S3).
        return Verdict(message | {"commit_index": min(message["commit_index"], view.decided)}, heard_leader=True)
    return _match_entries(view, log, message)


def _match_entries(view: View, log: LogView, message: Message) -> Verdict:
    """Only entries that contradict the log may replace anything (S2): the kernel would cut off whatever follows
    the previous entry, so it gets a message that starts where the two logs part."""
    previous, entries = message["prevLogIdx"], message["entries"]
    if previous > log.last_index or previous < 1:
        return _ask_from(log.last_index + 1, message)
    if previous >= log.first_index and log.term_at(previous) != message["prevLogTerm"]:
        return _contradiction(view, log, previous, message)
    matched, fresh = previous, 0
    for _, index, term in entries:
        if index >= log.first_index and log.term_at(index) != term:  # below it all is committed, hence equal
            break
        matched, fresh = index, fresh + 1
    if fresh == len(entries) and matched < log.last_index:
        # Old news. Nothing may be cut off: take note of the leader and of what is committed, and acknowledge.
        note = {
            "type": "append_entries",
            "term": message["term"],
            "commit_index": min(message["commit_index"], matched),
            "serialized": None,
        }
        acknowledgement = {"type": "next_node_idx", "next_node_idx": matched + 1, "reset": False, "success": True}
        return Verdict(note, acknowledgement, heard_leader=True)
    if matched < view.decided:
        return Verdict(refused=f"it contradicts entry {matched + 1}, which is committed")
    shorter = {"prevLogIdx": matched, "prevLogTerm": log.term_at(matched), "entries": entries[fresh:]}
    return Verdict(message | shorter, heard_leader=True)


def _ask_from(index: int, message: Message) -> Verdict:
    """The kernel notes the leader; the leader shall send from `index` on."""
    note = {"type": "append_entries", "term": message["term"], "commit_index": 0, "serialized": None}
    wish = {"type": "next_node_idx", "next_node_idx": index, "reset": True, "success": False}
    return Verdict(note, wish, heard_leader=True)


def _contradiction(view: View, log: LogView, index: int, message: Message) -> Verdict:
    """Step back over the whole term that contradicts, not entry by entry."""
    if index <= view.decided:
        return Verdict(refused=f"it contradicts entry {index}, which is committed")
    wrong = log.term_at(index)
    while index - 1 > max(view.decided, log.first_index) and log.term_at(index - 1) == wrong:
        index -= 1
    return _ask_from(index, message)


def may_win(view: View, log: LogView, message: Message) -> bool:
    """Pre-vote: whether this member would vote for the sender if it held an election now."""
    last = (log.term_at(log.last_index) or 0, log.last_index)
    return (
        not view.leads
        and view.silence_s >= view.sticky_s
        and message["term"] > view.term
        and (message["last_log_term"], message["last_log_index"]) >= last
    )
