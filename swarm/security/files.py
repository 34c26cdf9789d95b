"""A node's credentials on disk: `swarm-root-ca.crt`, `swarm-node.crt`, `swarm-node.key`.

Two processes of a host use them; the agent writes, both read. The key file holds the private key *and*
its certificate, so that one rename swaps the pair: whoever is killed at whatever instant, nobody ever
reads a key beside another key's certificate. `swarm-node.crt` is a copy for people and tools.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from swarm.errors import Invalid, NotFound
from swarm.hostfiles import write_atomically
from swarm.security.identity import Certified, certified

ROOT_CA_FILE = "swarm-root-ca.crt"
CERTIFICATE_FILE = "swarm-node.crt"
KEY_FILE = "swarm-node.key"
_CERTIFICATE_BEGIN = b"-----BEGIN CERTIFICATE-----"

Signature = tuple[int, int, int]
"""Inode, modification time (ns) and size of the key file: any replacement changes it."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A private key, the chain that certifies it (leaf first), and the root that the node trusts: all PEM."""

    root_ca_pem: bytes
    certificate_pem: bytes
    key_pem: bytes
    certified: Certified


def check_pair(root_ca_pem: bytes, certificate_pem: bytes, key_pem: bytes) -> Pair:
    """The three as one value. Raises Invalid when they do not belong together."""
    try:
        root = x509.load_pem_x509_certificate(root_ca_pem)
        leaf = x509.load_pem_x509_certificate(certificate_pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise Invalid(f"the node's credentials cannot be read: {error}") from None
    if key.public_key() != leaf.public_key():
        raise Invalid("the node's certificate is for another key than the node's")
    try:
        leaf.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        raise Invalid("the node's certificate was not signed by the cluster's root CA") from None
    return Pair(root_ca_pem, certificate_pem, key_pem, certified(leaf))


def write_pair(directory: Path, pair: Pair) -> None:
    """Store the pair; after a crash at any instant either the old or the new one is found."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    root_file = directory / ROOT_CA_FILE
    if not root_file.exists() or root_file.read_bytes() != pair.root_ca_pem:
        write_atomically(root_file, pair.root_ca_pem, 0o644)
    write_atomically(directory / KEY_FILE, pair.key_pem + pair.certificate_pem, 0o600)
    write_atomically(directory / CERTIFICATE_FILE, pair.certificate_pem, 0o644)


def read_pair(directory: Path) -> Pair:
    """Raises NotFound (this host has no credentials) or Invalid (they are damaged)."""
    try:
        root_ca_pem = (directory / ROOT_CA_FILE).read_bytes()
        both = (directory / KEY_FILE).read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"this host has no credentials of a swarm: {error.filename} does not exist") from None
    key_pem, begin, rest = both.partition(_CERTIFICATE_BEGIN)
    try:
        return check_pair(root_ca_pem, begin + rest, key_pem)
    except Invalid as error:
        raise Invalid(
            f"{error} ({directory}). Restore the directory from a backup, or leave the swarm with"
            " `pyswarm swarm leave --force` and join again"
        ) from None


def key_signature(directory: Path) -> Signature | None:
    """Changes whenever another pair was written; None while there is no key file."""
    try:
        found = os.stat(directory / KEY_FILE)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
