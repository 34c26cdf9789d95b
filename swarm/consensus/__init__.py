"""Raft: pysyncobj's election and replication kernel inside a shell that makes it safe to trust.

Order of reading: `interface` (what others see), `raft` (asyncio), `engine` (one member, no clock and no sockets of
its own), `sanitizer` (what a message may do), `kernel` and `bindings` (pysyncobj held by the ears), `wal`, `snapshot`,
`storage` (what survives a crash), `grpc_transport`.
"""

import _socket
import socket

import pysyncobj.tcp_connection  # noqa: F401

# Importing pysyncobj puts Windows' version of this in place of everybody's, which fails here: undone before anything
# else of this package is imported.
socket.inet_ntop = _socket.inet_ntop
