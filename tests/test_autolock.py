"""The lock of managers' files: the key's text, the file at every crash and damage, who follows what, who knows what."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.control_pb2 import ClusterUpdateRequest
from proto.local_pb2 import Bootstrap
from proto.objects_pb2 import Cluster
from proto.store_pb2 import Entry, EntryResult, Verdict
from swarm.api.encryption import updated
from swarm.api.views import shown_cluster
from swarm.consensus.disk import Directory
from swarm.errors import Invalid, Locked
from swarm.hostfiles import HostPaths
from swarm.security.autolock import Autolock
from swarm.security.files import OPEN, Seal
from swarm.security.raft_key import KEY_FILE, RaftKey, read_key_file
from swarm.security.unlock_key import KEY_BYTES, NO_LOCK, Lock, lock_of, locked, parse, text_of
from swarm.store.changes import Create, Update, transaction
from swarm.store.store import Store
from swarm.unlocking import HostLock
from tests.sim.disk import MemoryDisk, PowerFailure
from tests.waiting import until

K1, K2, K3 = (bytes([number]) * KEY_BYTES for number in (1, 2, 3))
LOCKED = Lock(1, K1)
OPERATIONS_OF_A_REWRITE = 5
"""Create, write, sync, rename, sync of the names."""


# ---------------------------------------------------------------- the key as text


@given(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES))
def test_a_key_survives_being_shown_and_entered(key: bytes) -> None:
    text = text_of(key)
    assert text.startswith("SWMKEY-1-")
    assert parse(f"  {text}\n") == key


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not start with SWMKEY-1-"),
        ("SWMTKN-1-abc", "does not start with SWMKEY-1-"),
        (text_of(K1)[:-1], "characters instead of"),
        (text_of(K1) + "A", "characters instead of"),
        (text_of(K1)[:-2] + "!A", "garbled"),
        (text_of(K1)[:-1] + "F", "garbled"),  # decodes to the same bytes as ...E
        (text_of(K1)[:-1] + "é", "garbled"),
    ],
)
def test_what_is_no_key_is_refused_and_not_repeated(text: str, words: str) -> None:
    with pytest.raises(Invalid, match=words) as refused:
        parse(text)
    assert text[9:] == "" or text[9:] not in str(refused.value)


def test_a_lock_does_not_show_its_key() -> None:
    assert text_of(K1) not in repr(LOCKED)
    assert repr(LOCKED) == "Lock(revision=1, on)"


# ---------------------------------------------------------------- the file


def memory(seed: int = 0) -> MemoryDisk:
    return MemoryDisk("m1", random.Random(seed))


def sealing_key(key: RaftKey) -> bytes:
    return key._key


def test_the_file_is_wrapped_rewrapped_and_in_clear_again() -> None:
    disk = memory()
    key = RaftKey.open(disk)
    secret = sealing_key(key)
    assert secret in disk.read(KEY_FILE)
    key.follow(LOCKED)
    assert secret not in disk.read(KEY_FILE)
    assert sealing_key(RaftKey.open(disk, [K2, K1])) == secret
    for wrong in ([], [K2]):
        with pytest.raises(Locked, match='Please use "pyswarm swarm unlock"'):
            RaftKey.open(disk, wrong)
    key.follow(Lock(2, K2))
    with pytest.raises(Locked):
        RaftKey.open(disk, [K1])
    assert RaftKey.open(disk, [K2]).revision == 2
    key.follow(Lock(3, b""))
    assert sealing_key(RaftKey.open(disk)) == secret


def test_a_swarm_that_begins_locked_never_has_the_key_in_clear() -> None:
    for fails_in in range(OPERATIONS_OF_A_REWRITE):
        disk = memory(fails_in)
        disk.fails_in = fails_in
        made = b""

        def randomness(count: int) -> bytes:
            nonlocal made
            made = random.Random(count).randbytes(count) if count == KEY_BYTES else made
            return random.Random(count).randbytes(count)

        with pytest.raises(PowerFailure):
            RaftKey.open(disk, (), LOCKED, randomness)
        assert made
        assert all(made not in disk.read(name) for name in disk.names())
        disk.power_off()
        assert RaftKey.open(disk, [K1], LOCKED).revision == 1, "the second try begins or goes on"


def test_a_key_from_before_there_was_autolock_is_used() -> None:
    disk = memory()
    disk.create(KEY_FILE).write(K3)
    key = RaftKey.open(disk)
    assert (sealing_key(key), key.revision) == (K3, 0)
    key.follow(LOCKED)
    assert sealing_key(RaftKey.open(disk, [K1])) == K3


@pytest.mark.parametrize("lock", [LOCKED, Lock(7, b"")])
def test_every_damaged_byte_and_every_cut_is_told_from_a_wrong_key(lock: Lock, tmp_path: Path) -> None:
    disk = Directory(tmp_path)
    RaftKey.open(disk, (), lock)
    path = tmp_path / KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    good = path.read_bytes()
    for position in range(len(good)):
        for bad in (good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :], good[:position]):
            if len(bad) == KEY_BYTES:
                continue  # looks like a key of the older format: the log's own check of the key finds that
            path.write_bytes(bad)
            with pytest.raises(Invalid, match="is not usable"):
                RaftKey.open(disk, [K1])
    path.write_bytes(good + b"\0")
    with pytest.raises(Invalid, match="is not usable"):
        RaftKey.open(disk, [K1])


@pytest.mark.parametrize("fails_in", range(OPERATIONS_OF_A_REWRITE))
@pytest.mark.parametrize("before", [NO_LOCK, LOCKED])
@pytest.mark.parametrize("after", [Lock(2, K2), Lock(2, b"")])
def test_a_crash_at_any_instant_leaves_one_file_that_opens(fails_in: int, before: Lock, after: Lock) -> None:
    for seed in range(20):
        disk = memory(seed)
        key = RaftKey.open(disk, (), before)
        disk.fails_in = fails_in
        with pytest.raises(PowerFailure):
            key.follow(after)
        disk.power_off()
        again = RaftKey.open(disk, [K1, K2])
        assert sealing_key(again) == sealing_key(key)
        expected = after if again.revision == 2 else before
        assert read_key_file(disk).is_wrapped == bool(expected.key)


# ---------------------------------------------------------------- following the replicated state


class Agent:
    """What this host's agent was told, and what the file was like at that moment."""

    def __init__(self, disk: MemoryDisk) -> None:
        self.told: list[tuple[bytes, int]] = []
        self._disk = disk

    async def tell(self, key: bytes) -> bool:
        self.told.append((key, read_key_file(self._disk).revision))
        return True


