"""--publish and its removal in `service update`. Pure; every refusal quotes the flag's value."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address
from typing import TypeVar

from proto.objects_pb2 import HOST, INGRESS, SCTP, TCP, UDP, PortConfig, Protocol, PublishMode
from swarm.errors import Invalid

T = TypeVar("T")
PORT_MAX = 65535
PROTOCOLS: dict[str, Protocol.ValueType] = {"tcp": TCP, "udp": UDP, "sctp": SCTP}
MODES: dict[str, PublishMode.ValueType] = {"ingress": INGRESS, "host": HOST}

_SHORT = re.compile(
    r"(?:(?:(?P<host_ip>\[[^]]*\]|[^:/]+):)?(?P<published>\d+(?:-\d+)?)?:)?"
    r"(?P<target>\d+(?:-\d+)?)(?:/(?P<protocol>\w+))?"
)


def parse_publish(text: str, flag: str = "--publish") -> list[PortConfig]:
    """ "8000:80/tcp", "8000-8002:80-82", "192.168.1.5:8000:80", "[::1]:8000:80" or
    "published=8000,target=80,mode=host". Raises Invalid."""
    try:
        return [_long(text)] if "=" in text else _short(text)
    except Invalid as error:
        raise Invalid(f'invalid value "{text}" for {flag}: {error}') from None


def _short(text: str) -> list[PortConfig]:
    match = _SHORT.fullmatch(text)
    if match is None:
        raise Invalid("write [IP:]PUBLISHED:TARGET[/PROTOCOL], such as 8000:80/tcp, or published=8000,target=80")
    host_ip = _host_ip(match["host_ip"]) if match["host_ip"] else ""
    protocol = _choice("protocol", (match["protocol"] or "tcp").lower(), PROTOCOLS)
    targets = _range("target", match["target"])
    published = _range("published", match["published"]) if match["published"] else [0] * len(targets)
    if len(targets) == 1:
        targets = targets * len(published)
    if len(targets) != len(published):
        raise Invalid(f"the ranges differ in length: {len(published)} published, {len(targets)} target ports")
    return [
        PortConfig(protocol=protocol, target_port=target, published_port=port, mode=INGRESS, host_ip=host_ip)
        for port, target in zip(published, targets, strict=True)
    ]


def _long(text: str) -> PortConfig:
    port = PortConfig(protocol=TCP, mode=INGRESS)
    for part in text.split(","):
        key, _, value = part.partition("=")
        match key.strip().lower():
            case "target":
                port.target_port = _number("target", value)
            case "published":
                port.published_port = _number("published", value)
            case "protocol":
                port.protocol = _choice("protocol", value.lower(), PROTOCOLS)
            case "mode":
                port.mode = _choice("mode", value.lower(), MODES)
            case "name":
                port.name = value
            case "host_ip":
                port.host_ip = _host_ip(value)
            case _:
                raise Invalid(f'unknown field "{key}"; known: target, published, protocol, mode, host_ip, name')
    if not port.target_port:
        raise Invalid("target=PORT is missing")
    return port


def _host_ip(text: str) -> str:
    try:
        return str(ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        raise Invalid(f'host address "{text}" is not an IP address; write [::1] for an IPv6 one') from None


def _choice(what: str, value: str, known: dict[str, T]) -> T:
    if value not in known:
        raise Invalid(f'{what} "{value}" is not known; choose {", ".join(known)}')
    return known[value]


def _number(what: str, text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= PORT_MAX:
        raise Invalid(f"{what} port {text} is not in 1..{PORT_MAX}")
    return int(text)


def _range(what: str, text: str) -> list[int]:
    first, _, last = text.partition("-")
    low, high = _number(what, first), _number(what, last or first)
    if high < low:
        raise Invalid(f"{what} range {text} ends before it begins")
    return list(range(low, high + 1))


def add_ports(current: Iterable[PortConfig], added: Iterable[PortConfig]) -> list[PortConfig]:
    """Both, without exact repetitions."""
    ports = list(current)
    ports.extend(port for port in added if port not in ports)
    return ports


def remove_ports(current: Iterable[PortConfig], text: str) -> list[PortConfig]:
    """What `--publish-rm` leaves: "80" and "80/udp" name the target port, longer forms all they say.
    Raises Invalid when nothing matches."""
    ports = list(current)
    wanted = parse_publish(text, "--publish-rm")
    by_target = ":" not in text and "published" not in text
    any_mode = "mode=" not in text

    def matches(port: PortConfig) -> bool:
        return any(
            port.target_port == want.target_port
            and port.protocol == want.protocol
            and (by_target or port.published_port == want.published_port)
            and (any_mode or port.mode == want.mode)
            and want.host_ip in ("", port.host_ip)
            for want in wanted
        )

    kept = [port for port in ports if not matches(port)]
    if len(kept) == len(ports):
        raise Invalid(f'invalid value "{text}" for --publish-rm: the service publishes no such target port')
    return kept


def port_text(port: PortConfig) -> str:
    """ "*:8000->80/tcp", as `service ls` shows it; without a published port yet: "80/tcp"."""
    name = Protocol.Name(port.protocol).lower()
    host = f"[{port.host_ip}]" if ":" in port.host_ip else port.host_ip or "*"
    prefix = f"{host}:{port.published_port}->" if port.published_port else ""
    return f"{prefix}{port.target_port}/{name}"


def ports_text(ports: Iterable[PortConfig], mode: PublishMode.ValueType) -> str:
    """All ports published in one mode, ordered by number."""
    chosen = sorted((p for p in ports if p.mode == mode), key=lambda p: (p.published_port, p.target_port, p.protocol))
    return ", ".join(map(port_text, chosen))
