"""`pyswarm network`."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import click

from proto.control_pb2 import (
    Filter,
    GetRequest,
    ListRequest,
    NetworkRequest,
    RemoveRequest,
    RotateNetworkKeysRequest,
)
from proto.objects_pb2 import NetworkSpec
from swarm.cli.client import connect
from swarm.cli.command import (
    command,
    for_each,
    inspect_all,
    label_filter,
    listing_options,
    parse_filters,
    show_rows,
)
from swarm.cli.completing import network_names
from swarm.cli.docker_shape import network_json
from swarm.cli.failure import Failure
from swarm.cli.rows import NETWORK_COLUMNS, natural_key, network_row
from swarm.cli.spec import parse_pairs
from swarm.errors import Invalid

DRIVER = "overlay"


@click.group()
def network() -> None:
    """Manage networks that services share across hosts.

    \b
    Example:
      pyswarm network create --subnet 10.5.0.0/24 wpnet
    """


@command(network, "create")
@click.argument("name")
@click.option("--driver", "-d", default=DRIVER, show_default=True, help="The only driver is overlay.")
@click.option("--subnet", metavar="CIDR", help="Addresses of the network, such as 10.5.0.0/24 (default: chosen).")
@click.option("--gateway", metavar="IP", help="The gateway's address (default: the subnet's first).")
@click.option("--ip-range", metavar="CIDR", help="Part of the subnet from which tasks get addresses.")
@click.option("--opt", "-o", "options", multiple=True, metavar="KEY=VALUE", help="Driver option.")
@click.option("--label", multiple=True, metavar="KEY=VALUE", help="Label of the network.")
@click.option("--internal", is_flag=True, help="No way out of the network.")
@click.option("--attachable", is_flag=True, help="Recorded; containers outside services cannot attach yet.")
@click.option("--ingress", is_flag=True, hidden=True)
@click.option("--ipv6", is_flag=True, hidden=True)
@click.option("--scope", hidden=True, default="swarm")
def create(
    *,
    name: str,
    driver: str,
    subnet: str | None,
    gateway: str | None,
    ip_range: str | None,
    options: tuple[str, ...],
    label: tuple[str, ...],
    internal: bool,
    attachable: bool,
    ingress: bool,
    ipv6: bool,
    scope: str,
) -> None:
    """Create an overlay network and print its ID.

    \b
    Example:
      pyswarm network create --driver overlay --subnet 10.5.0.0/24 wpnet
    """
    if ingress:
        raise Failure("--ingress is not supported: the network named ingress exists always and publishes ports")
    if ipv6:
        raise Failure("--ipv6 is not supported: overlay networks are IPv4 only")
    if scope != "swarm":
        raise Failure(f"--scope {scope} is not supported: every network here spans the swarm")
    if driver != DRIVER:
        raise Failure(f'invalid value "{driver}" for --driver: the only driver is {DRIVER}')
    spec = NetworkSpec(driver=driver, internal=internal, attachable=attachable)
    spec.annotations.name = name
    spec.annotations.labels.update(parse_pairs(label, "label"))
    spec.options.update(parse_pairs(options, "opt"))
    _set_ipam(spec, subnet, gateway, ip_range)
    client = connect()
    click.echo(client.call(client.control.CreateNetwork, NetworkRequest(spec=spec)).id)


def _set_ipam(spec: NetworkSpec, subnet: str | None, gateway: str | None, ip_range: str | None) -> None:
    """Raises Invalid, naming the flag."""
    if not subnet:
        if gateway or ip_range:
            raise Invalid(f"--{'gateway' if gateway else 'ip-range'} needs --subnet, which it must lie in")
        return
    flag, value = "subnet", subnet
    try:
        whole = ip_network(subnet)
        if ip_range:
            flag, value = "ip-range", ip_range
            part = ip_network(ip_range)
            if part.version != whole.version or not part.subnet_of(whole):  # type: ignore[arg-type]
                raise ValueError(f"it does not lie in {subnet}")
        if gateway:
            flag, value = "gateway", gateway
            if ip_address(gateway) not in whole:
                raise ValueError(f"it does not lie in {subnet}")
    except ValueError as error:
        raise Invalid(f'invalid value "{value}" for --{flag}: {error}') from None
    spec.ipam.subnet = subnet
    spec.ipam.gateway = gateway or ""
    spec.ipam.ip_range = ip_range or ""


@command(network, "ls")
@listing_options(filters="driver, id, label, name, scope")
def list_networks(form: str | None, quiet: bool, no_trunc: bool, filters: tuple[str, ...]) -> None:
    """List networks.

    \b
    Example:
      pyswarm network ls --filter name=wp
    """
    wanted = parse_filters(filters, ("driver", "id", "label", "name", "scope"))
    client = connect()
    condition = Filter(
        ids=wanted.get("id", ()), names=wanted.get("name", ()), labels=label_filter(wanted.get("label", ()))
    )
    found = client.call(client.control.ListNetworks, ListRequest(filter=condition)).networks
    rows = [network_row(item, no_trunc) for item in found]
    rows = [
        row
        for row in sorted(rows, key=lambda row: natural_key(row["Name"]))
        if row["Driver"] in wanted.get("driver", (row["Driver"],)) and row["Scope"] in wanted.get("scope", ("swarm",))
    ]
    show_rows(rows, NETWORK_COLUMNS, form, quiet)


@command(network, "inspect")
@click.argument("refs", metavar="NETWORK...", nargs=-1, required=True, shell_complete=network_names)
@click.option("--format", "-f", "form", metavar="FORMAT", help="json, or a Go template such as '{{.IPAM.Config}}'.")
def inspect(refs: tuple[str, ...], form: str | None) -> None:
    """Show networks in detail.

    \b
    Example:
      pyswarm network inspect --format '{{json .IPAM.Config}}' wpnet
    """
    client = connect()
    inspect_all(refs, lambda ref: network_json(client.call(client.control.GetNetwork, GetRequest(ref=ref))), form)


@command(network, "rm")
@click.argument("refs", metavar="NETWORK...", nargs=-1, required=True, shell_complete=network_names)
def remove(refs: tuple[str, ...]) -> None:
    """Remove networks that no service uses.

    \b
    Example:
      pyswarm network rm wpnet
    """
    client = connect()

    def act(ref: str) -> str:
        client.call(client.control.RemoveNetwork, RemoveRequest(ref=ref))
        return ref

    for_each(refs, act)


@command(network, "rotate-keys")
def rotate_keys() -> None:
    """Give all encrypted networks a new key now, without losing a packet; the swarm does so every 12 hours.

    Packets are sent with the second newest of three keys, so the present one is out of use after this command, and
    no node accepts it any more after the third.

    \b
    Example:
      pyswarm network rotate-keys
    """
    client = connect()
    reply = client.call(client.control.RotateNetworkKeys, RotateNetworkKeysRequest())
    click.echo(f"Key {reply.serial} was distributed; packets are sent with key {reply.serial - 1}.")
