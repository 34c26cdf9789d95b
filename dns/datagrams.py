"""Many datagrams per system call (recvmmsg(2), sendmmsg(2)), and replies that are known already sent without a look
into the question. This is the hot path of every name lookup: it touches raw memory instead of making objects.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable, Iterator, Mapping

BATCH = 64
"""Taken from one socket before the others get their turn."""
QUESTION_BYTES_MAX = 1024
"""A name has 255 bytes and EDNS options are short; what is longer is cut, and dropped as malformed."""
REPLY_BYTES_MAX = 1280
_SOCKADDR_BYTES = 16  # struct sockaddr_in

Client = tuple[str, int]
Slow = Callable[[bytes, int], bytes | None]
"""(question, number for `Datagrams.client`) -> reply, or None: none, or later."""

_EXHAUSTED: Iterator[bytes] = iter(())


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """struct msghdr"""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vector", ctypes.c_void_p),
        ("vector_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """struct mmsghdr"""

    _fields_ = (("header", _Header), ("length", ctypes.c_uint))


_MESSAGE_BYTES = ctypes.sizeof(_Message)
_LENGTH_AT = _Message.length.offset // 4
_WORDS = _MESSAGE_BYTES // 4
# PyDLL keeps the interpreter's lock: these calls never wait.
_libc = ctypes.PyDLL(None)
_receive, _send = _libc.recvmmsg, _libc.sendmmsg
_receive.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
_send.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)


class _Row:
    """BATCH messages, each with room for one datagram and an address."""

    def __init__(self, room_bytes: int, names: int) -> None:
        self.room = ctypes.create_string_buffer(BATCH * room_bytes)
        self.vectors = (_Iovec * BATCH)()
        self.messages = (_Message * BATCH)()
        room = ctypes.addressof(self.room)
        for number in range(BATCH):
            self.vectors[number] = _Iovec(room + number * room_bytes, room_bytes)
            message = self.messages[number].header
            message.name, message.name_length = names + number * _SOCKADDR_BYTES, _SOCKADDR_BYTES
            message.vector, message.vector_length = ctypes.addressof(self.vectors[number]), 1
        self.bytes = memoryview(self.room).cast("B")
        self.address = ctypes.addressof(self.messages)


class Datagrams:
    """Buffers shared by all sockets of one event loop."""

    def __init__(self) -> None:
        self._names = ctypes.create_string_buffer(BATCH * _SOCKADDR_BYTES)
        names = ctypes.addressof(self._names)
        self._in, self._out = _Row(QUESTION_BYTES_MAX, names), _Row(REPLY_BYTES_MAX, names)
        self._lengths = memoryview(self._in.messages).cast("B").cast("I")
        self._out_names = memoryview(self._out.messages).cast("B").cast("Q")
        self._out_lengths = memoryview(self._out.vectors).cast("B").cast("Q")
        self._name_of = [names + number * _SOCKADDR_BYTES for number in range(BATCH)]

    def serve(self, fd: int, replies: Mapping[bytes, Iterator[bytes]], slow: Slow) -> None:
        """Take what has arrived, at most BATCH, and answer it. `replies`: question less its ID -> reply less its ID."""
        received = _receive(fd, self._in.address, BATCH, socket.MSG_DONTWAIT, None)
        questions, lengths, out = self._in.bytes, self._lengths, self._out.bytes
        count = 0
        for number in range(received):
            start = number * QUESTION_BYTES_MAX
            packet = bytes(questions[start : start + lengths[number * _WORDS + _LENGTH_AT]])
            known = replies.get(packet[2:], _EXHAUSTED)
            body = next(known, None)
            reply = slow(packet, number) if body is None else packet[:2] + body
            if reply is None:
                continue
            at = count * REPLY_BYTES_MAX
            out[at : at + len(reply)] = reply
            self._out_names[count * _MESSAGE_BYTES // 8] = self._name_of[number]
            self._out_lengths[count * 2 + 1] = len(reply)
            count += 1
        sent = 0
        while sent < count:
            done = _send(fd, self._out.address + sent * _MESSAGE_BYTES, count - sent, socket.MSG_DONTWAIT)
            sent += max(done, 1)  # the one that cannot be sent is lost: its client repeats its question

    def client(self, number: int) -> Client:
        """Who sent that datagram of the batch that is being served."""
        name = self._names.raw[number * _SOCKADDR_BYTES :]
        return socket.inet_ntoa(name[4:8]), int.from_bytes(name[2:4], "big")
