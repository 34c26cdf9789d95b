"""The credentials that a running process holds: mTLS listeners, channels to managers, renewal.

The files are the truth (`security.files`); each process looks whether they changed before it uses them,
so a renewal by the agent reaches the manager process without a word between the two.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import structlog

from proto.join_pb2 import RenewReply, RenewRequest
from proto.join_pb2_grpc import CertificatesStub
from proto.objects_pb2 import MANAGER
from swarm.errors import Denied, Invalid, Locked, NoLeader, NotFound, SwarmError
from swarm.security.ca import new_key_and_csr
from swarm.security.channel import RenewingChannel, secure_channel
from swarm.security.files import (
    OPEN,
    Pair,
    Seal,
    Signature,
    check_pair,
    is_sealed,
    key_signature,
    read_pair,
    write_pair,
)
from swarm.security.identity import Identity

RENEW_EARLIEST, RENEW_LATEST = 0.5, 0.8
"""Shares of the validity between which a certificate is renewed. The spread keeps nodes that joined together from
coming back together; a fifth is left for an outage of the managers."""
RENEW_TIMEOUT_S = 30.0
"""In all, several tries at every manager included."""
RENEW_CALL_TIMEOUT_S = 6.0
"""One manager; it may wait for an election of a few seconds itself."""
RENEW_RETRY_FIRST_S, RENEW_RETRY_MAX_S = 0.1, 2.0
_FINAL = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT)

log = structlog.get_logger()


def renewal_time(not_before: float, not_after: float, share: float) -> float:
    """When (Unix s) to renew a certificate; `share` from 0 to 1, usually random, picks the point in the window."""
    validity_s = not_after - not_before
    return not_before + validity_s * (RENEW_EARLIEST + share * (RENEW_LATEST - RENEW_EARLIEST))


def retry_delay_s(attempt: int, share: float) -> float:
    """Pause before attempt number `attempt` (1 = the second): doubling, `share` from 0 to 1 is the jitter."""
    longest_s = min(RENEW_RETRY_MAX_S, RENEW_RETRY_FIRST_S * 2.0 ** min(attempt - 1, 16))
    return longest_s * (0.5 + share / 2)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What was read from disk at one time; replaced as a whole, so threads may read it unlocked."""

    pair: Pair
    signature: Signature | None
    generation: int
    channel_credentials: grpc.ChannelCredentials
    renew_at: float


