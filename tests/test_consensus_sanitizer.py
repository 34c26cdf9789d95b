"""What a message may do, decided purely: properties over random logs and messages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from swarm.consensus.sanitizer import View, judge, may_win

VIEW = View(
    leads=False,
    leader="a@h:1",
    term=5,
    decided=4,
    others=frozenset({"a@h:1", "b@h:1"}),
    learners=frozenset(),
    voters=frozenset(),
    silence_s=0.1,
    sticky_s=0.5,
)


@dataclass
class Log:
    first_index: int
    terms: list[int]

    @property
    def last_index(self) -> int:
        return self.first_index + len(self.terms) - 1

    def term_at(self, index: int) -> int | None:
        position = index - self.first_index
        return self.terms[position] if 0 <= position < len(self.terms) else None


terms = st.lists(st.integers(0, 5), min_size=2, max_size=12).map(sorted)


@st.composite
def cases(draw: st.DrawFn) -> tuple[View, Log, list[int], dict[str, Any]]:
    """A follower's log, the leader's log, which agrees with it as far as is decided, and a part of the latter."""
    leader = draw(terms)
    common = draw(st.integers(2, len(leader)))
    own = leader[:common] + [draw(st.integers(leader[common - 1], 5)) for _ in range(draw(st.integers(0, 4)))]
    first = draw(st.integers(1, common - 1))
    own = own[:common] + sorted(own[common:])
    parted = next((at for at, (one, other) in enumerate(zip(own, leader, strict=False)) if one != other), len(own))
    for one, other in zip(own[parted:], leader[parted:], strict=False):
        assume(one != other)  # the same index and term mean the same entry, and the same entries before it
    log = Log(first, own[first - 1 :])
    decided = draw(st.integers(first, common))
    previous = draw(st.integers(1, len(leader)))
    count = draw(st.integers(0, len(leader) - previous))
    entries = [(b"\x01", index, leader[index - 1]) for index in range(previous + 1, previous + count + 1)]
    message = {
        "type": "append_entries",
        "term": 5,
        "commit_index": draw(st.integers(1, len(leader))),
        "prevLogIdx": previous,
        "prevLogTerm": leader[previous - 1],
        "entries": entries,
    }
    return replace(VIEW, decided=decided), log, leader, message


def _deliver(log: Log, message: dict[str, Any]) -> list[tuple[int, int]]:
    """What the kernel's log is afterwards: it cuts off everything behind the previous entry."""
    own = [(index, log.term_at(index) or 0) for index in range(log.first_index, log.last_index + 1)]
    if "prevLogIdx" not in message:
        return own
    assert log.term_at(message["prevLogIdx"]) == message["prevLogTerm"], "the kernel would refuse it"
    kept = [entry for entry in own if entry[0] <= message["prevLogIdx"]]
    return kept + [(index, term) for _, index, term in message["entries"]]


@given(cases())
def test_entries_that_match_are_never_cut_off(case: tuple[View, Log, list[int], dict[str, Any]]) -> None:
    view, log, leader, message = case
    verdict = judge(view, log, "a@h:1", message)
    before = [(index, log.term_at(index)) for index in range(log.first_index, log.last_index + 1)]
    after = before if verdict.deliver is None else _deliver(log, verdict.deliver)
    agreeing = 0
    while agreeing < len(before) and before[agreeing] in [(i, t) for i, t in enumerate(leader, 1)]:
        agreeing += 1
    assert after[:agreeing] == before[:agreeing]


@given(cases())
def test_only_what_matches_the_leader_is_acknowledged_and_committed(
    case: tuple[View, Log, list[int], dict[str, Any]],
) -> None:
    view, log, leader, message = case
    verdict = judge(view, log, "a@h:1", message)
    if verdict.reply is not None and verdict.reply["success"]:
        acknowledged = verdict.reply["next_node_idx"] - 1
        assert acknowledged <= len(leader)
        for index in range(max(log.first_index, view.decided), acknowledged + 1):
            assert log.term_at(index) == leader[index - 1]
    if verdict.deliver is not None:
        after = dict(_deliver(log, verdict.deliver))
        committed = min(verdict.deliver["commit_index"], max(after))
        for index in range(view.decided + 1, committed + 1):
            assert after[index] == leader[index - 1]


@given(cases())
def test_the_leader_always_gets_further(case: tuple[View, Log, list[int], dict[str, Any]]) -> None:
    """Every message is either delivered or answered, so replication cannot hang; a wish lies within the log."""
    view, log, _, message = case
    verdict = judge(view, log, "a@h:1", message)
    assert verdict.heard_leader
    assert verdict.deliver is not None
    if verdict.reply is not None and verdict.reply["reset"]:
        assert view.decided < verdict.reply["next_node_idx"] <= log.last_index + 1


def test_a_leader_of_a_lower_term_learns_the_higher() -> None:
    message = {"type": "append_entries", "term": 4, "commit_index": 1, "serialized": None}
    verdict = judge(VIEW, Log(1, [0, 1]), "a@h:1", message)
    assert verdict.deliver is None
    assert verdict.reply == {"type": "higher_term", "term": 5}


def test_acknowledgements_count_only_for_a_leader_in_its_term_from_a_member_within_the_log() -> None:
    log = Log(1, [0, 5, 5])
    leading = replace(VIEW, leads=True)
    good = {"type": "next_node_idx", "term": 5, "next_node_idx": 4, "reset": False, "success": True}
    assert judge(leading, log, "b@h:1", good).deliver == good
    assert judge(VIEW, log, "b@h:1", good).deliver is None
    assert judge(leading, log, "z@h:1", good).deliver is None
    assert judge(leading, log, "b@h:1", good | {"term": 4}).deliver is None
    assert judge(leading, log, "b@h:1", good | {"next_node_idx": 9}).deliver is None
    wish = good | {"next_node_idx": 9, "reset": True, "success": False}
    assert judge(leading, log, "b@h:1", wish).deliver == wish | {"next_node_idx": 4}


def test_stickiness_yields_to_a_transfer_only() -> None:
    request = {"type": "request_vote", "term": 9, "last_log_index": 9, "last_log_term": 9, "transfer": False}
    log = Log(1, [0])
    assert judge(VIEW, log, "b@h:1", request).deliver is None
    assert judge(replace(VIEW, silence_s=9), log, "b@h:1", request).deliver == request
    assert judge(VIEW, log, "b@h:1", request | {"transfer": True}).deliver is not None


def test_a_pre_vote_needs_silence_a_new_term_and_a_log_that_is_no_worse() -> None:
    log = Log(1, [0, 3, 3])
    silent = replace(VIEW, silence_s=9)
    ask = {"type": "pre_vote", "term": 6, "last_log_index": 3, "last_log_term": 3, "round": 1}
    assert may_win(silent, log, ask)
    assert not may_win(VIEW, log, ask)
    assert not may_win(replace(silent, leads=True), log, ask)
    assert not may_win(silent, log, ask | {"term": 5})
    assert not may_win(silent, log, ask | {"last_log_index": 2})
    assert may_win(silent, log, ask | {"last_log_index": 1, "last_log_term": 4})


def test_only_the_leader_may_hand_over() -> None:
    log = Log(1, [0])
    wish = {"type": "timeout_now", "term": 5}
    assert judge(VIEW, log, "a@h:1", wish).deliver == wish
    assert judge(VIEW, log, "b@h:1", wish).deliver is None
    assert judge(VIEW, log, "a@h:1", wish | {"term": 4}).deliver is None
