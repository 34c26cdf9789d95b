"""Keeps this host's encrypted networks encrypted: its epoch, its security associations and policies, its guard against
clear packets. Namespace thread only; what these are is decided in `overlay/esp.py`.

What was made with the present epoch is remembered in a file (fingerprints, no keys), written before it is made: so an
agent that starts anew adopts what stands, and nothing is ever made twice, whoever deleted it and whoever was killed.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from overlay import nfnl, nft, xfrm
from overlay.esp import (
    ENCRYPTED,
    Association,
    Encryption,
    changes,
    fault,
    guard,
    guarded,
    kept,
    lost,
    plan_encryption,
    vni_of,
)
from overlay.interface import EncryptionStatus, HostState, NetworkError
from overlay.netlink import NETLINK_NETFILTER, Netlink
from overlay.tables import Tables, delete_tables

log = structlog.get_logger("overlay")

MADE_MAX = 100_000
"""Fingerprints remembered, 1.7 MB: years of rotations with a hundred peers. Then a new epoch is due."""


def random_epoch() -> int:
    """Never 0, which means none."""
    return secrets.randbits(63) + 1


@dataclass(slots=True)
class Ledger:
    """The epoch, and the fingerprints of what was made with it."""

    path: Path
    new_epoch: Callable[[], int] = random_epoch
    epoch: int = 0
    made: set[str] = field(default_factory=set)

    def load(self) -> None:
        """Once. Without the file (the host has started, most of the time) the epoch is a new one."""
        with contextlib.suppress(OSError, ValueError):
            first, *lines = self.path.read_text(encoding="ascii").split("\n")
            self.epoch = int(first, 16)
            self.made = set(lines[:-1])  # what follows the last newline was being written when the agent was killed
        if not self.epoch:
            self.renew()

    def renew(self) -> None:
        """Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        epoch = self.new_epoch()
        draft = self.path.with_suffix(".new")
        draft.write_text(f"{epoch:x}\n", encoding="ascii")
        draft.replace(self.path)
        self.epoch, self.made = epoch, set()

    def note(self, items: Iterable[Association]) -> None:
        """These will be made now. Raises OSError."""
        new = {item.fingerprint for item in items} - self.made
        if new:
            with self.path.open("a", encoding="ascii") as file:
                file.write("".join(f"{fingerprint}\n" for fingerprint in sorted(new)))
            self.made |= new