class NodeCredentials:
    """`directory`: where the files lie. `seal` says how private keys are sealed now: while one is and cannot be opened,
    who we are is known, but nobody is convinced of it. `share` draws the point of renewal: 0 <= share() < 1."""

    def __init__(
        self, directory: Path, seal: Callable[[], Seal] = lambda: OPEN, share: Callable[[], float] = random.random
    ) -> None:
        self._directory = directory
        self._seal = seal
        self._share = share
        self._reading = threading.Lock()  # gRPC asks for certificates on threads of its own
        self._renewing = asyncio.Lock()
        self._loaded = self._read(generation=1)

    @classmethod
    def load(cls, directory: Path, seal: Callable[[], Seal] = lambda: OPEN) -> NodeCredentials:
        """Raises NotFound (this host has none) or Invalid (damaged)."""
        return cls(directory, seal)

    @classmethod
    def save(
        cls,
        directory: Path,
        root_ca_pem: bytes,
        certificate_pem: bytes,
        key_pem: bytes,
        seal: Callable[[], Seal] = lambda: OPEN,
    ) -> NodeCredentials:
        """Write the files of a new member and hold them. Raises Invalid when they do not belong together."""
        write_pair(directory, check_pair(root_ca_pem, certificate_pem, key_pem))
        return cls(directory, seal)

    def _read(self, generation: int) -> _Loaded:
        signature = key_signature(self._directory)  # before the content: too old a signature only reads twice
        pair = read_pair(self._directory, self._seal())
        mine = (pair.key_pem, pair.certificate_pem) if pair.key_pem else (None, None)  # managers refuse nobody's calls
        return _Loaded(
            pair,
            signature,
            generation,
            grpc.ssl_channel_credentials(pair.root_ca_pem, *mine),
            renewal_time(pair.certified.not_before, pair.certified.not_after, self._share()),
        )

    def refresh(self) -> int:
        """Read the files if they changed; returns the generation, which counts the changes. Any thread."""
        signature = key_signature(self._directory)
        if signature is not None and self._is_stale(signature):
            with self._reading:
                if self._is_stale(signature):
                    try:
                        self._loaded = self._read(self._loaded.generation + 1)
                    except (SwarmError, OSError) as error:
                        log.error("changed certificate files are not used", reason=str(error))
        return self._loaded.generation

    def _is_stale(self, signature: Signature) -> bool:
        return signature != self._loaded.signature or (self.is_locked and bool(self._seal().key))

    @property
    def is_locked(self) -> bool:
        """Whether the private key is sealed and what opens it is not known yet."""
        return not self._loaded.pair.key_pem

    async def reseal(self) -> None:
        """Write the private key as `seal` wants it now, if it lies there otherwise. Raises OSError."""
        async with self._renewing:
            self.refresh()
            if not self.is_locked and self._wanted(self.identity).is_on != is_sealed(self._directory):
                write_pair(self._directory, self._loaded.pair, self._wanted(self.identity))
                log.info("the node's private key was rewritten", sealed=is_sealed(self._directory))
                self.refresh()

    def _wanted(self, identity: Identity) -> Seal:
        """A worker's key is in clear: it knows nobody who could unlock it."""
        return self._seal() if identity.role == MANAGER else OPEN

    @property
    def identity(self) -> Identity:
        """Who the newest certificate says we are."""
        self.refresh()
        return self._loaded.pair.certified.identity

    @property
    def root_ca_pem(self) -> bytes:
        return self._loaded.pair.root_ca_pem

    @property
    def not_after(self) -> float:
        """Unix s."""
        self.refresh()
        return self._loaded.pair.certified.not_after

    @property
    def renew_at(self) -> float:
        """When to call `renew` (Unix s): drawn once per certificate."""
        self.refresh()
        return self._loaded.renew_at

    # ---- listeners and channels

    def server_credentials(self) -> grpc.ServerCredentials:
        """For the mTLS listener: clients must show a certificate of this cluster. Follows renewals."""
        return self._dynamic(require_client=True)

    def join_server_credentials(self) -> grpc.ServerCredentials:
        """For the listener for joining: only the server shows a certificate. Follows renewals."""
        return self._dynamic(require_client=False)

    def _dynamic(self, require_client: bool) -> grpc.ServerCredentials:
        served = self._loaded.generation

        def configuration() -> grpc.ServerCertificateConfiguration:
            pair = self._loaded.pair
            root = pair.root_ca_pem if require_client else None
            return grpc.ssl_server_certificate_configuration([(pair.key_pem, pair.certificate_pem)], root)

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Asked at each new connection; None = unchanged."""
            nonlocal served
            if (generation := self.refresh()) == served:
                return None
            served = generation
            return configuration()

        return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client)  # type: ignore[arg-type]

    def open_channel(self, addr: str) -> grpc.aio.Channel:
        """mTLS to the manager at host:port. Survives renewals of our certificate; close it when done."""

        def current() -> tuple[int, Callable[[], grpc.aio.Channel]]:
            generation = self.refresh()
            return generation, lambda: secure_channel(addr, self._loaded.channel_credentials)

        return RenewingChannel(current)

    # ---- renewal

    async def renew(self, manager_addrs: Sequence[str], timeout_s: float = RENEW_TIMEOUT_S) -> None:
        """Get a certificate for a fresh key, with the role that the cluster now gives this node, from any of these
        managers (host:port of mTLS listeners), and write it. Raises Denied (this node was removed, or is not
        believed) or NoLeader (no manager signed within `timeout_s`)."""
        async with self._renewing:
            if self.refresh() and self.is_locked:
                raise Locked
            await self._renew(manager_addrs, time.monotonic() + timeout_s, timeout_s)

    async def _renew(self, manager_addrs: Sequence[str], deadline: float, timeout_s: float) -> None:
        if not manager_addrs:
            raise NoLeader("the certificate cannot be renewed: no manager's address is known")
        key_pem, csr_pem = new_key_and_csr()
        attempt, last = 0, ""
        while True:
            for addr in random.sample(list(manager_addrs), len(manager_addrs)):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise NoLeader(f"no manager renewed the certificate within {timeout_s:g} s; last failure: {last}")
                try:
                    reply = await self._ask(addr, csr_pem, min(left_s, RENEW_CALL_TIMEOUT_S))
                except grpc.aio.AioRpcError as error:
                    if error.code() in _FINAL:
                        raise Denied(f"certificate not renewed: {error.details()}") from None
                    last = f"{addr}: {error.details()}"
                    continue
                self._accept(reply, key_pem)
                return
            attempt += 1
            pause_s = retry_delay_s(attempt, random.random())
            await asyncio.sleep(min(pause_s, max(0.0, deadline - time.monotonic())))

    async def _ask(self, addr: str, csr_pem: bytes, timeout_s: float) -> RenewReply:
        async with self.open_channel(addr) as channel:
            return await CertificatesStub(channel).Renew(RenewRequest(csr_pem=csr_pem), timeout=timeout_s)

    def _accept(self, reply: RenewReply, key_pem: bytes) -> None:
        """Write the new pair, if it is for us."""
        pair = check_pair(self.root_ca_pem, reply.certificate_pem, key_pem)
        mine, theirs = self.identity, pair.certified.identity
        if (theirs.node_id, theirs.cluster_id) != (mine.node_id, mine.cluster_id):
            raise Invalid(f"certificate not renewed: the answer is for node {theirs.node_id}, this is {mine.node_id}")
        write_pair(self._directory, pair, self._wanted(theirs))
        self.refresh()


__all__ = ["Identity", "NodeCredentials", "NotFound", "renewal_time", "retry_delay_s"]
