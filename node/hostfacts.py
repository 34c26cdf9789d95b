"""What of a host itself may keep its networks from working: foreign firewall rules, programs on published ports."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from overlay.foreign import Packet, drops, rule_texts
from proto.dispatch_pb2 import FirewallDrop, Listener
from proto.objects_pb2 import TCP, UDP

NFT_DEADLINE_S = 5.0
"""Listing ten thousand rules takes about a second."""
DROPS_MAX = 32
"""Told to the managers; whoever mends the first few finds the rest there."""
_LISTENS = {TCP: "0A", UDP: "07"}
"""include/net/tcp_states.h; a UDP socket without a peer is TCP_CLOSE."""
_FILES = {TCP: ("tcp", "tcp6"), UDP: ("udp", "udp6")}


class Unreadable(Exception):
    """Says what could not be read, and why."""


async def firewall_drops(packets: list[Packet]) -> list[FirewallDrop]:
    """Raises Unreadable."""
    listing = json.loads(await _nft("-j", "-t", "list", "ruleset"))
    found = list(drops(listing, packets))[:DROPS_MAX]
    texts = rule_texts(await _nft("-a", "-t", "list", "ruleset")) if found else {}
    return [
        FirewallDrop(
            table=drop.table,
            chain=drop.chain,
            rule=f"{texts.get((drop.table, drop.chain, drop.handle), 'a rule')} # handle {drop.handle}"
            if drop.handle
            else "policy drop",
            traffic=drop.packet.traffic,
            address=drop.packet.address,
            certain=drop.certain,
        )
        for drop in found
    ]


async def _nft(*arguments: str) -> str:
    try:
        async with asyncio.timeout(NFT_DEADLINE_S):
            process = await asyncio.create_subprocess_exec(
                "nft", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            try:
                output, errors = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
    except FileNotFoundError:
        raise Unreadable("firewall rules: the command nft is not installed; install the package nftables") from None
    except TimeoutError:
        raise Unreadable(f"firewall rules: nft did not list them within {NFT_DEADLINE_S:g} s") from None
    if process.returncode:
        raise Unreadable(f"firewall rules: {errors.decode(errors='replace').strip()}")
    return output.decode(errors="replace")


def listeners(ports: Iterable[tuple[int, int]], proc: Path = Path("/proc")) -> list[Listener]:
    """Programs of this host that listen on these (protocol, port). Raises OSError."""
    wanted = set(ports)
    found: dict[str, Listener] = {}
    for protocol, files in _FILES.items():
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # IPv6 is off
                table = (proc / "self/net" / name).read_text()
                for address, port, inode in listening_sockets(table, _LISTENS[protocol]):
                    if (protocol, port) in wanted:
                        found[inode] = Listener(protocol=protocol, port=port, address=address)
    for inode, pid in _owners(proc, found) if found else ():
        found[inode].pid = pid
        with contextlib.suppress(OSError):
            found[inode].command = (proc / str(pid) / "comm").read_text().strip()
    return list(found.values())


def listening_sockets(table: str, state: str) -> Iterator[tuple[str, int, str]]:
    """(address, port, inode) of a text such as /proc/net/tcp. Pure."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        address, _, port = fields[1].rpartition(":")
        if fields[3] == state:
            yield _address(address), int(port, 16), fields[9]


def _address(text: str) -> str:
    """Words of 32 bits, each in the machine's byte order."""
    raw = b"".join(int(text[at : at + 8], 16).to_bytes(4, "little") for at in range(0, len(text), 8))
    return str(ipaddress.ip_address(raw))


def _owners(proc: Path, inodes: Iterable[str]) -> Iterator[tuple[str, int]]:
    links = {f"socket:[{inode}]": inode for inode in inodes}
    for directory in proc.glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours to look into
            for link in os.scandir(directory):
                with contextlib.suppress(OSError):
                    inode = links.get(os.readlink(link.path))
                    if inode is not None:
                        yield inode, int(directory.parent.name)
