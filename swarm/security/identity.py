"""Who a certificate says its holder is: CN = node ID, OU = role, O = cluster ID."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from cryptography.x509.oid import NameOID

from proto.objects_pb2 import MANAGER, WORKER, NodeRole
from swarm.errors import Invalid

MANAGER_NAME = "swarm-manager"
"""OU of managers, and the server name that every mTLS client asks for: a worker cannot answer to it."""
WORKER_NAME = "swarm-worker"
CA_NAME = "swarm-ca"
"""Server name of the listener for joining; only managers' certificates carry it."""

UNIT_OF_ROLE: dict[NodeRole.ValueType, str] = {MANAGER: MANAGER_NAME, WORKER: WORKER_NAME}
ROLE_OF_UNIT: dict[str, NodeRole.ValueType] = {unit: role for role, unit in UNIT_OF_ROLE.items()}

PARSED_CACHE_ENTRIES = 1024
"""Certificates of peers kept parsed: more than a large cluster has nodes."""


@dataclass(frozen=True, slots=True)
class Identity:
    node_id: str
    role: NodeRole.ValueType
    cluster_id: str


@dataclass(frozen=True, slots=True)
class Certified:
    """An identity and the time for which its certificate vouches for it (Unix s)."""

    identity: Identity
    not_before: float
    not_after: float


def certified(certificate: x509.Certificate) -> Certified:
    """What a leaf says. Raises Invalid when it is not a node's certificate."""
    node_id = _attribute(certificate, NameOID.COMMON_NAME)
    unit = _attribute(certificate, NameOID.ORGANIZATIONAL_UNIT_NAME)
    cluster_id = _attribute(certificate, NameOID.ORGANIZATION_NAME)
    role = ROLE_OF_UNIT.get(unit)
    if not node_id or not cluster_id or role is None:
        subject = certificate.subject.rfc4514_string()
        raise Invalid(f"certificate of {subject!r} is not a node's: CN, O and OU must be node ID, cluster ID and role")
    return Certified(
        Identity(node_id, role, cluster_id),
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )


@lru_cache(maxsize=PARSED_CACHE_ENTRIES)
def certified_pem(certificate_pem: bytes) -> Certified:
    """The same, from PEM; parsed once per certificate, since every RPC asks. Raises Invalid."""
    try:
        return certified(x509.load_pem_x509_certificate(certificate_pem))
    except ValueError as error:
        raise Invalid(f"not a certificate: {error}") from None


def _attribute(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    """The one value of a subject attribute; "" when it is missing or given twice."""
    values = certificate.subject.get_attributes_for_oid(oid)
    return str(values[0].value) if len(values) == 1 else ""
