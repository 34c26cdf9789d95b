"""A lab: several hosts on one machine, each with its own network namespace, hostname, address, directories
and daemon, joined by a bridge. Nothing is simulated; a lab is also the base of the project's own tests."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from proto.local_pb2 import InfoReply
from proto.objects_pb2 import MANAGER, Node, NodeStatus
from swarm.lab import client, hosts
from swarm.lab.plan import (
    DEFAULT_NAME,
    HOSTS_MAX,
    NAME,
    RUN_ROOT,
    STATE_ROOT,
    Host,
    Plan,
    free_subnet,
    partition_rules,
    wanted_hosts,
)
from swarm.lab.shell import LabError, ip_batch, run, run_json, succeeds

READY_TIMEOUT_S = 180.0
POLL_S = 0.05

Say = Callable[[str], None]


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """One command at a time changes a lab."""
    RUN_ROOT.mkdir(parents=True, exist_ok=True)
    with open(RUN_ROOT / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError(f"another command is changing lab {name}: try again when it is done") from None
        yield


@contextmanager
def _choosing() -> Iterator[None]:
    """One lab at a time chooses its subnet: it waits for another to have written down its own."""
    directory = os.open(RUN_ROOT, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def names() -> list[str]:
    return sorted(path.parent.name for path in STATE_ROOT.glob("*/lab.json"))


def load(name: str) -> Plan:
    """Raises LabError when there is no such lab."""
    try:
        raw = json.loads((STATE_ROOT / name / "lab.json").read_text())
    except FileNotFoundError:
        known = ", ".join(names()) or "none"
        raise LabError(f"no such lab: {name} (there are: {known}); make it with `pyswarm lab up {name}`") from None
    # Absent in the file of a lab of an older version.
    registries, generic = (tuple(raw.get(key, ())) for key in ("insecure_registries", "generic_resources"))
    return Plan(raw["name"], raw["subnet"], tuple(Host(**host) for host in raw["hosts"]), registries, generic)


def find_host(plan: Plan, name: str) -> Host:
    host = plan.host(name)
    if host is None:
        raise LabError(f"lab {plan.name} has no host {name}; its hosts: {' '.join(h.name for h in plan.hosts)}")
    return host


def _save(plan: Plan) -> None:
    plan.state_dir.mkdir(parents=True, exist_ok=True)
    temporary = plan.state_dir / "lab.json.tmp"
    temporary.write_text(json.dumps(asdict(plan), indent=1))
    temporary.replace(plan.state_dir / "lab.json")


def up(
    name: str,
    managers: int,
    workers: int,
    say: Say,
    *,
    insecure_registries: Sequence[str] = (),
    generic_resources: Sequence[str] = (),
) -> list[Node]:
    """Make the lab as wanted, start what does not run, join what has not joined; returns the nodes.
    `insecure_registries`: host[:port] that all hosts speak to unverified; `generic_resources`: what each offers, such
    as "gpu=2"; none given = as the lab has it.
    A lab that did not exist before is taken down again if anything fails or the user interrupts."""
    if not NAME.match(name):
        raise LabError(f"lab name {name!r}: use up to 20 lower-case letters, digits and dashes, a letter first")
    if managers < 1 or workers < 0 or managers + workers > HOSTS_MAX:
        raise LabError(f"a lab has 1 to {HOSTS_MAX} hosts, at least one of them a manager")
    with _locked(name):
        existed = name in names()
        with _choosing():
            plan = _planned(name, managers, workers, tuple(insecure_registries), tuple(generic_resources))
            _save(plan)
        try:
            return _bring_up(plan, say)
        except BaseException:
            if not existed:
                say(f"lab {name} could not be completed: removing what was made")
                _take_down(plan)
                _sweep(name)
            raise


def _planned(name: str, managers: int, workers: int, insecure: tuple[str, ...], generic: tuple[str, ...]) -> Plan:
    if name not in names():
        used = [item["dst"] for item in run_json("ip", "-j", "-4", "route") if item["dst"] != "default"]
        subnet = free_subnet([*used, *(load(other).subnet for other in names())])
        if subnet is None:
            raise LabError("no free subnet for a lab in 192.168.200.0/24 to 192.168.249.0/24: take a lab down first")
        return Plan(name, subnet, wanted_hosts(name, subnet, managers, workers), insecure, generic)
    plan = load(name)
    wanted = wanted_hosts(name, plan.subnet, managers, workers)
    surplus = [host.name for host in plan.hosts if host not in wanted]
    if surplus:
        raise LabError(
            f"lab {name} has more hosts than asked for ({' '.join(surplus)}): `pyswarm lab down {name}` first"
        )
    for what, given, has in (
        ("insecure registries", insecure, plan.insecure_registries),
        ("generic resources", generic, plan.generic_resources),
    ):
        if given and given != has:
            had = " ".join(has) or "none"
            raise LabError(f"lab {name} was made with other {what} ({had}): `pyswarm lab down {name}` first")
    return replace(plan, hosts=wanted)


def _bring_up(plan: Plan, say: Say) -> list[Node]:
    _lay_underlay(plan)
    for host in plan.hosts:
        hosts.plug_in(plan, host)
        hosts.start_daemon(plan, host)
    say(f"{len(plan.hosts)} hosts on {plan.subnet}: {' '.join(host.name for host in plan.hosts)}")
    first = plan.hosts[0]
    for host in plan.hosts:
        client.wait_for_daemon(host)
    if client.info(first).state == InfoReply.INACTIVE:
        client.init(first)
        say(f"{first.name} leads a new swarm")
    joined = [host for host in plan.hosts[1:] if client.info(host).state == InfoReply.INACTIVE]
    for host in joined:
        client.join(host, first)
        say(f"{host.name} joined as a {'manager' if host.manager else 'worker'}")
    return wait_ready(plan)


def wait_ready(plan: Plan, timeout_s: float = READY_TIMEOUT_S) -> list[Node]:
    """The nodes, once every host is READY and every manager reachable. Raises LabError naming the missing."""
    deadline = time.monotonic() + timeout_s
    while True:
        missing = [host.name for host in plan.hosts]
        try:
            nodes = client.nodes(plan)
            ready = {n.description.hostname for n in nodes if n.status.state == NodeStatus.READY and _role_settled(n)}
            missing = [host.name for host in plan.hosts if host.name not in ready]
            if not missing:
                return nodes
        except LabError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise LabError(
                f"not ready within {timeout_s:g} s: {' '.join(missing)}; see {plan.state_dir}/<host>/daemon.log"
            )
        time.sleep(POLL_S)


def _role_settled(node: Node) -> bool:
    return node.spec.desired_role == node.role and (node.role != MANAGER or node.manager_status.reachable)


def _lay_underlay(plan: Plan) -> None:
    """The bridge, the machine's own address on it, and the way out for the hosts."""
    if not succeeds("ip", "link", "show", plan.bridge):
        ip_batch(
            [
                f"link add {plan.bridge} type bridge",
                f"addr add {plan.gateway}/{plan.prefix_bits} dev {plan.bridge}",
                f"link set {plan.bridge} up",
            ]
        )
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    table = plan.nft_table
    run(
        "nft",
        "-f",
        "-",
        text=f"""
table ip {table}
delete table ip {table}
table ip {table} {{
  chain post {{
    type nat hook postrouting priority srcnat;
    ip saddr {plan.subnet} oifname != "{plan.bridge}" masquerade
  }}
}}
""",
    )


