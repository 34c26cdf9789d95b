"""Messages between members: the kernel's dictionaries and ours <-> protobuf. What does not parse is refused.

`append_entries` always carries entries after a known one (or none: a heartbeat); a piece of a snapshot, or a
heartbeat while there is none to send, is a frame of type `snapshot`.
"""

from __future__ import annotations

from proto.raft_pb2 import RaftEntry, RaftFrame, SnapshotChunk
from swarm.consensus import codec
from swarm.consensus.config import PROPOSAL_BYTES_MAX
from swarm.consensus.kernel import Message

COMMAND_BYTES_MAX = PROPOSAL_BYTES_MAX + 16
_PLAIN_KEYS = {
    "request_vote": ("last_log_index", "last_log_term", "transfer"),
    "response_vote": (),
    "timeout_now": (),
    "next_node_idx": ("next_node_idx", "reset", "success"),
    "pre_vote": ("last_log_index", "last_log_term", "round"),
    "pre_vote_reply": ("granted", "round"),
    "read_index": ("round",),
    "read_reply": ("round",),
    "read_ask": ("round",),
    "read_at": ("round", "index"),
    "higher_term": (),
    "digest": ("index", "digest"),
}
"""Type of frame -> its fields besides the term."""
_FIELD = {
    "last_log_index": "last_index",
    "last_log_term": "last_term",
    "next_node_idx": "next_index",
    "transfer": "transfer",
    "reset": "reset",
    "success": "success",
    "granted": "granted",
    "round": "round",
    "index": "last_index",
    "digest": "digest",
}


class Malformed(ValueError):
    """A frame that no correct member sends."""


def encode(message: Message) -> RaftFrame:
    """`message` must carry a term."""
    kind = message["type"]
    if kind == "append_entries":
        return _encode_append(message)
    fields = {_FIELD[key]: message[key] for key in _PLAIN_KEYS[kind] if key in message}
    return RaftFrame(type=kind, term=message["term"], **fields)


def _encode_append(message: Message) -> RaftFrame:
    frame = RaftFrame(type="append_entries", term=message["term"], commit_index=message["commit_index"])
    if "prevLogIdx" in message:
        frame.prev_index = message["prevLogIdx"] or 0
        frame.prev_term = message["prevLogTerm"] or 0
        frame.entries.extend(
            RaftEntry(command=command, index=index, term=term) for command, index, term in message["entries"]
        )
        return frame
    frame.type = "snapshot"
    if message["serialized"] is not None:
        data, offset, last = message["serialized"]
        frame.chunk.CopyFrom(SnapshotChunk(data=data, offset=offset, last=last))
    return frame


def decode(frame: RaftFrame) -> Message:
    """Raises Malformed."""
    kind = frame.type
    if kind == "append_entries":
        return _decode_append(frame)
    if kind == "snapshot":
        chunk = (frame.chunk.data, frame.chunk.offset, frame.chunk.last) if frame.HasField("chunk") else None
        return {
            "type": "append_entries",
            "term": frame.term,
            "commit_index": frame.commit_index,
            "serialized": chunk,
        }
    keys = _PLAIN_KEYS.get(kind)
    if keys is None:
        raise Malformed(f"a frame of unknown type {kind!r}")
    return {"type": kind, "term": frame.term} | {key: getattr(frame, _FIELD[key]) for key in keys}


def _decode_append(frame: RaftFrame) -> Message:
    entries = [(entry.command, entry.index, entry.term) for entry in frame.entries]
    for number, (command, index, term) in enumerate(entries, frame.prev_index + 1):
        if index != number or term > frame.term or len(command) > COMMAND_BYTES_MAX:
            raise Malformed(f"entry {index} of term {term} does not belong after entry {frame.prev_index}")
        try:
            codec.check_command(command)
        except codec.Refused as error:
            raise Malformed(f"entry {index}: {error}") from None
    return {
        "type": "append_entries",
        "term": frame.term,
        "commit_index": frame.commit_index,
        "entries": entries,
        "prevLogIdx": frame.prev_index,
        "prevLogTerm": frame.prev_term,
    }