def put(store: Store, cluster: Cluster) -> None:
    known = store.cluster
    copy = Cluster()
    copy.CopyFrom(cluster)
    if known is not None:
        copy.meta.CopyFrom(known.meta)
    change = Create(copy) if known is None else Update(copy)
    entry = transaction((change,), 1.0, "")
    (verdict,) = EntryResult.FromString(store.apply(Entry(transactions=[entry]).SerializeToString())).verdicts
    assert verdict.code == Verdict.OK


async def test_the_file_follows_the_cluster_and_the_agent_hears_first() -> None:
    disk, store = memory(), Store()
    key = RaftKey.open(disk)
    agent = Agent(disk)
    running = asyncio.create_task(Autolock(store, key, agent.tell, period_s=3600).run())
    cluster = Cluster(id="c")
    put(store, cluster)
    for wanted in (K1, K2, b""):
        cluster = locked(cluster, wanted)
        put(store, cluster)
        revision = cluster.unlock_revision
        await until(lambda: key.revision == revision)  # noqa: B023
        assert read_key_file(disk).is_wrapped == bool(wanted)
    await until(lambda: len(agent.told) == 6)
    assert agent.told == [(K1, 0), (K1, 1), (K2, 1), (K2, 2), (b"", 2), (b"", 3)]
    running.cancel()


async def test_a_log_that_is_replayed_does_not_bring_an_old_key_back() -> None:
    disk = memory()
    key = RaftKey.open(disk, (), Lock(2, K2))
    agent = Agent(disk)
    first = locked(Cluster(id="c"), K1)
    store = Store.of(first)
    autolock = Autolock(store, key, agent.tell)
    await autolock.step()
    assert agent.told == []
    assert RaftKey.open(disk, [K2]).revision == 2
    put(store, locked(locked(first, K2), K3))
    await autolock.step()
    assert RaftKey.open(disk, [K3]).revision == 3


async def test_a_full_disk_delays_the_new_lock() -> None:
    disk = memory()
    key = RaftKey.open(disk, (), LOCKED)
    autolock = Autolock(Store.of(locked(locked(Cluster(id="c"), K1), K2)), key, Agent(disk).tell)
    disk.is_full = True
    await autolock.step()
    assert RaftKey.open(disk, [K1]).revision == 1
    disk.is_full = False
    await autolock.step()
    assert RaftKey.open(disk, [K2]).revision == 2


