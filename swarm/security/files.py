"""A node's credentials on disk: `swarm-root-ca.crt`, `swarm-node.crt`, `swarm-node.key`.

Two processes of a host use them; the agent writes, both read. The key file holds the private key *and*
its certificate, so that one rename swaps the pair: whoever is killed at whatever instant, nobody ever
reads a key beside another key's certificate. `swarm-node.crt` is a copy for people and tools.

On a manager whose swarm has autolock on the private key is sealed with the manager's own `raft.key`, which the unlock
key opens: whoever has the disk cannot speak to the other managers, who know that key.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from swarm.errors import Invalid, NotFound
from swarm.hostfiles import write_atomically
from swarm.security.identity import Certified, certified
from swarm.security.unlock_key import NONCE_BYTES, unwrap, wrap

ROOT_CA_FILE = "swarm-root-ca.crt"
CERTIFICATE_FILE = "swarm-node.crt"
KEY_FILE = "swarm-node.key"
_CERTIFICATE_BEGIN = b"-----BEGIN CERTIFICATE-----"
_SEALED = re.compile(rb"-----BEGIN PYSWARM SEALED KEY-----\n(.+)\n-----END PYSWARM SEALED KEY-----\n")
_PURPOSE = b"swarm-node.key"

Signature = tuple[int, int, int]
"""Inode, modification time (ns) and size of the key file: any replacement changes it."""


@dataclass(frozen=True, slots=True)
class Seal:
    """`key`: what private keys on this host are sealed with, so far as it is known here; `is_on`: whether they are to
    be sealed when written."""

    key: bytes = b""
    is_on: bool = False


OPEN = Seal()


@dataclass(frozen=True, slots=True)
class Pair:
    """A private key, the chain that certifies it (leaf first), and the root that the node trusts: all PEM. The private
    key is empty where it is sealed and what opens it is not known."""

    root_ca_pem: bytes
    certificate_pem: bytes
    key_pem: bytes
    certified: Certified


def check_pair(root_ca_pem: bytes, certificate_pem: bytes, key_pem: bytes) -> Pair:
    """The three as one value. Raises Invalid when they do not belong together."""
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
        leaf = x509.load_pem_x509_certificate(certificate_pem)
    except (ValueError, TypeError) as error:
        raise _unreadable(error) from None
    if key.public_key() != leaf.public_key():
        raise Invalid("the node's certificate is for another key than the node's")
    return Pair(root_ca_pem, certificate_pem, key_pem, certified(_checked_leaf(root_ca_pem, certificate_pem)))


def _checked_leaf(root_ca_pem: bytes, certificate_pem: bytes) -> x509.Certificate:
    try:
        root = x509.load_pem_x509_certificate(root_ca_pem)
        leaf = x509.load_pem_x509_certificate(certificate_pem)
    except (ValueError, TypeError) as error:
        raise _unreadable(error) from None
    try:
        leaf.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        raise Invalid("the node's certificate was not signed by the cluster's root CA") from None
    return leaf


def _unreadable(error: Exception) -> Invalid:
    return Invalid(f"the node's credentials cannot be read: {error}")


def write_pair(directory: Path, pair: Pair, seal: Seal = OPEN) -> None:
    """Store the pair; after a crash at any instant either the old or the new one is found."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    root_file = directory / ROOT_CA_FILE
    if not root_file.exists() or root_file.read_bytes() != pair.root_ca_pem:
        write_atomically(root_file, pair.root_ca_pem, 0o644)
    write_atomically(directory / KEY_FILE, _key_part(pair, seal) + pair.certificate_pem, 0o600)
    write_atomically(directory / CERTIFICATE_FILE, pair.certificate_pem, 0o644)


def _key_part(pair: Pair, seal: Seal) -> bytes:
    if not seal.is_on:
        return pair.key_pem
    body = base64.b64encode(wrap(seal.key, _PURPOSE, pair.key_pem, pair.certificate_pem, os.urandom(NONCE_BYTES)))
    return b"-----BEGIN PYSWARM SEALED KEY-----\n" + body + b"\n-----END PYSWARM SEALED KEY-----\n"


def is_sealed(directory: Path) -> bool:
    """Whether the private key on disk is sealed. Raises OSError."""
    return _SEALED.match((directory / KEY_FILE).read_bytes()) is not None


def read_pair(directory: Path, seal: Seal = OPEN) -> Pair:
    """Raises NotFound (this host has no credentials) or Invalid (they are damaged)."""
    try:
        root_ca_pem = (directory / ROOT_CA_FILE).read_bytes()
        both = (directory / KEY_FILE).read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"this host has no credentials of a swarm: {error.filename} does not exist") from None
    key_pem, begin, rest = both.partition(_CERTIFICATE_BEGIN)
    certificate_pem = begin + rest
    try:
        if sealed := _SEALED.fullmatch(key_pem):
            key_pem = _unsealed(sealed[1], certificate_pem, seal)
            if not key_pem:
                leaf = _checked_leaf(root_ca_pem, certificate_pem)
                return Pair(root_ca_pem, certificate_pem, b"", certified(leaf))
        return check_pair(root_ca_pem, certificate_pem, key_pem)
    except Invalid as error:
        raise Invalid(
            f"{error} ({directory}). Restore the directory from a backup, or leave the swarm with"
            " `pyswarm swarm leave --force` and join again"
        ) from None


def _unsealed(text: bytes, certificate_pem: bytes, seal: Seal) -> bytes:
    """The private key; empty if what opens it is not known. Raises Invalid."""
    if not seal.key:
        return b""
    try:
        body = base64.b64decode(text, validate=True)
    except binascii.Error:
        body = b""
    key_pem = unwrap(seal.key, _PURPOSE, body, certificate_pem)
    # The unused bits of the last base64 character (RFC 4648, section 3.5) are outside what the seal authenticates.
    if key_pem is None or base64.b64encode(body) != text:
        raise Invalid("the node's private key was not sealed with this manager's raft.key, or is damaged")
    return key_pem


def key_signature(directory: Path) -> Signature | None:
    """Changes whenever another pair was written; None while there is no key file."""
    try:
        found = os.stat(directory / KEY_FILE)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
