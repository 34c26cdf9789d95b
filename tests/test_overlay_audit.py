"""What somebody changed by hand is as before after the next audit, on the real kernel."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from overlay.addressing import port_name
from overlay.sysctls import FORWARD6
from tests.overlay_lab import OverlayLab
from tests.overlay_pair import A2_IPV6, PORT, VIP, audit, build, sandbox, works

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shared() -> Iterator[OverlayLab]:
    made = asyncio.run(build())
    yield made
    asyncio.run(made.close())


DAMAGE = {
    "forwarding entry": ("sandbox", "bridge fdb del 02:42:0a:4d:01:0c dev vx0 self"),
    "bridge's entry": ("sandbox", "bridge fdb del 02:42:0a:4d:01:0c dev vx0 master"),
    "neighbour": ("sandbox", "ip neigh del 10.77.1.12 dev vx0"),
    "vxlan device": ("sandbox", "ip link del vx0"),
    "bridge": ("sandbox", "ip link del br0"),
    "leg": ("host", "ip link del pyst1-35t"),
    "leg's end": ("sandbox", "ip link set leg nomaster"),
    "leg's address": ("host", "ip addr flush dev pyst1-35t"),
    "task's link": ("task", "ip link del eth0"),
    "task's link down": ("task", "ip link set eth0 down"),
    "task's address": ("task", "ip addr flush dev eth0"),
    "task's route": ("task", "ip route del default"),
    "task's rules": ("task", "nft flush ruleset"),
    "task's elements": ("task", "nft flush map ip pyswarm backends"),
    "task's chain": ("task", "nft flush chain ip pyswarm balance"),
    "host's rules": ("host", "nft flush ruleset"),
    "host's elements": ("host", "nft flush map ip pyswarm_t1 published"),
    "forwarding off": ("host", "sysctl -qw net.ipv4.ip_forward=0"),
    "IPv6 neighbour": ("sandbox", f"ip neigh del {A2_IPV6} dev vx0"),
    "IPv6 off on the device": ("sandbox", "sysctl -qw net.ipv6.conf.vx0.disable_ipv6=1"),
    "leg's IPv6 address": ("host", "ip -6 addr flush dev pyst1-35t scope global"),
    "leg's sysctls": ("host", "sysctl -qw net.ipv4.conf.pyst1-35t.forwarding=0 net.ipv4.conf.pyst1-35t.rp_filter=1"),
    "task's IPv6 address": ("task", "ip -6 addr flush dev eth0 scope global"),
    "task's IPv6 off": ("task", "sysctl -qw net.ipv6.conf.eth0.disable_ipv6=1"),
    "task's IPv6 route": ("task", "ip -6 route del default"),
    "bridge down": ("sandbox", "ip link set br0 down"),
    "device out of the bridge": ("sandbox", "ip link set vx0 nomaster"),
    "task's port out of the bridge": ("sandbox", f"ip link set {port_name('a1')} nomaster"),
    "task's port down": ("sandbox", f"ip link set {port_name('a1')} down"),
    "a wrong forwarding entry": ("sandbox", "bridge fdb replace 02:42:0a:4d:01:0c dev vx0 dst 192.168.99.77 self"),
    "a wrong neighbour": ("sandbox", "ip neigh replace 10.77.1.12 lladdr 02:00:00:00:00:09 dev vx0 nud permanent"),
    "leg down": ("host", "ip link set pyst1-35t down"),
    "leg's MAC": ("host", "ip link set pyst1-35t address 02:00:00:00:00:09"),
    "leg's MTU": ("host", "ip link set pyst1-35t mtu 1000"),
    "leg's route": ("host", "ip route del 10.77.1.0/24"),
    "leg's IPv6 route": ("host", "ip -6 route del fd00:77:1::/64 dev pyst1-35t"),
    "leg's way back to ::1": ("host", "ip -6 route del local ::1 dev pyst1-35t table main"),
    "task's neighbour": ("task", "ip neigh del 10.77.1.1 dev eth0"),
    "task's own route": ("task", "ip route del 10.77.1.0/24"),
    "task's IPv6 own route": ("task", "ip -6 route del fd00:77:1::/64 dev eth0"),
    "task's MTU": ("task", "ip link set eth0 mtu 1300"),
    "task's MTU below that of IPv6": ("task", "ip link set eth0 mtu 1000"),
    "IPv6 forwarding off": ("host", "sysctl -qw net.ipv6.conf.all.force_forwarding=0"),
    "a policy": ("host", "nft chain ip pyswarm_t1 passage { policy drop ; }"),
    "a rule in the place of another": ("host", "nft replace rule ip pyswarm_t1 passage handle PASSAGE drop"),
    "an element that stands for all": ("host", "nft add element ip pyswarm_t1 gateways { * }"),
    "sandbox": ("host", "umount SANDBOX"),
}


def do_damage(lab: OverlayLab, damage: str) -> subprocess.CompletedProcess[str]:
    where, command = DAMAGE[damage]
    host = lab.hosts[0]
    netns = {"sandbox": sandbox(host), "host": host.netns, "task": lab.path("a1")}[where]
    listed = lab.sockets.run(host.netns, "nft", "-a", "list", "table", "ip", "pyswarm_t1").stdout
    (handle,) = re.findall(r"ct status dnat accept # handle (\d+)", listed)[:1] or ["0"]
    command = command.replace("SANDBOX", str(sandbox(host))).replace("PASSAGE", handle)
    return lab.sockets.run(netns, *command.split())


LEG_SYSCTLS = ("forwarding", "rp_filter", "route_localnet")
SYSCTLS = {
    "sandbox": ["net.ipv6.conf.vx0.disable_ipv6"],
    "host": ["net.ipv4.ip_forward", *FORWARD6, *(f"net.ipv4.conf.pyst1-35t.{name}" for name in LEG_SYSCTLS)],
    "task": ["net.ipv6.conf.eth0.disable_ipv6"],
}


def made(word: str) -> bool:
    """By the kernel: a random MAC."""
    return re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", word) is not None and not word.startswith("02:4")


def picture(lab: OverlayLab) -> dict[tuple[str, str], list[str]]:
    """What the kernel of h1 holds, without what it numbers itself."""
    host = lab.hosts[0]
    found = {}
    for where, netns in (("sandbox", sandbox(host)), ("host", host.netns), ("task", lab.path("a1"))):

        def ask(command: str, netns: Path = netns) -> str:
            return lab.sockets.run(netns, *command.split()).stdout

        shown = re.sub(r" state \S+", "", ask("ip -o link"))  # which the kernel brings up to date later
        links = (line.partition("link-netnsid")[0].split() for line in shown.splitlines())
        kept = [[words[1].partition("@")[0], *words[2:], ""] for words in links]
        found[where, "links"] = sorted(" ".join(word for word in words if not made(word)) for words in kept)
        found[where, "addresses"] = sorted(re.findall(r"^\d+: (\S+ +inet6? \S+)", ask("ip -o addr"), re.M))
        loopback6 = "ip -6 route show table all exact ::1"
        for command in ("ip neigh show nud permanent", "ip route", "ip -6 route", loopback6):
            found[where, command] = sorted(ask(command).splitlines())
        found[where, "fdb"] = sorted(
            line for line in ask("bridge fdb").splitlines() if "dev vx0" in line and "permanent" not in line
        )
        found[where, "rules"] = sorted(ask("nft list ruleset").split())
        found[where, "sysctls"] = [ask(f"sysctl -n {name}") for name in SYSCTLS[where]]
    return found


def differences(lab: OverlayLab, sound: dict[tuple[str, str], list[str]]) -> dict[tuple[str, str], set[str]]:
    """What there is too much or too little, by place and kind."""
    now = picture(lab)
    return {key: set(now[key]) ^ set(lines) for key, lines in sound.items() if now[key] != lines}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_the_audit_repairs(shared: OverlayLab, damage: str) -> None:
    lab = shared
    sound = picture(lab)
    done = do_damage(lab, damage)
    assert done.returncode == 0, done.stderr
    await lab.apply((VIP,), (PORT,))  # at once: no audit is due, what was applied is trusted
    if damage != "sandbox":
        assert differences(lab, sound)
    with capture_logs() as logged:
        await audit(lab)
    assert works(lab)
    assert differences(lab, sound) == {}
    assert {line["event"] for line in logged} & {"overlay_repaired", "ip_forward_enabled", "ipv6_forwarding_enabled"}


@pytest.mark.parametrize("seed", range(8))
async def test_several_damages_at_once_are_repaired_by_one_audit(shared: OverlayLab, seed: int) -> None:
    sound = picture(shared)
    for damage in sorted(random.Random(seed).sample(sorted(DAMAGE), 5), key=lambda damage: damage == "sandbox"):
        do_damage(shared, damage)  # may fail: an earlier one took away what it is about
    await audit(shared)
    assert works(shared)
    assert differences(shared, sound) == {}


async def test_an_audit_of_a_sound_host_changes_nothing(shared: OverlayLab) -> None:
    host = shared.hosts[0]

    def numbered() -> list[str]:
        places = (sandbox(host), host.netns, shared.path("a1"))
        commands = ("ip -o addr", "bridge fdb", "nft -a list ruleset")
        return [shared.sockets.run(netns, *command.split()).stdout for netns in places for command in commands]

    before = (picture(shared), numbered())
    with capture_logs() as logged:
        await audit(shared)
    assert (picture(shared), numbered()) == before
    assert logged == []
