"""The agent and encrypted networks: keys from the session to the kernel, confirmations and new epochs back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from node import view
from overlay.interface import EncryptionKey, Peer, PublishedPort
from proto.dispatch_pb2 import Item, ManagerMessage, NetworkKeys, NetworkPeer
from proto.objects_pb2 import NetworkKey
from tests.fakes_dispatcher import Host, Manager, host_on, network, serving, standing, task
from tests.test_agent_view import LOCAL, end, mirror, net, port, svc
from tests.waiting import until


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with host_on(tmp_path) as made:
        yield made


@pytest.fixture
async def manager() -> AsyncIterator[Manager]:
    made = Manager()
    secret = network()
    secret.spec.options["encrypted"] = ""
    made.items |= standing([secret])
    async with serving(made):
        yield made


def keys(newest: int) -> ManagerMessage:
    ring = [NetworkKey(serial=serial, key=bytes([serial]) * 20) for serial in range(newest, newest - 3, -1)]
    return ManagerMessage(keys=NetworkKeys(keys=ring))


async def test_keys_reach_the_kernel_and_are_confirmed_once_each_session(host: Host, manager: Manager) -> None:
    host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.send(keys(5))
    await until(lambda: manager.keys_applied == [5])
    assert host.network.state.keys == tuple(EncryptionKey(serial, bytes([serial]) * 20) for serial in (5, 4, 3))
    assert host.network.state.networks[0].encrypted
    manager.send(keys(6))
    await until(lambda: manager.keys_applied == [5, 6])
    manager.end_session()
    await until(lambda: manager.calls == 2 and manager.in_session)
    manager.send(keys(6))
    await until(lambda: manager.keys_applied == [5, 6, 6])


async def test_keys_that_are_withdrawn_leave_the_kernel_and_no_file_ever_held_them(
    host: Host, manager: Manager
) -> None:
    host.run(manager.addr)
    await until(lambda: manager.in_session)
    manager.send(keys(5))
    manager.put(task())
    await until(lambda: manager.last("t1").state and manager.keys_applied)
    held = b"".join(host.files().values())
    assert held
    assert not any(bytes([serial]) * 20 in held for serial in (5, 4, 3))
    manager.send(ManagerMessage(keys=NetworkKeys()))
    await until(lambda: not host.network.state.keys)


async def test_another_epoch_is_told_at_once(host: Host, manager: Manager) -> None:
    host.run(manager.addr)
    await until(lambda: manager.in_session)
    assert manager.hellos[0].description.encryption_epoch == 1
    host.network.epoch = 2
    manager.send(keys(5))  # any application will do
    await until(lambda: manager.hellos[-1].description.encryption_epoch == 2)


# --- the picture -----------------------------------------------------------------------------------------


def secret_net() -> dict[str, Item]:
    made = net("net1")
    made["network/net1"].network.spec.options["encrypted"] = ""
    return made


def test_peers_carry_the_epochs_that_the_managers_told() -> None:
    peer = NetworkPeer(node_id="n2", vtep_addr="192.0.2.2", index=8, encryption_epoch=99)
    state = view.HostStates().draw(mirror(secret_net(), {"peer/n2": Item(peer=peer)}), LOCAL)
    assert state.peers == (Peer("n2", "192.0.2.2", 8, encryption_epoch=99),)


@pytest.mark.parametrize(("able", "backends"), [(True, (("10.0.1.4", 80),)), (False, ())])
def test_a_host_that_cannot_encrypt_refuses_published_traffic_to_an_encrypted_network(
    able: bool, backends: tuple[tuple[str, int], ...]
) -> None:
    local = view.Local(LOCAL.node_id, LOCAL.vtep, LOCAL.index, encrypts=able)
    seen = mirror(secret_net(), svc(ports=(port(8000, 80),)), end("t1", "10.0.1.4", node="n2"))
    assert view.HostStates().draw(seen, local).published == (PublishedPort("tcp", 8000, backends),)
