"""Keys, associations and policies of encrypted networks, as values."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.encryption import Ledger
from overlay.esp import (
    ESP_BYTES,
    ICV_BYTES,
    Encryption,
    Host,
    association,
    changes,
    encrypted_mtu,
    encrypted_size,
    kept,
    lost,
    plan_encryption,
)
from overlay.interface import EncryptionKey, HostState, OverlayNetwork, Peer

SECRET = OverlayNetwork("secret", 4097, "10.0.1.0/24", "10.0.1.1", encrypted=True)
ADDRESSES = ("192.0.2.1", "192.0.2.2", "192.0.2.3")


def key(serial: int) -> EncryptionKey:
    return EncryptionKey(serial, bytes([serial % 251 + 1]) * 20)


def ring(newest: int) -> tuple[EncryptionKey, ...]:
    return tuple(key(serial) for serial in range(newest, newest - 3, -1))


def state(number: int, newest: int, epochs: tuple[int, ...] = (11, 22, 33)) -> HostState:
    """Host `number` of three, whose ring ends with the key `newest`."""
    peers = tuple(
        Peer(f"node{other}", ADDRESSES[other - 1], other, encryption_epoch=epochs[other - 1])
        for other in (1, 2, 3)
        if other != number
    )
    return HostState(ADDRESSES[number - 1], number, networks=(SECRET,), peers=peers, keys=ring(newest))


def plan(number: int, newest: int, epochs: tuple[int, ...] = (11, 22, 33)) -> Encryption:
    return plan_encryption(state(number, newest, epochs), epochs[number - 1])


@given(lag=st.tuples(*[st.integers(0, 1)] * 3), newest=st.integers(5, 10**6))
def test_hosts_one_rotation_apart_understand_each_other(lag: tuple[int, ...], newest: int) -> None:
    plans = {number: plan(number, newest + lag[number - 1]) for number in (1, 2, 3)}
    for sender, receiver in ((a, b) for a, b in product((1, 2, 3), repeat=2) if a != b):
        (policy,) = (p for p in plans[sender].policies if p.destination == ADDRESSES[receiver - 1])
        (sent,) = (a for a in plans[sender].associations if a.place == (policy.destination, policy.spi))
        assert sent in plans[receiver].associations


def test_hosts_two_rotations_apart_do_not() -> None:
    sent = {each for each in plan(1, 9).associations if each.source == ADDRESSES[0]}
    assert sent.isdisjoint(plan(2, 7).associations)


hosts = st.builds(
    Host,
    st.ip_addresses(v=4).map(str),
    st.integers(1, 65534),
    st.integers(1, 2**64 - 1),
)
ends = st.tuples(st.integers(1, 2**63).map(key), hosts, hosts)


@given(ends, ends)
def test_no_two_directions_epochs_or_serials_share_a_key(one: tuple, other: tuple) -> None:  # type: ignore[type-arg]
    def identity(serial: EncryptionKey, sender: Host, receiver: Host) -> object:
        return (serial, sender.address, sender.epoch, receiver.address, receiver.epoch)

    alike = association(*one).key == association(*other).key
    assert alike == (identity(*one) == identity(*other))


@given(hosts, hosts)
def test_the_two_directions_of_a_pair_have_different_keys(here: Host, there: Host) -> None:
    if (here.address, here.epoch) != (there.address, there.epoch):
        assert association(key(1), here, there).key != association(key(1), there, here).key


@given(st.sets(st.integers(1, 65534), min_size=2, max_size=8), st.integers(3, 10**9))
def test_one_receiver_never_has_two_associations_in_one_place(indices: set[int], newest: int) -> None:
    here = Host("192.0.2.250", 65534, 7)
    made = [
        association(each, Host(f"10.0.{index // 256}.{index % 256}", index, 9), here)
        for index in indices
        for each in ring(newest)
    ]
    assert len({item.place for item in made}) == len(made)
    assert all(item.spi > 255 for item in made), "RFC 4303 reserves the first 256"


def test_keys_are_not_in_what_is_printed() -> None:
    shown = repr(plan(1, 5)) + repr(state(1, 5))
    assert all(part.hex() not in shown and repr(part) not in shown for part in (each.key for each in ring(5)))
    assert all(repr(each.key) not in shown for each in plan(1, 5).associations)


@pytest.mark.parametrize(
    "changed",
    [
        replace(state(1, 5), keys=()),
        replace(state(1, 5), keys=ring(5)[:1]),
        replace(state(1, 5), networks=(replace(SECRET, encrypted=False),)),
    ],
)
def test_without_an_encrypted_network_or_a_key_to_send_with_there_is_nothing(changed: HostState) -> None:
    assert plan_encryption(changed, 11) == Encryption()


def test_a_peer_on_no_encrypted_network_gets_neither_association_nor_policy() -> None:
    assert {each.destination for each in plan(1, 5, (11, 0, 33)).policies} == {ADDRESSES[2]}


# --- changes -------------------------------------------------------------------------------------------


def test_a_rotation_accepts_before_it_sends_and_forgets_only_what_left_the_ring() -> None:
    old, new = plan(1, 5), plan(1, 6)
    todo = changes(new, old, kept(state(1, 6), 11, old.associations))
    assert not todo.clear
    assert not todo.undirect
    assert {each.destination for each in todo.direct} == set(ADDRESSES[1:])
    assert (
        set(todo.remove) == {each for each in old.associations if each.destination == ADDRESSES[0]} - new.associations
    )
    assert not lost(new, old, frozenset(each.fingerprint for each in old.associations))


def test_what_stands_as_wanted_needs_no_change() -> None:
    assert not changes(plan(1, 5), plan(1, 5), frozenset())


def test_a_peer_that_comes_back_finds_its_associations_and_costs_no_epoch() -> None:
    full = plan(1, 5)
    made = frozenset(each.fingerprint for each in full.associations)
    alone = state(1, 5, (11, 0, 0))
    keep = kept(alone, 11, full.associations)
    assert keep == full.associations
    todo = changes(plan_encryption(alone, 11), full, keep)
    assert not todo.remove
    assert len(todo.undirect) == 2
    assert not lost(full, Encryption(keep), made)


def test_associations_of_a_gone_peer_end_with_their_key() -> None:
    standing = plan(1, 5).associations
    for newest in (6, 7, 8):
        assert standing
        standing = kept(state(1, newest, (11, 0, 0)), 11, standing)
    assert not standing


def test_associations_with_an_earlier_epoch_go() -> None:
    old, new = plan(1, 5, (11, 22, 33)), plan(1, 5, (11, 99, 33))
    keep = kept(state(1, 5, (11, 99, 33)), 11, old.associations)
    assert all(ADDRESSES[1] not in {each.source, each.destination} for each in keep)
    todo = changes(new, old, keep)
    assert {each for each in old.associations if ADDRESSES[1] in {each.source, each.destination}} == {
        *todo.clear,
        *todo.remove,
    }


def test_what_was_made_and_is_gone_is_lost_and_what_is_new_is_not() -> None:
    full = plan(1, 5)
    made = frozenset(each.fingerprint for each in full.associations)
    assert lost(full, Encryption(), made)
    assert not lost(full, Encryption(), frozenset())
    assert lost(plan(1, 5), plan(1, 6), made), "a restored backup brings an old key back"


def test_a_new_epoch_makes_every_key_new() -> None:
    assert plan(1, 5).associations.isdisjoint(plan(1, 5, (12, 22, 33)).associations)


@given(st.integers(600, 9200))
def test_the_mtu_fills_the_underlay_and_never_exceeds_it(underlay_bytes: int) -> None:
    def on_the_wire(inner_bytes: int) -> int:
        contents = 8 + 8 + 14 + inner_bytes + 2
        return 20 + ESP_BYTES + contents + -contents % 4 + ICV_BYTES

    mtu = encrypted_mtu(underlay_bytes)
    assert on_the_wire(mtu) <= underlay_bytes < on_the_wire(mtu + 1)
    assert encrypted_size(mtu) == on_the_wire(mtu)


def test_the_mtu_of_an_ethernet_is_that_of_the_measurement() -> None:
    assert encrypted_mtu(1500) == 1416


# --- what was made -------------------------------------------------------------------------------------


def test_an_agent_that_starts_anew_knows_its_epoch_and_what_it_made(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run" / "encryption", iter((7, 8)).__next__)
    ledger.load()
    ledger.note(plan(1, 5).associations)
    ledger.note(plan(1, 5).associations)
    again = Ledger(ledger.path)
    again.load()
    assert (again.epoch, again.made) == (7, {each.fingerprint for each in plan(1, 5).associations})


def test_a_line_that_a_kill_cut_off_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "encryption"
    path.write_text("7\naaaaaaaaaaaaaaaa\nbbbbbbb")
    ledger = Ledger(path)
    ledger.load()
    assert ledger.made == {"aaaaaaaaaaaaaaaa"}


@pytest.mark.parametrize("text", ["", "nonsense\n", "0\n"])
def test_without_a_legible_epoch_there_is_a_new_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "encryption"
    path.write_text(text)
    ledger = Ledger(path, lambda: 9)
    ledger.load()
    assert (ledger.epoch, ledger.made, path.read_text()) == (9, set(), "9\n")
