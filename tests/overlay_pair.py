"""Two tasks behind a virtual IP, on the real kernel."""

from __future__ import annotations

from pathlib import Path

from overlay.interface import OverlayNetwork, PublishedPort, Vip
from overlay.reconcile import AUDIT_PERIOD_S
from tests.overlay_lab import NET, OUTSIDE, OverlayLab, SimulatedHost, address6

VIP = Vip(NET.network_id, "10.77.1.200", ("10.77.1.11", "10.77.1.12"))
A2_IPV6 = address6(NET, "10.77.1.12")
PORT = PublishedPort("tcp", 18080, (("10.77.1.12", 8000),))


async def build() -> OverlayLab:
    """a1 on h1 and a2 on h2, both serving at 8000 behind VIP; a2 alone behind PORT."""
    made = OverlayLab()
    await made.apply()
    for host, name, address in zip(made.hosts, ("a1", "a2"), VIP.backends, strict=False):
        made.sockets.serve(await made.task(host, name, (NET, address)), "0.0.0.0", 8000, name)
    await made.apply((VIP,), (PORT,))
    return made


async def audit(lab: OverlayLab) -> None:
    """The agents' next ordinary call after the audit period."""
    for host in lab.hosts:
        host.now_s[0] += AUDIT_PERIOD_S
    await lab.apply((VIP,), (PORT,))


def sandbox(host: SimulatedHost, network: OverlayNetwork = NET) -> Path:
    return host.run_dir / "netns" / f"net-{network.network_id[:12]}"


def works(lab: OverlayLab) -> bool:
    """VIP, remote task, published port from outside, egress."""
    ask = lab.sockets.ask
    try:
        return (
            {ask(lab.path("a1"), VIP.address, 8000)[0] for _ in range(2)} == {"a1", "a2"}
            and ask(lab.path("a1"), "10.77.1.12", 8000)[0] == "a2"
            and ask(lab.client, "192.168.99.1", 18080)[0] == "a2"
            and lab.sockets.run(lab.path("a1"), "ping", "-c", "1", "-W", "1", OUTSIDE).returncode == 0
            and lab.sockets.run(lab.path("a1"), "ping", "-c", "1", "-W", "1", A2_IPV6).returncode == 0
        )
    except OSError:
        return False
