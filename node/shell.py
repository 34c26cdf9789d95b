"""What all task runners of one agent share: the outside things, the appliers, the slots, and the limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dns.interface import NameServer, Picture
from node import steps
from node.appliers import Applier
from node.drain import Releases
from node.interface import Images, ResolvedImage, Runtime
from node.statuses import StatusBook
from node.taskfiles import TaskFiles
from node.world import World
from overlay.interface import HostNetwork, HostState, NetworkError
from proto.objects_pb2 import TaskStatus

SLOTS = 8
"""Preparations and starts in flight: more than that only makes each slower on the machines we know, and
leaves no CPU for the containers that already run."""
PROBES = 32
"""Health checks in flight on one host; one that has to wait for its turn is not counted as slow."""
IMAGE_DEADLINE_S = 3600.0
"""A pull of many gigabytes over a slow line; the registry client has shorter deadlines of its own."""
NETWORKS_DEADLINE_S = 30.0
"""Docker gives a node as long to get its networks before it rejects the task."""
ATTACH_DEADLINE_S = 15.0
NAMES_DEADLINE_S = 10.0
CREATE_DEADLINE_S = 120.0
"""Filling a new volume from an image may copy a lot."""
START_DEADLINE_S = 30.0
STATUS_DEADLINE_S = 10.0
REMOVE_DEADLINE_S = 60.0
STOP_MARGIN_S = 20.0
"""On top of the grace period, for SIGKILL to take effect."""
NETWORK_APPLY_DEADLINE_S = 30.0
NAMES_APPLY_DEADLINE_S = 10.0


class Shell:
    def __init__(
        self,
        *,
        world: World,
        runtime: Runtime,
        images: Images,
        network: HostNetwork,
        names: NameServer,
        files: TaskFiles,
        statuses: StatusBook,
        report: Callable[[], None],
        now: Callable[[], float],
    ) -> None:
        """`report` is called whenever `statuses` has something new."""
        self.world = world
        self.runtime = runtime
        self.network = network
        self.files = files
        self.statuses = statuses
        self.now = now
        self.slots = asyncio.Semaphore(SLOTS)
        self.probes = asyncio.Semaphore(PROBES)
        self.releases = Releases()
        self.leaving = False
        self.networks: Applier[HostState] = Applier(
            "the host's networks", world.host_state, network.apply, NETWORK_APPLY_DEADLINE_S
        )
        self.names: Applier[Picture] = Applier("the names", world.picture, names.apply, NAMES_APPLY_DEADLINE_S)
        self._images = images
        self._flights: dict[tuple[str, str], asyncio.Task[ResolvedImage]] = {}
        self._report = report

    def observed(self, task_id: str, status: TaskStatus, has_host_ports: bool) -> None:
        """A task of this host has a new status: remember it for the balancers, queue it for the managers."""
        self.world.states[task_id] = status.state
        self.statuses.record(task_id, status)
        self._report()
        if has_host_ports or steps.ended(status.state):
            self.networks.poke()
        if steps.ended(status.state):
            self.names.poke()

    def forget(self, task_id: str) -> None:
        self.world.states.pop(task_id, None)
        self.releases.forget(task_id)
        self.statuses.forget(task_id)
        self.networks.poke()
        self.names.poke()

    async def networks_ready(self, network_ids: frozenset[str]) -> None:
        """Return once all these networks stand on this host, and will as long as the managers list them: an
        application that began before this call may just be removing one. Waits without limit for the first word
        of a manager, then NETWORKS_DEADLINE_S; raises NetworkError."""
        generation = self.networks.poke()
        await self.networks.wait_until(lambda: self.networks.applied is not None or bool(self.networks.error))
        try:
            async with asyncio.timeout(NETWORKS_DEADLINE_S):
                await self.networks.wait_until(
                    lambda: self.networks.done >= generation and network_ids <= self._standing()
                )
        except TimeoutError:
            missing = ", ".join(sorted(network_ids - self._standing()))
            reason = self.networks.error or "no manager has told this node about it"
            raise NetworkError(
                f"network {missing} does not stand on this node after {NETWORKS_DEADLINE_S:g} s: {reason}"
            ) from None

    def _standing(self) -> frozenset[str]:
        state = self.networks.applied
        if state is None:
            return frozenset()
        return state.network_ids() | self.world.networks_without_links()

    async def image(self, name: str, registry_auth: str) -> ResolvedImage:
        """As Images.ensure; callers that ask for the same image share one look-up, which goes on (and fills the
        store) when a caller gives up."""
        key = (name, registry_auth)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.create_task(self._ensure(name, registry_auth))
            flight.add_done_callback(lambda done: self._landed(key, done))
        return await asyncio.shield(flight)

    async def _ensure(self, name: str, registry_auth: str) -> ResolvedImage:
        async with asyncio.timeout(IMAGE_DEADLINE_S):
            return await self._images.ensure(name, registry_auth)

    def _landed(self, key: tuple[str, str], flight: asyncio.Task[ResolvedImage]) -> None:
        self._flights.pop(key, None)
        if not flight.cancelled():
            flight.exception()  # every caller may have given up: nobody else takes note of it

    async def close(self) -> None:
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
