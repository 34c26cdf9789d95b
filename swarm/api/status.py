"""Errors as gRPC statuses. The message stays what it is: the one line that a person reads."""

from __future__ import annotations

import grpc

from swarm import errors

_CODES: dict[type[errors.SwarmError], grpc.StatusCode] = {
    errors.Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Conflict: grpc.StatusCode.ABORTED,
    errors.InUse: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Denied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Locked: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NoLeader: grpc.StatusCode.UNAVAILABLE,
    errors.Unreachable: grpc.StatusCode.UNAVAILABLE,
    errors.Busy: grpc.StatusCode.UNAVAILABLE,
    errors.OutcomeUnknown: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def status_of(error: errors.SwarmError) -> grpc.StatusCode:
    """INTERNAL for a kind of error that is not in the table."""
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
