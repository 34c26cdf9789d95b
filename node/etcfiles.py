"""The files that a container gets from us: /etc/hosts, /etc/hostname, /etc/resolv.conf. Pure."""

from __future__ import annotations

from collections.abc import Sequence

_LOCAL = (
    "127.0.0.1\tlocalhost",
    "::1\tlocalhost ip6-localhost ip6-loopback",
    "fe00::0\tip6-localnet",
    "ff00::0\tip6-mcastprefix",
    "ff02::1\tip6-allnodes",
    "ff02::2\tip6-allrouters",
)


def hosts_file(hostname: str, addresses: Sequence[str], extra: Sequence[str], base: str = "") -> str:
    """`extra`: lines "IP name..." of the spec. `base`: the host's own file, for tasks on the host's network."""
    lines = base.splitlines() if base else list(_LOCAL)
    lines += ["\t".join(line.split(None, 1)) for line in extra]
    # After the user's lines, as Docker orders them: the first match wins in a resolver.
    lines += [f"{address.partition('/')[0]}\t{hostname}" for address in addresses]
    return "\n".join(lines) + "\n"


def resolv_conf(nameservers: Sequence[str], search: Sequence[str], options: Sequence[str]) -> str:
    """resolv.conf(5) text."""
    lines = [f"nameserver {server}" for server in nameservers]
    if search:
        lines.insert(0, "search " + " ".join(search))
    if options:
        lines.append("options " + " ".join(options))
    return "\n".join(lines) + "\n"


def merge_options(own: Sequence[str], defaults: Sequence[str]) -> tuple[str, ...]:
    """The user's resolver options, then the defaults whose key (before ":") the user did not set."""
    keys = {option.partition(":")[0] for option in own}
    return (*own, *(option for option in defaults if option.partition(":")[0] not in keys))
