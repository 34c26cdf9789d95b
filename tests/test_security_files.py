"""Credentials on disk: the pair is swapped by one rename, and every process notices by itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.objects_pb2 import MANAGER, WORKER, NodeRole
from swarm.errors import Invalid, Locked, NotFound
from swarm.security import ca, files
from swarm.security.certificates import RENEW_RETRY_MAX_S, NodeCredentials, renewal_time, retry_delay_s
from swarm.security.identity import Identity

ROOT = ca.create_root(time.time())


def pair(role: NodeRole.ValueType = WORKER, node_id: str = "n1", root: ca.RootCa = ROOT) -> files.Pair:
    key_pem, csr_pem = ca.new_key_and_csr()
    certificate_pem = ca.sign_node(root, csr_pem, Identity(node_id, role, "c1"), time.time())
    return files.check_pair(root.certificate_pem, certificate_pem, key_pem)


def test_what_is_written_is_read_and_the_key_is_private(tmp_path: Path) -> None:
    made = pair()
    directory = tmp_path / "certificates"
    files.write_pair(directory, made)
    assert files.read_pair(directory) == made
    assert (directory / files.KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert (directory / files.CERTIFICATE_FILE).read_bytes() == made.certificate_pem
    assert sorted(path.name for path in directory.iterdir()) == [
        "swarm-node.crt",
        "swarm-node.key",
        "swarm-root-ca.crt",
    ]


def test_killed_between_the_renames_the_pair_still_fits(tmp_path: Path) -> None:
    """The key file alone is believed: whichever of the two copies of the certificate is older does not matter."""
    old, new = pair(), pair(MANAGER)
    files.write_pair(tmp_path, old)
    files.write_pair(tmp_path, new)
    (tmp_path / files.CERTIFICATE_FILE).write_bytes(old.certificate_pem)
    assert files.read_pair(tmp_path) == new


def test_a_host_that_is_no_member_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no credentials of a swarm"):
        NodeCredentials.load(tmp_path)


@pytest.mark.parametrize(
    ("key_file", "why"),
    [
        (b"", "cannot be read"),
        (pair().key_pem, "cannot be read"),
        (pair().key_pem + pair().certificate_pem, "for another key"),
    ],
)
def test_a_damaged_key_file_is_refused_with_the_remedy(tmp_path: Path, key_file: bytes, why: str) -> None:
    files.write_pair(tmp_path, pair())
    (tmp_path / files.KEY_FILE).write_bytes(key_file)
    with pytest.raises(Invalid, match=f"{why}.*join again"):
        NodeCredentials.load(tmp_path)


def test_credentials_of_another_ca_are_not_saved(tmp_path: Path) -> None:
    foreign = pair(root=ca.create_root(time.time()))
    with pytest.raises(Invalid, match="not signed by the cluster's root CA"):
        NodeCredentials.save(tmp_path, ROOT.certificate_pem, foreign.certificate_pem, foreign.key_pem)
    assert not list(tmp_path.iterdir())


def test_a_second_process_notices_a_renewal_and_survives_a_damaged_one(tmp_path: Path) -> None:
    files.write_pair(tmp_path, pair())
    held = NodeCredentials.load(tmp_path)
    assert held.identity.role == WORKER
    before = held.refresh()
    files.write_pair(tmp_path, pair(MANAGER))
    assert held.identity.role == MANAGER
    assert held.refresh() == before + 1
    (tmp_path / files.KEY_FILE).write_bytes(b"damaged")
    assert held.identity.role == MANAGER
    os.unlink(tmp_path / files.KEY_FILE)
    assert held.identity.role == MANAGER


SEAL, OTHER_SEAL = files.Seal(bytes(32), True), files.Seal(bytes([1]) * 32, True)


def test_a_sealed_private_key_tells_who_we_are_and_no_more(tmp_path: Path) -> None:
    made = pair(MANAGER)
    files.write_pair(tmp_path, made, SEAL)
    assert b"PRIVATE KEY" not in (tmp_path / files.KEY_FILE).read_bytes()
    assert made.key_pem.splitlines()[1] not in (tmp_path / files.KEY_FILE).read_bytes()
    assert files.read_pair(tmp_path, files.Seal(SEAL.key)) == made
    without = files.read_pair(tmp_path)
    assert (without.key_pem, without.certified) == (b"", made.certified)
    with pytest.raises(Invalid, match=r"not sealed with this manager's raft.key.*join again"):
        files.read_pair(tmp_path, OTHER_SEAL)


def test_every_damaged_byte_of_a_sealed_private_key_is_noticed(tmp_path: Path) -> None:
    files.write_pair(tmp_path, pair(MANAGER), SEAL)
    path = tmp_path / files.KEY_FILE
    good = path.read_bytes()
    for position in range(0, len(good), 3):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(Invalid):
            files.read_pair(tmp_path, SEAL)


def test_another_spelling_of_the_same_sealed_bytes_is_damage_too(tmp_path: Path) -> None:
    """Base64 leaves bits of its last character unused: "0=" and "1=" are the same byte."""
    files.write_pair(tmp_path, pair(MANAGER), SEAL)
    path = tmp_path / files.KEY_FILE
    body, pad, rest = path.read_bytes().partition(b"=")
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    path.write_bytes(body[:-1] + bytes([alphabet[alphabet.index(body[-1]) + 1]]) + pad + rest)
    with pytest.raises(Invalid, match="damaged"):
        files.read_pair(tmp_path, SEAL)


async def test_the_private_key_is_sealed_opened_and_found_by_a_process_that_did_not_know(tmp_path: Path) -> None:
    files.write_pair(tmp_path, pair(MANAGER))
    seals = {"agent": files.Seal(SEAL.key), "late": files.OPEN}
    agent = NodeCredentials.load(tmp_path, lambda: seals["agent"])
    await agent.reseal()
    assert not files.is_sealed(tmp_path)
    seals["agent"] = SEAL
    await agent.reseal()
    assert files.is_sealed(tmp_path)
    late = NodeCredentials.load(tmp_path, lambda: seals["late"])
    before = late.refresh()
    assert (late.is_locked, late.identity) == (True, agent.identity)
    with pytest.raises(Locked):
        await late.renew(["127.0.0.1:1"])
    await late.reseal()
    assert files.is_sealed(tmp_path), "who does not know the key writes nothing"
    seals["late"] = files.Seal(SEAL.key)
    assert late.refresh() == before + 1
    assert not late.is_locked
    seals["agent"] = files.Seal(SEAL.key)
    await agent.reseal()
    assert files.read_pair(tmp_path).key_pem


async def test_a_worker_s_private_key_is_never_sealed(tmp_path: Path) -> None:
    files.write_pair(tmp_path, pair(WORKER))
    await NodeCredentials.load(tmp_path, lambda: SEAL).reseal()
    assert not files.is_sealed(tmp_path)


@given(start=st.floats(0, 2e9), validity_s=st.floats(3_600, 1e9), share=st.floats(0, 1, exclude_max=True))
def test_renewal_falls_between_half_and_four_fifths_of_the_validity(
    start: float, validity_s: float, share: float
) -> None:
    at = renewal_time(start, start + validity_s, share)
    assert start + 0.499 * validity_s <= at <= start + 0.801 * validity_s


@given(attempt=st.integers(1, 10_000), share=st.floats(0, 1))
def test_retries_of_a_renewal_are_bounded(attempt: int, share: float) -> None:
    assert 0 < retry_delay_s(attempt, share) <= RENEW_RETRY_MAX_S
