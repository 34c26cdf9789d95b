"""The CA: what stands in a leaf, and that only the public key of a request is believed."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from proto.objects_pb2 import MANAGER, WORKER
from swarm.errors import Invalid
from swarm.security import ca
from swarm.security.identity import Identity, certified_pem

NOW = 1_700_000_000.0
ROOT = ca.create_root(NOW)
WORKER_1 = Identity("w1", WORKER, "c1")


def leaf(identity: Identity, csr_pem: bytes | None = None, expiry_s: float = 0.0) -> x509.Certificate:
    pem = ca.sign_node(ROOT, csr_pem or ca.new_key_and_csr()[1], identity, NOW, expiry_s)
    return x509.load_pem_x509_certificate(pem)


def names(certificate: x509.Certificate) -> list[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return found.value.get_values_for_type(x509.DNSName)


def test_the_root_is_a_ca_for_20_years() -> None:
    root = x509.load_pem_x509_certificate(ROOT.certificate_pem)
    assert root.subject.rfc4514_string() == "CN=swarm-ca"
    assert root.not_valid_after_utc - datetime.fromtimestamp(NOW, UTC) == timedelta(days=7300)
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize(
    ("identity", "subject", "alternative"),
    [
        (WORKER_1, "CN=w1,OU=swarm-worker,O=c1", ["swarm-worker", "w1"]),
        (Identity("m1", MANAGER, "c1"), "CN=m1,OU=swarm-manager,O=c1", ["swarm-manager", "m1", "swarm-ca"]),
    ],
)
def test_a_leaf_says_who_and_in_which_role(identity: Identity, subject: str, alternative: list[str]) -> None:
    made = leaf(identity)
    assert made.subject.rfc4514_string() == subject
    assert names(made) == alternative
    assert certified_pem(made.public_bytes(serialization.Encoding.PEM)).identity == identity
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    made.verify_directly_issued_by(x509.load_pem_x509_certificate(ROOT.certificate_pem))


@pytest.mark.parametrize(("asked_s", "given_s"), [(0, 90 * 86_400), (60, 3_600), (7_200, 7_200)])
def test_validity_has_a_default_a_minimum_and_starts_an_hour_ago(asked_s: float, given_s: float) -> None:
    made = leaf(WORKER_1, expiry_s=asked_s)
    assert made.not_valid_after_utc.timestamp() == NOW + given_s
    assert made.not_valid_before_utc.timestamp() == NOW - 3_600


def test_a_leaf_never_outlives_the_root() -> None:
    root = x509.load_pem_x509_certificate(ROOT.certificate_pem)
    assert leaf(WORKER_1, expiry_s=100 * 365 * 86_400).not_valid_after_utc == root.not_valid_after_utc


def test_names_and_extensions_in_a_request_are_ignored() -> None:
    key = ca.new_private_key()
    subject = [
        x509.NameAttribute(NameOID.COMMON_NAME, "m1"),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "swarm-manager"),
    ]
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name(subject))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("swarm-manager")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    made = leaf(WORKER_1, csr.public_bytes(serialization.Encoding.PEM))
    assert made.subject.rfc4514_string() == "CN=w1,OU=swarm-worker,O=c1"
    assert names(made) == ["swarm-worker", "w1"]
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert made.public_key() == key.public_key()


def _csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


def _tampered() -> bytes:
    der = bytearray(x509.load_pem_x509_csr(ca.new_key_and_csr()[1]).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1  # in the signature
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("csr_pem", "why"),
    [
        (b"", "cannot be read"),
        (b"garbage", "cannot be read"),
        (b"x" * (ca.CSR_BYTES_MAX + 1), "more than 8192"),
        (_csr(ec.generate_private_key(ec.SECP384R1())), "P-256 is required"),
        (_csr(rsa.generate_private_key(65537, 2048)), "P-256 is required"),
        (_tampered(), "not signed with its own key"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(csr_pem: bytes, why: str) -> None:
    with pytest.raises(Invalid, match=why):
        ca.sign_node(ROOT, csr_pem, WORKER_1, NOW)


def test_a_node_id_follows_from_the_key() -> None:
    _, csr_pem = ca.new_key_and_csr()
    _, other_pem = ca.new_key_and_csr()
    node_id = ca.node_id_of(ca.request_key(csr_pem))
    assert re.fullmatch("[0-9a-z]{25}", node_id)
    assert ca.node_id_of(ca.request_key(csr_pem)) == node_id != ca.node_id_of(ca.request_key(other_pem))


def test_another_root_of_the_same_name_did_not_sign_it() -> None:
    imposter = x509.load_pem_x509_certificate(ca.create_root(NOW).certificate_pem)
    with pytest.raises(InvalidSignature):
        leaf(WORKER_1).verify_directly_issued_by(imposter)


def test_a_certificate_without_role_is_nobodys() -> None:
    with pytest.raises(Invalid, match="is not a node's"):
        certified_pem(ROOT.certificate_pem)
