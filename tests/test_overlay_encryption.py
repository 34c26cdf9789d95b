"""The guard and the policies of encrypted networks in a real kernel, also one that cannot encrypt itself; with ESP:
tests/test_vm_esp.py."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from overlay import xfrm
from overlay.encryption import HostEncryption
from overlay.esp import Changes, Policy
from overlay.interface import HostState
from overlay.namespaces import NamespaceThread, remove
from overlay.netlink import Netlink
from tests.test_overlay_esp import SECRET, state

pytestmark = pytest.mark.root

T = TypeVar("T")
ONE = Policy("192.0.2.1", "192.0.2.2", 4789, 0x12345)
OTHER = Policy("192.0.2.1", "192.0.2.3", 4789, 0x12346)
CLEAR = replace(state(1, 5), networks=(replace(SECRET, encrypted=False),))
TABLE = "pyswarm_t_esp"


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Callable[[Callable[[], T]], T]]:
    """Runs a function in a fresh network namespace."""
    thread, path = NamespaceThread(), tmp_path / "netns"

    def run(action: Callable[[], T]) -> T:
        def entered() -> T:
            with thread.inside(path):
                return action()

        return thread.submit(entered).result(timeout=30)

    thread.submit(lambda: thread.create(path)).result(timeout=30)
    yield run
    thread.submit(lambda: remove(path)).result(timeout=30)
    thread.close()


def ruleset() -> str:
    return subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True, timeout=20).stdout


def flush() -> None:
    subprocess.run(["nft", "flush", "ruleset"], check=True, timeout=20)


def applied(encryption: HostEncryption, wanted: HostState, *standing: int) -> Callable[[], str]:
    def act() -> str:
        encryption.apply(wanted, frozenset(standing))
        return ruleset()

    return act


def test_the_guard_stands_for_as_long_as_the_network_does_and_comes_back(
    inside: Callable[[Callable[[], str]], str], tmp_path: Path
) -> None:
    encryption = HostEncryption(tmp_path / "encryption", TABLE)
    assert TABLE not in inside(applied(encryption, CLEAR))
    shown = inside(applied(encryption, state(1, 5)))
    assert "elements = { 0x1001 }" in shown
    assert shown.count("@encrypted ipsec") == 2

    def repaired() -> str:
        flush()
        encryption.forget()
        return applied(encryption, state(1, 5), SECRET.vni)()

    assert inside(repaired) == shown
    anew = HostEncryption(tmp_path / "encryption", TABLE)
    assert "0x1001" in inside(applied(anew, CLEAR, SECRET.vni)), "its last task is not detached yet"
    assert TABLE not in inside(applied(anew, CLEAR))


def test_policies_are_read_back_as_they_were_set_and_foreign_ones_are_not_seen(
    inside: Callable[[Callable[[], None]], None],
) -> None:
    def act() -> None:
        foreign = "src 192.0.2.1/32 dst 192.0.2.2/32 proto udp dport 4789 dir out tmpl proto esp reqid 7 mode transport"
        subprocess.run(["ip", "xfrm", "policy", "add", *foreign.split()], check=True, timeout=20)
        with Netlink(xfrm.NETLINK_XFRM) as netlink:
            xfrm.change(netlink, Changes((), (), (ONE, OTHER), (), ()))
            assert xfrm.read(netlink, {}).policies == {ONE, OTHER}
            moved = replace(ONE, spi=0x54321)
            xfrm.change(netlink, Changes((), (), (moved,), (OTHER,), ()))
            assert xfrm.read(netlink, {}).policies == {moved}
            xfrm.remove_all(netlink)
            assert not xfrm.read(netlink, {}).policies
        left = subprocess.run(["ip", "xfrm", "policy"], capture_output=True, text=True, check=True, timeout=20).stdout
        assert "reqid 7" in left

    inside(act)


@pytest.mark.skipif(xfrm.encrypts(), reason="this kernel can encrypt")
def test_a_kernel_that_cannot_encrypt_says_so_and_what_to_do(
    inside: Callable[[Callable[[], str]], str], tmp_path: Path
) -> None:
    encryption = HostEncryption(tmp_path / "encryption", TABLE)
    inside(applied(encryption, state(1, 5)))
    assert "load the modules esp4" in encryption.fault
    assert encryption.status is not None
    assert not encryption.status.supported
