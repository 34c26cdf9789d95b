"""Examinations of this host's networking, as the managers ask for them: probes, and facts of the host.

Everything has a deadline: an examination ends after EXAM_S, and what was not tried by then is told as such.
"""

from __future__ import annotations

import asyncio
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable

import structlog

from dns.ask import NoAnswer, ask
from node.hostfacts import Unreadable, firewall_drops, listeners
from node.shell import Shell
from node.world import World
from overlay.foreign import Packet, packets_of
from overlay.interface import HostNetwork, HostState, Inspection, NetworkError
from overlay.reachability import connect, outcome_of, ping
from proto.dispatch_pb2 import Examination, Examined, HostFacts, NetworkFacts, Probe, ProbeResult
from proto.objects_pb2 import SCTP, TCP, UDP

log = structlog.get_logger()

EXAMS_MAX = 4
"""At once on one host: people who ask at the same time; each is bounded by the next two."""
PROBES_MAX = 2_000
PROBES_AT_ONCE = 64
"""Sockets that one examination has open."""
EXAM_S = 20.0
"""500 probes, the most that managers ask for, all of which take the 2.5 s of a connection that nobody answers."""
RESULTS_EVERY_S = 0.5
"""Results travel together; a person who waits sees progress as often."""
ENDPOINTS_MAX = 5_000
"""Of one network, told to the managers: beyond it they are not compared."""
DRIFT_MAX = 50
"""Entries told of a network that differs: whoever needs more looks at the host itself."""

_L4_NUMBERS = {"tcp": TCP, "udp": UDP, "sctp": SCTP}


class Examiner:
    def __init__(
        self,
        network: HostNetwork,
        world: World,
        shell: Shell,
        names_pid: Callable[[], int],
        send: Callable[[Examined], None],
    ) -> None:
        """`send` queues and returns at once."""
        self._network, self._world, self._shell = network, world, shell
        self._names_pid, self._send = names_pid, send
        self._running: dict[str, asyncio.Task[None]] = {}

    def handle(self, message: Examination) -> None:
        exam_id = message.exam_id
        if message.cancel:
            if exam_id in self._running:
                self._running[exam_id].cancel()
            return
        why = ""
        if len(self._running) >= EXAMS_MAX:
            why = f"this node is being examined for {EXAMS_MAX} others: try again in {EXAM_S:g} s"
        elif len(message.probes) > PROBES_MAX:
            why = f"{len(message.probes)} probes are more than the {PROBES_MAX} that a node carries out at once"
        if why:
            self._send(Examined(exam_id=exam_id, done=True, error=why))
            return
        life = asyncio.create_task(self._run(message), name=f"examination {exam_id}")
        self._running[exam_id] = life
        life.add_done_callback(lambda _: self._running.pop(exam_id, None))

    def cancel_all(self) -> None:
        for life in self._running.values():
            life.cancel()

    async def close(self) -> None:
        lives = list(self._running.values())
        self.cancel_all()
        await asyncio.gather(*lives, return_exceptions=True)

    async def _run(self, message: Examination) -> None:
        exam_id = message.exam_id
        ready: list[ProbeResult] = []
        reporting = asyncio.create_task(self._report(exam_id, ready))
        last = Examined(exam_id=exam_id, done=True)
        try:
            async with asyncio.timeout(EXAM_S):
                inspection = await self._network.inspect()
                last.facts.CopyFrom(await self._facts(inspection))
                full_bytes = max((each.full_bytes for each in inspection.networks), default=0)
                turn = asyncio.Semaphore(PROBES_AT_ONCE)
                await asyncio.gather(*(self._try(probe, full_bytes, turn, ready) for probe in message.probes))
        except TimeoutError:
            pass  # the managers see which results are missing
        except NetworkError as error:
            last.error = str(error)
        except Exception as error:
            log.exception("an examination failed in a way that was not foreseen", exam_id=exam_id)
            last.error = f"internal error: {type(error).__name__}: {error}"
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
        last.results.extend(ready)
        self._send(last)

    async def _report(self, exam_id: str, ready: list[ProbeResult]) -> None:
        while True:
            await asyncio.sleep(RESULTS_EVERY_S)
            if ready:
                self._send(Examined(exam_id=exam_id, results=ready))
                ready.clear()

    async def _try(self, probe: Probe, full_bytes: int, turn: asyncio.Semaphore, ready: list[ProbeResult]) -> None:
        async with turn:
            try:
                result = await self._carry_out(probe, full_bytes)
            except NetworkError as error:
                result = ProbeResult(outcome=ProbeResult.FAILED, detail=str(error))
            except OSError as error:
                result = ProbeResult(outcome=outcome_of(error), detail=str(error))
        result.number = probe.number
        ready.append(result)

    async def _carry_out(self, probe: Probe, full_bytes: int) -> ProbeResult:
        def open_socket(make: Callable[[], socket.socket]) -> Awaitable[socket.socket]:
            return self._network.inside(probe.task_id, make)

        match probe.WhichOneof("what"):
            case "ping":
                if not probe.task_id and not full_bytes:  # it has no overlay that a path could be too narrow for
                    probe.ping.full = False
                return await ping(probe.ping, open_socket, 0 if probe.task_id else full_bytes)
            case "connect":
                return await connect(probe.connect, open_socket)
            case "lookup":
                try:
                    return ProbeResult(answers=await ask(probe.lookup.name, open_socket, probe.lookup.ipv6))
                except NoAnswer as error:
                    return ProbeResult(outcome=ProbeResult.SILENT, detail=str(error))
        return ProbeResult(outcome=ProbeResult.FAILED, detail="this node's version does not know the probe")

    # ---- facts

    async def _facts(self, inspection: Inspection) -> HostFacts:
        facts = HostFacts(
            networks=self._networks(inspection),
            forwards=inspection.forwards,
            strict_links=inspection.strict_links,
            tables_missing=inspection.tables_missing,
            networks_error=self._shell.networks.error,
            names_error=self._shell.names.error,
            names_pid=self._names_pid(),
            underlay_link=inspection.underlay_link,
            underlay_mtu_bytes=inspection.underlay_mtu_bytes,
        )
        state = self._world.host_state()
        if state is not None:
            try:
                facts.drops.extend(await firewall_drops(_packets(state, inspection)))
                ports = [(_L4_NUMBERS[port.protocol], port.port) for port in state.published]
                facts.listeners.extend(await asyncio.to_thread(listeners, ports))
            except (Unreadable, OSError) as error:
                facts.error = str(error)
        return facts

    def _networks(self, inspection: Inspection) -> list[NetworkFacts]:
        known: defaultdict[str, list[str]] = defaultdict(list)
        for endpoint in self._world.mirror.endpoints():
            known[endpoint.network_id].append(endpoint.address)
        return [
            NetworkFacts(
                network_id=drift.network_id,
                mtu_bytes=drift.mtu_bytes,
                endpoints=known[drift.network_id][:ENDPOINTS_MAX],
                missing=drift.missing[:DRIFT_MAX],
                foreign=drift.foreign[:DRIFT_MAX],
            )
            for drift in inspection.networks
        ]


def _packets(state: HostState, inspection: Inspection) -> list[Packet]:
    return packets_of(
        state.vxlan_port,
        inspection.underlay_link,
        inspection.leg,
        [peer.vtep for peer in state.peers],
        [(port.protocol, port.port) for port in state.published],
    )
