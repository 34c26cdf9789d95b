"""The command line on a machine that is slow to answer."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from tests.cli_servers import Host, Script, manager_info, reply, serving

SLOW_S = 0.5
"""Five times what an attempt to connect once had."""


def _relay(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        return


def _serve_slowly(listener: socket.socket, behind: Path, stop: threading.Event) -> None:
    """Pass connections on to the daemon, each after SLOW_S."""
    while True:
        try:
            near, _ = listener.accept()
        except OSError:
            return
        if stop.wait(SLOW_S):
            return
        far = socket.socket(socket.AF_UNIX)
        far.connect(str(behind))
        for source, target in ((near, far), (far, near)):
            threading.Thread(target=_relay, args=(source, target), daemon=True).start()


def test_a_daemon_that_takes_its_time_to_accept_is_waited_for(tmp_path: Path) -> None:
    agent = Script()
    agent.answers["Info"] = reply(manager_info())
    behind, front = tmp_path / "behind", tmp_path / "front"
    behind.mkdir()
    front.mkdir()
    stop = threading.Event()
    with serving(behind, agent, None), serving(front, None, agent), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(front / "pyswarm.sock"))
        listener.listen()
        threading.Thread(target=_serve_slowly, args=(listener, behind / "pyswarm.sock", stop), daemon=True).start()
        try:
            host = Host(front, agent, agent)
            assert host.pyswarm("info", "-f", "{{.Swarm.LocalNodeState}}").stdout == "active\n"
        finally:
            stop.set()
            listener.shutdown(socket.SHUT_RDWR)