class HostEncryption:
    def __init__(self, ledger_path: Path, table: str) -> None:
        self.ledger = Ledger(ledger_path)
        self.fault = ""
        """Why encrypted networks do not work here now."""
        self._supported: bool | None = None
        self._serial = 0
        self._tables = Tables(table, lambda family, table, chain: [], 0)
        self._vnis: frozenset[int] | None = None
        """Guarded now; None = not looked yet."""
        self._done: object = None
        """What the associations were made for: as long as it is equal, nothing is to be done."""
        self._known: dict[tuple[str, int], Association] = {}

    @property
    def status(self) -> EncryptionStatus | None:
        """None before `prepare`. On any thread."""
        return None if self._supported is None else EncryptionStatus(self._supported, self.ledger.epoch, self._serial)

    def prepare(self) -> None:
        """Know the epoch, and whether the kernel can. Raises OSError."""
        if not self.ledger.epoch:
            self.ledger.load()
        if self._supported is None:
            self._supported = xfrm.encrypts() and self._accepts_guard()

    def _accepts_guard(self) -> bool:
        """Loaded and deleted in one transaction: nothing of it is ever seen."""
        scratch = f"{self._tables.name}_probe"
        try:
            nft.run(f"{guard(scratch, 1).text()}delete table ip {scratch}\n")
        except NetworkError as error:
            log.debug("no_ipsec_in_nftables", error=str(error))
            return False
        return True

    def apply(self, state: HostState, standing_vnis: frozenset[int]) -> None:
        """Before the networks are made. `standing_vnis`: of the networks that stand here, also those that are about to
        go. Sets `fault` instead of raising: clear networks go on."""
        before, self.fault = self.fault, ""
        wants = any(network.encrypted for network in state.networks)
        try:
            self.prepare()
            self._guard(state, standing_vnis)
            self._associate(state)
            if wants:
                self.fault = fault(state, bool(self._supported))
        except (OSError, NetworkError) as error:
            self._done = None
            self.fault = f"encryption cannot be set up: {error}"
        if self.fault and self.fault != before and wants:
            log.warning("encryption_fault", reason=self.fault)

    def forget(self) -> None:
        """Have the next `apply` read the kernel and repair, with a line in the log."""
        self._done = None

    # --- clear packets ---

    def _guard(self, state: HostState, standing_vnis: frozenset[int]) -> None:
        """A network that left the state is guarded until it is gone."""
        layouts = (guard(self._tables.name, state.vxlan_port),)
        with Netlink(NETLINK_NETFILTER) as netlink:
            before = self._standing_vnis(netlink) if self._vnis is None else self._vnis
            vnis = before & standing_vnis | {network.vni for network in state.networks if network.encrypted}
            if not vnis:
                if before:
                    delete_tables(netlink, self._tables.name)
            elif vnis != self._vnis:
                self._tables.adopt(netlink, layouts, guarded(vnis))
            elif self._done is None and self._tables.audit(netlink, layouts, lambda: guarded(vnis)):
                log.warning("overlay_repaired", object="guard of encrypted networks")
        self._vnis = vnis

    def _standing_vnis(self, netlink: Netlink) -> frozenset[int]:
        """As an earlier agent left them."""
        name = self._tables.name
        if not any(table == name for table, _ in nfnl.chains(netlink)):
            return frozenset()
        return frozenset(vni_of(element) for element in nfnl.elements(netlink, socket.AF_INET, name, (ENCRYPTED,)))

    # --- associations ---

    def _associate(self, state: HostState) -> None:
        wants = any(network.encrypted for network in state.networks)
        inputs = (wants, bool(self._vnis), state.keys, state.peers, state.vtep, state.index, state.vxlan_port)
        if inputs == self._done or not self._supported:
            return
        with Netlink(xfrm.NETLINK_XFRM) as netlink:
            actual = xfrm.read(netlink, self._known)
            self._renew_epoch(state, actual)
            wanted = plan_encryption(state, self.ledger.epoch)
            keep = kept(state, self.ledger.epoch, actual.associations) if self._vnis else frozenset()
            todo = changes(wanted, actual, keep)
            if todo and self._known and self._done is None:
                log.warning("overlay_repaired", object="encryption", added=len(todo.add), directed=len(todo.direct))
            self.ledger.note(todo.add)
            xfrm.change(netlink, todo)
        self._known = {item.place: item for item in wanted.associations | keep}
        self._done, self._serial = inputs, state.keys[0].serial if state.keys else 0

    def _renew_epoch(self, state: HostState, actual: Encryption) -> None:
        """If it is used up. Also when the last encrypted network has gone: peers then know the new one long before the
        next network comes."""
        made = frozenset(self.ledger.made)
        idle = bool(made) and not self._vnis
        if idle or len(made) > MADE_MAX or lost(plan_encryption(state, self.ledger.epoch), actual, made):
            log.info("encryption_epoch_renewed", idle=idle)
            self.ledger.renew()

    def teardown(self) -> None:
        """Leave nothing. Raises OSError."""
        with Netlink(NETLINK_NETFILTER) as netlink:
            delete_tables(netlink, self._tables.name)
        with contextlib.suppress(OSError), Netlink(xfrm.NETLINK_XFRM) as netlink:
            xfrm.remove_all(netlink)
        self.ledger.path.unlink(missing_ok=True)
        self.ledger = Ledger(self.ledger.path)
        self._supported = self._vnis = self._done = None
