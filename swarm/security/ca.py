"""The cluster's certificate authority: one self-signed root, and leaves that say who a node is.

Of a certificate request only the public key is taken; every name in a leaf is the CA's own word.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from proto.objects_pb2 import MANAGER
from swarm.errors import Invalid
from swarm.ids import ID_LENGTH, base36
from swarm.security.identity import CA_NAME, UNIT_OF_ROLE, Identity

ROOT_VALIDITY = timedelta(days=20 * 365)
NODE_EXPIRY_DEFAULT_S = 90 * 86_400.0
NODE_EXPIRY_MIN_S = 3_600.0
"""Shorter ones would expire during a short outage of the managers."""
BACKDATE = timedelta(hours=1)
"""Clocks of nodes may be behind the leader's by this much."""
CSR_BYTES_MAX = 8_192
"""A request with a P-256 key has about 500; larger ones are refused before they are parsed."""


@dataclass(frozen=True, slots=True)
class RootCa:
    """`key_pem` is the cluster's deepest secret: managers' stores only."""

    certificate_pem: bytes
    key_pem: bytes


def new_private_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def create_root(now: float) -> RootCa:
    """A new root, valid for 20 years from `now` (Unix s)."""
    key = new_private_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, CA_NAME)])
    start = datetime.fromtimestamp(now, UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - BACKDATE)
        .not_valid_after(start + ROOT_VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return RootCa(certificate.public_bytes(serialization.Encoding.PEM), key_to_pem(key))


def new_key_and_csr() -> tuple[bytes, bytes]:
    """A fresh node key and a request to certify it, both PEM."""
    key = new_private_key()
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return key_to_pem(key), csr.public_bytes(serialization.Encoding.PEM)


def request_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a request whose sender proved to hold the private one. Raises Invalid."""
    if len(csr_pem) > CSR_BYTES_MAX:
        raise Invalid(f"certificate request has {len(csr_pem)} bytes, more than {CSR_BYTES_MAX}")
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        key = csr.public_key()
        proven = csr.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise Invalid(f"certificate request cannot be read: {error}") from None
    if not proven:
        raise Invalid("certificate request is not signed with its own key")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Invalid("certificate request has a key of another kind: ECDSA P-256 is required")
    return key


def node_id_of(key: ec.EllipticCurvePublicKey) -> str:
    """The ID of the node that joins with this key. As random as the key is, and the same when the request is
    repeated to another leader, so that an answer lost on the way does not leave a node that nobody is."""
    raw = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return base36(int.from_bytes(hashlib.sha256(raw).digest(), "big"), 2 * ID_LENGTH)[-ID_LENGTH:]


def expiry_s(asked_s: float) -> float:
    """Validity of a node's certificate: 0 means the default, and less than the minimum means the minimum."""
    return max(asked_s, NODE_EXPIRY_MIN_S) if asked_s else NODE_EXPIRY_DEFAULT_S


def sign_node(root: RootCa, csr_pem: bytes, subject: Identity, now: float, asked_expiry_s: float = 0.0) -> bytes:
    """The leaf (PEM) that says `subject` of the key in the request. `now` in Unix s; the expiry as in `expiry_s`,
    never beyond the root's own. Raises Invalid for a bad request."""
    key = request_key(csr_pem)
    authority = x509.load_pem_x509_certificate(root.certificate_pem)
    signer = serialization.load_pem_private_key(root.key_pem, password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey), "the root key is always P-256"
    unit = UNIT_OF_ROLE[subject.role]
    names = [unit, subject.node_id, *([CA_NAME] if subject.role == MANAGER else [])]
    start = datetime.fromtimestamp(now, UTC)
    end = min(start + timedelta(seconds=expiry_s(asked_expiry_s)), authority.not_valid_after_utc)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_subject(subject))
        .issuer_name(authority.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - BACKDATE)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _subject(identity: Identity) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, identity.cluster_id),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, UNIT_OF_ROLE[identity.role]),
            x509.NameAttribute(NameOID.COMMON_NAME, identity.node_id),
        ]
    )


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=not signs_certificates,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
