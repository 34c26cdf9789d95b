"""`RaftNode`: consensus on the event loop. Timers, deadlines and futures around the engine.

Everything runs on one thread. Frames and proposals ask for a turn of the engine, which runs as soon as the event loop
gets to it, so all that arrives together shares one fdatasync; a timer asks for one when nothing happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import structlog

from proto.raft_pb2 import RaftFrame
from swarm.consensus import recover
from swarm.consensus.changes import MemberChanges
from swarm.consensus.config import DEFAULTS, RaftConfig
from swarm.consensus.disk import Disk
from swarm.consensus.engine import Engine
from swarm.consensus.faults import Fatal, exit_process
from swarm.consensus.futures import answer, settle
from swarm.consensus.interface import Member, StateMachine
from swarm.consensus.snapshot import encode
from swarm.consensus.standing import Standing
from swarm.consensus.storage import open_storage
from swarm.consensus.transport import Answer, FrameTransport
from swarm.errors import Busy, Invalid, NoLeader, SwarmError

STOP_TRANSFER_S = 2.0
DISK_CHECK_S = 1.0
LOW_DISK_TRANSFER_S = 5.0

log = structlog.get_logger()


class RaftNode:
    """Implements `interface.Consensus`. `members` is read only when `disk` is empty: `[me]` founds a cluster,
    what `ask_to_join` returned joins one; afterwards the log knows. Raises Damaged from `start`.
    `may_join`: whether the state wants this node (ID) as a manager. `fatal` ends the process when its disk or its
    state cannot be trusted."""

    def __init__(
        self,
        *,
        me: Member,
        members: Sequence[Member],
        disk: Disk,
        machine: StateMachine,
        transport: FrameTransport,
        config: RaftConfig = DEFAULTS,
        clock: Callable[[], float] = time.monotonic,
        randomness: Callable[[], float] = random.random,
        fatal: Fatal = exit_process,
        may_join: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._me = me
        self._first_members = tuple(members)
        self._disk = disk
        self._machine = machine
        self._transport = transport
        self._config = config
        self._clock = clock
        self._random = randomness
        self._fatal = fatal
        self._engine: Engine | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._turn: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._was_leader = False
        self._callbacks: list[Callable[[bool], None]] = []
        self._watchers: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._changes = MemberChanges(self, me, transport, clock, may_join)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._next_disk_check_s = 0.0

    # ---- life

    def begin_with(self, members: Sequence[Member]) -> None:
        """The members for a first start, where they are known only after construction."""
        self._first_members = tuple(members)

    async def start(self) -> None:
        """Open the log and take part. Raises Damaged."""
        storage = open_storage(self._disk, self._first_members, self._fatal, self._config)
        self._engine = Engine(
            me=self._me,
            storage=storage,
            machine=self._machine,
            network=self._transport,
            executor=self._executor,
            config=self._config,
            clock=self._clock,
            random=self._random,
            fatal=self._fatal,
        )
        self._transport.attach(self)
        self._engine.start()
        self._standing = Standing(self, self._me, self._transport, self._config, self._clock)
        self._on_timer()

    async def stop(self) -> None:
        """Transfer leadership if held, flush the log, close. Takes at most about STOP_TRANSFER_S."""
        engine = self._engine
        if engine is None:
            await self._transport.close()
            return
        if engine.is_leader() and self.reachable_others():
            with contextlib.suppress(SwarmError):
                await self.transfer(STOP_TRANSFER_S)
        self._engine = None
        for handle in (self._timer, self._turn):
            if handle is not None:
                handle.cancel()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._executor.shutdown)
        engine.close()
        await self._transport.close()
        for _, future in self._watchers:
            future.cancel()
        self._tell_leadership(False)

    # ---- turns

    def running(self) -> Engine:
        """Raises NoLeader while this manager starts or stops."""
        if self._engine is None:
            raise NoLeader("consensus does not run on this manager (it starts or stops); try again")
        return self._engine

    def want_turn(self) -> None:
        if self._turn is None and self._engine is not None:
            self._turn = asyncio.get_running_loop().call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._turn = None
        engine = self._engine
        if engine is None:
            return
        try:
            engine.pump()
        except Exception as error:
            log.exception("consensus failed")
            self._fatal(f"an error inside consensus, after which its memory cannot be trusted: {error!r}")
        if engine.turns_wanted:
            self.want_turn()
        self._set_timer()
        self._tell_leadership(engine.is_leader())
        for watcher in self._watchers:
            if not watcher[1].done() and watcher[0]():
                watcher[1].set_result(None)
        self._watchers = [watcher for watcher in self._watchers if not watcher[1].done()]

    def _on_timer(self) -> None:
        if self._engine is None:
            return
        self._timer = None
        now = self._clock()
        if now >= self._next_disk_check_s:
            self._next_disk_check_s = now + DISK_CHECK_S
            self._check_disk()
        self._standing.check()
        self.want_turn()

    def _set_timer(self) -> None:
        """For when the engine next has something to do; left alone if that is not sooner than it is set for."""
        loop = asyncio.get_running_loop()
        rest_s = 0.001 + self.running().rest_s()  # the kernel wants its moment to have passed
        at = loop.time() + min(max(rest_s, self._config.tick_min_s), self._config.tick_max_s)
        if self._timer is not None:
            if self._timer.when() <= at + self._config.tick_min_s:
                return
            self._timer.cancel()
        self._timer = loop.call_at(at, self._on_timer)

    def spawn(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run in the background, one of each name."""
        if name in self._tasks:
            return

        async def run() -> None:
            try:
                await work()
            except SwarmError as error:
                log.info("did not succeed", what=name, reason=str(error))
            finally:
                del self._tasks[name]

        self._tasks[name] = asyncio.create_task(run())

    def _tell_leadership(self, leads: bool) -> None:
        if leads == self._was_leader:
            return
        self._was_leader = leads
        for callback in list(self._callbacks):
            callback(leads)

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for something that a turn may change; whether it came true in time."""
        if condition():
            return True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers.append((condition, future))
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            return False
        return True

    # ---- what it is

    @property
    def node_id(self) -> str:
        return self._me.node_id

    def is_leader(self) -> bool:
        """True once every entry of earlier terms has been applied here."""
        return self._engine is not None and self._engine.is_leader()

    def leader(self) -> Member | None:
        return self._engine.leader() if self._engine is not None else None

    def is_removed(self) -> bool:
        """The other managers have removed this one, and a leader has told it so."""
        return self._engine is not None and self._engine.is_removed

    def difference(self) -> str:
        """Not empty: the state here is not the leader's, as it should be; says where that showed first."""
        return self._engine.digests.difference if self._engine is not None else ""

    def members(self) -> tuple[Member, ...]:
        return self._engine.members() if self._engine is not None else ()

    def reachable(self, node_id: str) -> bool:
        """Whether frames from this member arrive (always true for oneself)."""
        return node_id == self._me.node_id or self._transport.reachable(node_id)

    def reachable_others(self) -> list[Member]:
        return [each for each in self.members() if each.node_id != self._me.node_id and self.reachable(each.node_id)]

    def on_leadership(self, callback: Callable[[bool], None]) -> None:
        """Call `callback(is_leader)` on each change, and once at registration."""
        self._callbacks.append(callback)
        callback(self._was_leader)

    async def wait_ready(self, timeout_s: float) -> bool:
        """Whether within the time a leader was known, and this manager was told by it (or leads itself)."""
        return await self.until(
            lambda: self.leader() is not None and self._engine is not None and self._engine.kernel.applied() > 1,
            timeout_s,
        )

    # ---- what it does

    async def propose(self, entry: bytes, timeout_s: float) -> bytes:
        """Replicate one entry; returns what `apply` returned here.
        Raises NoLeader, Busy, Invalid (not written), OutcomeUnknown (maybe written)."""
        engine = self.running()
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        engine.propose(entry, partial(settle, future))
        self.want_turn()
        return await answer(future, timeout_s)

    async def read_barrier(self, timeout_s: float) -> None:
        """Return once reads of the local state are as new as any write acknowledged before the call, here or
        elsewhere. Raises NoLeader."""
        engine = self.running()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done = partial(settle, future)
        engine.reads.add(done)
        self.want_turn()
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            raise NoLeader(f"no leader with a quorum answered within {timeout_s:g} s; try again") from None
        finally:
            engine.reads.drop(done)

    async def transfer(self, timeout_s: float) -> None:
        """Hand leadership to the most up-to-date reachable member. Raises NoLeader, Invalid, Busy (still leading)."""
        engine = self.running()
        if not engine.is_leader():
            raise engine.not_leading()
        if not self.reachable_others():
            raise Invalid("no other manager is reachable, so leadership cannot be handed over")
        deadline = self._clock() + timeout_s
        before, engine.paused_because = engine.paused_because, "leadership is being handed over"
        try:
            while engine.kernel.leads() and self._clock() < deadline:
                remaining = max(0.0, deadline - self._clock())
                if await self.until(
                    lambda: not engine.kernel.leads() or engine.best_successor() is not None, remaining
                ):
                    engine.kernel.hand_over()
                    self.want_turn()
                    await self.until(lambda: not engine.kernel.leads(), min(remaining, self._config.election_max_s))
        finally:
            engine.paused_because = before
        if engine.kernel.leads():
            raise Busy(f"no other manager took over within {timeout_s:g} s; this one still leads")
        await self.until(lambda: self.leader() is not None, max(0.0, deadline - self._clock()))

    def backup(self) -> Iterator[bytes]:
        """The state as it is now, as a file that `recover.read_backup` reads, in pieces. Raises NoLeader."""
        engine = self.running()
        index, term = engine.kernel.applied(), engine.kernel.term()
        return encode(recover.meta_of(index, term, self.members()), self._machine.dump())

    # ---- members

    async def add_member(self, member: Member, timeout_s: float) -> None:
        """Leader only. The new member must answer at its address, and its consensus must run, before it counts.
        Adding a known member with its known address is a no-op; with another one, its address is replaced.
        Raises NoLeader, Invalid, Busy, OutcomeUnknown."""
        await self._changes.add(member, timeout_s)

    async def remove_member(self, node_id: str, timeout_s: float) -> None:
        """Leader only; an unknown member is a no-op. Raises Invalid when the rest would not have a reachable quorum.
        A leader asked to remove itself hands leadership over and raises NoLeader: ask the new one."""
        await self._changes.remove(node_id, timeout_s)

    # ---- transport.Receiver

    def on_frame(self, node_id: str, frame: RaftFrame) -> None:
        if self._engine is not None:
            self._engine.receive(node_id, frame)
            self.want_turn()

    def on_up(self, node_id: str) -> None:
        if self._engine is not None:
            self._engine.peer_up(node_id)
            self.want_turn()

    def on_down(self, node_id: str) -> None:
        if self._engine is not None:
            self._engine.peer_down(node_id)
            self.want_turn()

    def on_writable(self, node_id: str) -> None:
        if self._engine is not None and self._engine.is_held_back():
            self.want_turn()

    def answer(self) -> Answer:
        members = self._engine.decided_members() if self._engine is not None else ()
        return Answer(self._me.node_id, self.leader(), members)

    async def admit(self, member: Member) -> tuple[Member, ...]:
        return await self._changes.admit(member)

    async def dismiss(self, node_id: str, timeout_s: float) -> tuple[Member, ...]:
        await self.remove_member(node_id, timeout_s)
        return self.members()

    # ---- in the background

    def _check_disk(self) -> None:
        engine = self.running()
        is_low = self._disk.free_bytes() < self._config.disk_reserve_bytes
        reason = f"the disk of this manager is nearly full ({self._disk}): free space on it"
        if is_low and not engine.paused_because:
            log.error("too little disk space to take on changes", directory=str(self._disk))
            engine.paused_because = reason
        elif not is_low and engine.paused_because == reason:
            engine.paused_because = ""
        if is_low and engine.is_leader() and self.reachable_others():
            self.spawn("transfer", partial(self.transfer, LOW_DISK_TRANSFER_S))