# ---------------------------------------------------------------- what the API does


def on(rotate: bool = False) -> ClusterUpdateRequest:
    return ClusterUpdateRequest(auto_lock_managers=True, rotate_unlock_key=rotate)


def test_turning_on_rotating_and_turning_off() -> None:
    plain = Cluster(id="c")
    first = updated(plain, on(), K1)
    assert first is not None
    assert (lock_of(first), first.spec.encryption.auto_lock_managers) == (Lock(1, K1), True)
    assert updated(first, on(), K2) is None, "it is on already: the key that people wrote down stays"
    second = updated(first, ClusterUpdateRequest(rotate_unlock_key=True), K2)
    assert second is not None
    assert lock_of(second) == Lock(2, K2)
    third = updated(second, ClusterUpdateRequest(auto_lock_managers=False), K3)
    assert third is not None
    assert (lock_of(third), third.spec.encryption.auto_lock_managers) == (Lock(3, b""), False)
    assert updated(third, ClusterUpdateRequest(auto_lock_managers=False), K3) is None
    for cluster, request in (
        (plain, ClusterUpdateRequest(rotate_unlock_key=True)),
        (first, ClusterUpdateRequest(auto_lock_managers=False, rotate_unlock_key=True)),
    ):
        with pytest.raises(Invalid, match="cannot rotate because autolock is not turned on"):
            updated(cluster, request, K3)


def test_the_cluster_is_shown_without_the_key() -> None:
    assert K1 not in shown_cluster(locked(Cluster(id="c"), K1)).SerializeToString()


# ---------------------------------------------------------------- the agent's side


def test_the_agent_unlocks_with_the_right_key_only_and_forgets(tmp_path: Path) -> None:
    paths = HostPaths(tmp_path / "state", tmp_path / "run")
    host = HostLock(paths)
    assert host.manager_input() == b"", "a manager that has no files yet"
    key = RaftKey.open(Directory(paths.raft))
    assert host.manager_input() == b""
    key.follow(LOCKED)
    assert host.is_locked()
    with pytest.raises(Invalid, match="swarm could not be unlocked: invalid key provided"):
        host.unlock(text_of(K2))
    with pytest.raises(Invalid, match="32 bytes"):
        host.keep(b"short")
    assert host.is_locked()
    host.unlock(text_of(K1))
    assert Bootstrap.FromString(host.manager_input() or b"").unlock_keys == [K1]
    host.keep(K2)  # the manager is about to rewrite its file
    assert Bootstrap.FromString(host.manager_input() or b"").unlock_keys == [K1]
    key.follow(Lock(2, K2))
    assert Bootstrap.FromString(host.manager_input() or b"").unlock_keys == [K2]
    assert HostLock(paths).is_locked(), "another agent knows nothing"
    key.follow(Lock(3, b""))
    assert host.manager_input() == b""
    key.follow(Lock(4, K1))
    assert host.is_locked(), "old keys were forgotten"
    host.keep(K1)
    host.forget()
    assert host.is_locked()


def test_the_seal_of_the_private_key_is_on_exactly_while_the_file_is_wrapped(tmp_path: Path) -> None:
    paths = HostPaths(tmp_path / "state", tmp_path / "run")
    host = HostLock(paths)
    assert host.seal() == OPEN
    key = RaftKey.open(Directory(paths.raft))
    secret = sealing_key(key)
    assert host.seal() == Seal(secret, False)
    key.follow(LOCKED)
    assert host.seal() == Seal(secret, True), "what was known once stays known"
    assert HostLock(paths).seal() == OPEN, "nobody told another agent"
    host.keep(K1)
    (paths.raft / KEY_FILE).write_bytes(b"damaged")
    assert host.seal() == Seal(secret, True), "nothing is opened because something is damaged"
    key.follow(Lock(2, b""))
    assert host.seal() == Seal(secret, False)
    host.forget()
    (paths.raft / KEY_FILE).unlink()
    assert host.seal() == OPEN


def test_a_damaged_file_is_for_the_manager_to_tell(tmp_path: Path) -> None:
    paths = HostPaths(tmp_path / "state", tmp_path / "run")
    paths.raft.mkdir(parents=True)
    (paths.raft / KEY_FILE).write_bytes(b"damaged")
    assert HostLock(paths).manager_input() == b""
