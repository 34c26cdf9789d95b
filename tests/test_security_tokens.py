"""Join tokens: their form, what is wrong with a bad one, and whom a good one lets in as what."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.objects_pb2 import MANAGER, WORKER, JoinTokens
from swarm.errors import Denied, Invalid
from swarm.security import tokens

PEM = b"-----BEGIN CERTIFICATE-----\nroot\n-----END CERTIFICATE-----\n"
WORKER_TOKEN = tokens.generate(PEM, 1)
MANAGER_TOKEN = tokens.generate(PEM, 2)
TOKENS = JoinTokens(worker=WORKER_TOKEN, manager=MANAGER_TOKEN)


@given(pem=st.binary(max_size=40), secret=st.integers(0, 2**128 - 1))
def test_a_token_has_one_form_and_names_its_root_ca(pem: bytes, secret: int) -> None:
    token = tokens.generate(pem, secret)
    assert len(token) == tokens.TOKEN_LENGTH == 85
    parsed = tokens.parse(f" {token}\n")
    assert int(parsed.secret, 36) == secret
    assert int(parsed.digest, 36) == int(hashlib.sha256(pem).hexdigest(), 16)


def test_random_tokens_differ_in_their_secret_only() -> None:
    first, second = (tokens.parse(tokens.random_token(PEM)) for _ in range(2))
    assert first.digest == second.digest
    assert first.secret != second.secret


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "does not start with SWMTKN-"),
        ("hello", "does not start with SWMTKN-"),
        (WORKER_TOKEN[:-1], "84 characters instead of 85"),
        (WORKER_TOKEN + "0", "86 characters instead of 85"),
        (WORKER_TOKEN.upper(), "garbled"),
        (WORKER_TOKEN.replace("-1-", "-2-"), "only tokens of version 1"),
        (WORKER_TOKEN[:59] + "0" + WORKER_TOKEN[60:], "garbled"),
    ],
)
def test_a_garbled_token_is_told_what_is_wrong_with_it(text: str, why: str) -> None:
    with pytest.raises(Invalid, match=r"^invalid join token: ") as refused:
        tokens.parse(text)
    assert why in str(refused.value)
    assert "pyswarm swarm join-token worker" in str(refused.value)


def test_the_kind_of_token_decides_the_role() -> None:
    assert tokens.role_of(WORKER_TOKEN, TOKENS, PEM) == WORKER
    assert tokens.role_of(MANAGER_TOKEN, TOKENS, PEM) == MANAGER


def test_a_rotated_secret_is_told_so() -> None:
    with pytest.raises(Denied, match=r"join token is not valid \(it may have been rotated\): ask a manager with"):
        tokens.role_of(tokens.generate(PEM, 3), TOKENS, PEM)


def test_a_cluster_without_tokens_lets_nobody_in() -> None:
    with pytest.raises(Denied):
        tokens.role_of(WORKER_TOKEN, JoinTokens(), PEM)


def test_the_token_of_another_cluster_is_told_so_on_both_sides() -> None:
    with pytest.raises(Denied, match="belongs to another cluster"):
        tokens.role_of(tokens.generate(b"other", 1), TOKENS, PEM)
    with pytest.raises(Denied, match=r"belongs to another cluster.*10\.0\.0\.1:2377"):
        tokens.check_root_ca(tokens.parse(WORKER_TOKEN), b"other", "10.0.0.1:2377")
    tokens.check_root_ca(tokens.parse(WORKER_TOKEN), PEM, "10.0.0.1:2377")
