"""Every error an operator may see. The message is the line that is printed: what happened, to which
object, why, and what to do next. `retryable` says whether the same call can succeed later unchanged."""

from __future__ import annotations


class SwarmError(Exception):
    """Root of the errors that are told to people rather than logged as bugs."""

    retryable = False


class Invalid(SwarmError):
    """The request itself is wrong; the message names the field and the remedy."""


class NotFound(SwarmError):
    """A referenced object does not exist."""


class AlreadyExists(SwarmError):
    """An object with this ID or name exists."""


class Conflict(SwarmError):
    """The object changed since it was read ("update out of sequence"): read again, then retry."""

    retryable = True


class InUse(SwarmError):
    """The object cannot be removed or changed while another refers to it."""


class Denied(SwarmError):
    """The caller's certificate, role or token does not permit this."""


class Locked(SwarmError):
    """This host's manager has not been started since the host came up: it needs the unlock key."""

    def __init__(self) -> None:
        super().__init__(
            "Swarm is encrypted and needs to be unlocked before it can be used. "
            'Please use "pyswarm swarm unlock" to unlock it.'
        )


class NoLeader(SwarmError):
    """This manager does not lead, or no manager does: nothing was written."""

    retryable = True

    def __init__(self, message: str, leader_addr: str = "") -> None:
        super().__init__(message)
        self.leader_addr = leader_addr
        """host:port of the leader's mTLS listener; "" = unknown."""


class Unreachable(SwarmError):
    """Nobody answers at an address: the message names it and what to check."""

    retryable = True


class Busy(SwarmError):
    """A bounded queue is full: nothing was written, try again."""

    retryable = True


class OutcomeUnknown(SwarmError):
    """The deadline passed or leadership was lost after proposing: it may or may not be written.
    Retry with the same request ID, which is applied at most once."""

    retryable = True
