"""Join tokens: `SWMTKN-1-<D>-<S>`, the words that let a machine join.

D is the SHA-256 of the root CA's PEM bytes, so the machine knows whom to believe before it believes
anyone; S is a secret that the cluster knows, one for workers and one for managers, so the cluster
knows whom to let in and as what. Rotation changes S only.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from proto.objects_pb2 import MANAGER, WORKER, JoinTokens, NodeRole
from swarm.errors import Denied, Invalid
from swarm.ids import base36

PREFIX = "SWMTKN-1"
DIGEST_LENGTH = 50
"""SHA-256 in base 36."""
SECRET_LENGTH = 25
"""128 random bits in base 36."""
TOKEN_LENGTH = len(PREFIX) + 1 + DIGEST_LENGTH + 1 + SECRET_LENGTH

_TOKEN = re.compile(rf"{PREFIX}-([0-9a-z]{{{DIGEST_LENGTH}}})-([0-9a-z]{{{SECRET_LENGTH}}})")
_ASK = "ask a manager with `pyswarm swarm join-token worker` (or manager)"


@dataclass(frozen=True, slots=True)
class JoinToken:
    digest: str
    secret: str


def digest_of(root_ca_pem: bytes) -> str:
    """D of every token of the cluster with this root CA."""
    return base36(int.from_bytes(hashlib.sha256(root_ca_pem).digest(), "big"), DIGEST_LENGTH)


def generate(root_ca_pem: bytes, secret_number: int) -> str:
    """The token whose secret is this number (0 <= number < 2**128)."""
    return f"{PREFIX}-{digest_of(root_ca_pem)}-{base36(secret_number, SECRET_LENGTH)}"


def random_token(root_ca_pem: bytes) -> str:
    """A fresh token: for a new cluster, and for rotation."""
    return generate(root_ca_pem, secrets.randbits(128))


def parse(text: str) -> JoinToken:
    """Split a token. Raises Invalid, saying what is wrong with it."""
    token = text.strip()
    if match := _TOKEN.fullmatch(token):
        return JoinToken(*match.groups())
    if not token.startswith("SWMTKN-"):
        why = "it does not start with SWMTKN-"
    elif not token.startswith(f"{PREFIX}-"):
        why = f"only tokens of version 1 ({PREFIX}-...) are known here"
    elif len(token) != TOKEN_LENGTH:
        why = f"it has {len(token)} characters instead of {TOKEN_LENGTH}: copy it whole"
    else:
        why = "it is garbled: after the prefix come 50 and 25 digits and lower-case letters"
    raise Invalid(f"invalid join token: {why}, or {_ASK}")


def check_root_ca(token: JoinToken, root_ca_pem: bytes, remote_addr: str) -> None:
    """Whether the root CA that `remote_addr` showed is the one the token names. Raises Denied."""
    if not hmac.compare_digest(token.digest, digest_of(root_ca_pem)):
        raise Denied(
            f"the join token belongs to another cluster: its CA digest is not that of the cluster at {remote_addr} "
            f"(wrong address, old token, or someone in between); {_ASK}"
        )


def role_of(text: str, tokens: JoinTokens, root_ca_pem: bytes) -> NodeRole.ValueType:
    """The role that this token grants. Raises Invalid (garbled) or Denied (another cluster's, or rotated).
    Takes the same time whatever part of the secret is right."""
    token = parse(text)
    if not hmac.compare_digest(token.digest, digest_of(root_ca_pem)):
        raise Denied(f"the join token belongs to another cluster: its CA digest is not this cluster's; {_ASK}")
    whole = f"{PREFIX}-{token.digest}-{token.secret}"
    is_manager = hmac.compare_digest(whole, tokens.manager)
    is_worker = hmac.compare_digest(whole, tokens.worker)
    if is_manager:
        return MANAGER
    if is_worker:
        return WORKER
    raise Denied(f"join token is not valid (it may have been rotated): {_ASK}")