def down(name: str) -> None:
    """Remove the lab and everything of it."""
    plan = load(name)
    with _locked(name):
        _take_down(plan)
        _sweep(name)


def _sweep(name: str) -> None:
    """The lock (still held), and the directories of all labs when this was the last."""
    (RUN_ROOT / f"{name}.lock").unlink(missing_ok=True)
    for root in (RUN_ROOT, STATE_ROOT):
        for directory in (root, root.parent):
            with contextlib.suppress(OSError):  # others are in it, it is gone, or it is a mount point
                directory.rmdir()


def _take_down(plan: Plan) -> None:
    for host in plan.hosts:
        hosts.pull_plug(host)
    if succeeds("ip", "link", "show", plan.bridge):
        run("ip", "link", "del", plan.bridge)
    if succeeds("nft", "list", "table", "ip", plan.nft_table):
        run("nft", "delete", "table", "ip", plan.nft_table)
    hosts.unmount_below(plan.run_dir)
    hosts.remove_cgroups(f"/pyswarm-lab/{plan.name}")
    if len(names()) <= 1:
        hosts.remove_cgroups("/pyswarm-lab")
    shutil.rmtree(plan.run_dir, ignore_errors=True)
    shutil.rmtree(plan.state_dir, ignore_errors=True)


def load_image(archive: Path) -> list[str]:
    """Load into the machine's own store; returns the names loaded. Raises LabError."""
    from node.images import ImageStore
    from node.interface import ImageFault

    store = ImageStore(Path(hosts.IMAGE_STORE), Path("/run/containers/storage"), (), frozenset())
    try:
        return asyncio.run(store.load(archive, "", lambda line: None))
    except ImageFault as fault:
        raise LabError(f"cannot load {archive}: {fault}") from None


def start(plan: Plan, host: Host) -> None:
    """Power on: what `kill` ended runs again."""
    with _locked(plan.name):
        hosts.plug_in(plan, host)
        hosts.start_daemon(plan, host)
        client.wait_for_daemon(host)


def partition(plan: Plan, sides: Sequence[Sequence[Host]]) -> None:
    """Cut every pair of hosts of different sides, both ways; replaces an earlier partition."""
    with _locked(plan.name):
        heal_locked(plan)
        for side in sides:
            others = [host for other in sides if other is not side for host in other]
            for host in side:
                run("nsenter", f"--net={host.netns_path}", "nft", "-f", "-", text=partition_rules(host, others))


def heal(plan: Plan) -> None:
    with _locked(plan.name):
        heal_locked(plan)


def heal_locked(plan: Plan) -> None:
    for host in plan.hosts:
        if host.netns_path.exists():
            run(
                "nsenter",
                f"--net={host.netns_path}",
                "nft",
                "-f",
                "-",
                text="table ip pyl_partition\ndelete table ip pyl_partition\n",
            )


__all__ = [
    "DEFAULT_NAME",
    "down",
    "find_host",
    "heal",
    "load",
    "load_image",
    "names",
    "partition",
    "start",
    "up",
    "wait_ready",
]
