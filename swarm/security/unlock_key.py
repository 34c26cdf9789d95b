"""The unlock key, `SWMKEY-1-<43 characters>`: 32 random bytes which wrap what a manager must not have in clear on disk.

While autolock is on the key is part of the replicated state and is shown to people on a manager; no host stores it.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from proto.objects_pb2 import Cluster
from swarm.errors import Invalid

PREFIX = "SWMKEY-1-"
KEY_BYTES = 32
TEXT_LENGTH = len(PREFIX) + 43
"""32 bytes in base64 for URLs, without padding."""
NONCE_BYTES = 12
TAG_BYTES = 16


@dataclass(frozen=True, slots=True)
class Lock:
    """What the cluster says about its managers' files. `revision` counts the changes and only grows, so that the replay
    of an old log entry never brings an old key back; `key` is empty where files are to be in clear."""

    revision: int
    key: bytes

    def __repr__(self) -> str:
        return f"Lock(revision={self.revision}, {'on' if self.key else 'off'})"  # never the key: this may get logged


NO_LOCK = Lock(0, b"")


def lock_of(cluster: Cluster | None) -> Lock:
    """What this state of the cluster asks for."""
    return NO_LOCK if cluster is None else Lock(cluster.unlock_revision, cluster.unlock_key)


def locked(cluster: Cluster, key: bytes) -> Cluster:
    """The cluster with this unlock key, or, with b"", with autolock off."""
    changed = Cluster()
    changed.CopyFrom(cluster)
    changed.unlock_key = key
    changed.unlock_revision += 1
    changed.spec.encryption.auto_lock_managers = bool(key)
    return changed


def random_key() -> bytes:
    """A fresh key: when autolock is turned on, and for rotation."""
    return secrets.token_bytes(KEY_BYTES)


def text_of(key: bytes) -> str:
    """As people see it; "" for no key."""
    return PREFIX + base64.urlsafe_b64encode(key).decode().rstrip("=") if key else ""


def parse(text: str) -> bytes:
    """The key out of what a person entered. Raises Invalid, saying what is wrong without repeating the text."""
    entered = text.strip()
    if not entered.startswith(PREFIX):
        raise Invalid(f"invalid unlock key: it does not start with {PREFIX}")
    if len(entered) != TEXT_LENGTH:
        raise Invalid(f"invalid unlock key: it has {len(entered)} characters instead of {TEXT_LENGTH}: copy it whole")
    try:
        key = base64.b64decode(entered[len(PREFIX) :] + "=", altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if text_of(key) != entered:  # also of two texts that decode alike only one is a key
        raise Invalid("invalid unlock key: it is garbled; copy it whole")
    return key


def wrap(unlock_key: bytes, purpose: bytes, clear: bytes, header: bytes, nonce: bytes) -> bytes:
    """`clear` encrypted and, together with `header`, authenticated (AES-256-GCM). `nonce`: 12 random bytes, new each
    time. `purpose` keeps what was wrapped for one file from being taken for another's."""
    return nonce + _cipher(unlock_key, purpose).encrypt(nonce, clear, header)


def unwrap(unlock_key: bytes, purpose: bytes, wrapped: bytes, header: bytes) -> bytes | None:
    """What `wrap` took; None with another key or purpose, or a changed header."""
    try:
        return _cipher(unlock_key, purpose).decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], header)
    except (InvalidTag, ValueError):
        return None


def _cipher(unlock_key: bytes, purpose: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), KEY_BYTES, None, b"pyswarm unlock " + purpose).derive(unlock_key))
