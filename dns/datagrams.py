"""Many datagrams per system call (recvmmsg(2), sendmmsg(2)), and replies that are known already sent without a look
into the question. This is the hot path of every name lookup: it touches raw memory instead of making objects.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable, Iterator, Mapping

BATCH = 64
BATCHES_PER_WAKE = 4
"""Taken from one socket before the others get their turn."""
QUESTION_BYTES_MAX = 1024
"""A name has 255 bytes and EDNS options are short; what is longer is cut, and dropped as malformed."""
_SOCKADDR_BYTES = 16  # struct sockaddr_in
_ID_BYTES = 2

Client = tuple[str, int]
Slow = Callable[[bytes, int], bytes | None]
"""(question, number for `Datagrams.client`) -> reply, or None: none, or later."""

Replies = Mapping[bytes, bytes | Iterator[bytes]]
"""By the question less its ID: the reply less its ID, or several of them for as many questions."""
_UNKNOWN: Iterator[bytes] = iter(())


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
_PROBE = b"where the bytes of an object lie, from its beginning"
_BYTES_AT = (ctypes.cast(ctypes.c_char_p(_PROBE), ctypes.c_void_p).value or 0) - id(_PROBE)
_receive, _send = _libc.recvmmsg, _libc.sendmmsg
_receive.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
_send.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)


class Datagrams:
    """Buffers shared by all sockets of one event loop: BATCH slots, each with a question, who asks, and its reply in
    two pieces: the ID where it was received, the rest where it lies."""

    def __init__(self) -> None:
        self._names = ctypes.create_string_buffer(BATCH * _SOCKADDR_BYTES)
        self._questions = ctypes.create_string_buffer(BATCH * QUESTION_BYTES_MAX)
        self._in_vectors, self._out_vectors = (_Iovec * BATCH)(), (_Iovec * (2 * BATCH))()
        self._in, self._out = (_Message * BATCH)(), (_Message * BATCH)()
        for number in range(BATCH):
            question = ctypes.addressof(self._questions) + number * QUESTION_BYTES_MAX
            self._in_vectors[number] = _Iovec(question, QUESTION_BYTES_MAX)
            self._out_vectors[2 * number] = _Iovec(question, _ID_BYTES)
            for message, vector, pieces in (
                (self._in[number].header, self._in_vectors[number], 1),
                (self._out[number].header, self._out_vectors[2 * number], 2),
            ):
                message.name = ctypes.addressof(self._names) + number * _SOCKADDR_BYTES
                message.name_length = _SOCKADDR_BYTES
                message.vector, message.vector_length = ctypes.addressof(vector), pieces
        # Plain views of the same memory: an access by ctypes' fields makes objects.
        self._bytes = memoryview(self._questions).cast("B")
        self._lengths = memoryview(self._in).cast("B").cast("I")[_LENGTH_AT::_WORDS]
        self._pieces = memoryview(self._out_vectors).cast("B").cast("Q")

    def serve(self, fd: int, replies: Replies, slow: Slow) -> None:
        """Take what has arrived, a few batches at most, and answer it."""
        for _ in range(BATCHES_PER_WAKE):
            received = _receive(fd, ctypes.addressof(self._in), BATCH, socket.MSG_DONTWAIT, None)
            if received > 0:
                self._answer(fd, received, replies, slow)
            if received < BATCH:
                return

    def _answer(self, fd: int, received: int, replies: Replies, slow: Slow) -> None:
        questions, pieces, known = self._bytes, self._pieces, replies.get
        alive: list[bytes] = []  # what `slow` makes the cache forget must not be freed before it is sent
        unanswered: list[int] = []
        for number, length in enumerate(self._lengths[:received].tolist()):
            start = number * QUESTION_BYTES_MAX
            found = known(bytes(questions[start + _ID_BYTES : start + length]), _UNKNOWN)
            reply = found if isinstance(found, bytes) else next(found, None)
            if reply is None:
                packet = slow(bytes(questions[start : start + length]), number)
                if packet is None:
                    unanswered.append(number)
                    continue
                reply = packet[_ID_BYTES:]
            alive.append(reply)
            pieces[4 * number + 2] = id(reply) + _BYTES_AT
            pieces[4 * number + 3] = len(reply)
        first = 0
        for end in (*unanswered, received):
            self._send(fd, first, end)
            first = end + 1

    def _send(self, fd: int, first: int, end: int) -> None:
        while first < end:
            sent = _send(fd, ctypes.addressof(self._out) + first * _MESSAGE_BYTES, end - first, socket.MSG_DONTWAIT)
            first += max(sent, 1)  # the one that cannot be sent is lost: its client repeats its question

    def client(self, number: int) -> Client:
        """Who sent that datagram of the batch that is being served."""
        name = self._names.raw[number * _SOCKADDR_BYTES :]
        return socket.inet_ntoa(name[4:8]), int.from_bytes(name[2:4], "big")
