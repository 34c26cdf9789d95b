"""The bytes of the consensus benchmark: puts as our Put service and as etcd's KV service take them, made by hand so
that client and server spend their time on the transport and not on a schema."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator

KEY = struct.Struct(">I")
_HEAD = struct.Struct(">II")
OUR_PUT, OUR_STREAM = "/bench.Puts/Put", "/bench.Puts/Stream"
ETCD_PUT, ETCD_TXN, ETCD_STATUS = "/etcdserverpb.KV/Put", "/etcdserverpb.KV/Txn", "/etcdserverpb.Maintenance/Status"
VALUE_BYTES = 1024


def put(key: int) -> bytes:
    """One put of a random value; what `ours` and `etcd_put` wrap."""
    return KEY.pack(key) + os.urandom(VALUE_BYTES)


def frame(number: int, body: bytes) -> bytes:
    """A numbered write; any count of them may stand in one message to our service."""
    return _HEAD.pack(number, len(body)) + body


def frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset < len(data):
        number, size = _HEAD.unpack_from(data, offset)
        offset += _HEAD.size + size
        yield number, data[offset - size : offset]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def etcd_put(body: bytes) -> bytes:
    """etcdserverpb.PutRequest."""
    return _field(1, body[: KEY.size]) + _field(2, body[KEY.size :])


def etcd_txn(bodies: Iterable[bytes]) -> bytes:
    """etcdserverpb.TxnRequest without conditions: RequestOp.request_put is its field 2, TxnRequest.success too."""
    return b"".join(_field(2, _field(2, etcd_put(body))) for body in bodies)


def varint_fields(data: bytes) -> dict[int, int | bytes]:
    """Top-level fields of a protobuf message (varints and bytes, which is all that etcd's StatusResponse has)."""
    found: dict[int, int | bytes] = {}
    offset = 0

    def take() -> int:
        nonlocal offset
        value = shift = 0
        while True:
            byte = data[offset]
            offset += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while offset < len(data):
        tag = take()
        if tag & 7 == 2:
            size = take()
            found[tag >> 3] = data[offset : offset + size]
            offset += size
        else:
            found[tag >> 3] = take()
    return found


def etcd_leads(status: bytes) -> bool:
    """Whether the member that sent this StatusResponse leads: header.member_id (1.2) is leader (4)."""
    fields = varint_fields(status)
    header = fields[1]
    assert isinstance(header, bytes)
    return fields.get(4, 0) == varint_fields(header)[2]
