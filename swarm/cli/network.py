"""`pyswarm network`."""

from __future__ import annotations

from collections.abc import Iterable

import click

from proto.control_pb2 import (
    Filter,
    GetRequest,
    ListRequest,
    NetworkRequest,
    RemoveRequest,
    RotateNetworkKeysRequest,
)
from proto.objects_pb2 import Network, NetworkSpec, Service
from swarm.cli.client import Client, connect
from swarm.cli.command import (
    command,
    finish,
    for_each,
    inspect_all,
    label_filter,
    listing_options,
    parse_filters,
    show_rows,
)
from swarm.cli.completing import network_names
from swarm.cli.doctor import doctor
from swarm.cli.failure import ApiFailure, Failure
from swarm.cli.ipam import set_ipam
from swarm.cli.network_shape import network_json, services_on
from swarm.cli.rows import NETWORK_COLUMNS, natural_key, network_row
from swarm.cli.spec import parse_pairs
from swarm.cli.units import parse_bool
from swarm.store import drivers

UNATTACHABLE = "pyswarm runs no containers beside services, so nothing else can attach to a network"
INGRESS_WARNING = (
    "WARNING! Without an ingress network no port can be published by it, and services without a network of their own\n"
    "cannot be created, until you make another one (`pyswarm network create --ingress NAME`).\n"
    "Are you sure you want to continue?"
)
NETWORK_TYPES = ("custom", "builtin")
NETWORK_FILTERS = ("dangling", "driver", "id", "label", "name", "scope", "type")


@click.group()
def network() -> None:
    """Manage networks that services share across hosts.

    \b
    Example:
      pyswarm network create --subnet 10.5.0.0/24 wpnet
    """


network.add_command(doctor)


@command(network, "create")
@click.argument("name")
@click.option("--driver", "-d", default=drivers.OVERLAY, show_default=True, help="overlay or macvlan.")
@click.option(
    "--subnet", "subnets", multiple=True, metavar="CIDR",
    help="Addresses of the network: one IPv4 and one IPv6 subnet (default: chosen).",
)  # fmt: skip
@click.option("--gateway", "gateways", multiple=True, metavar="IP", help="A subnet's gateway (default: its first).")
@click.option("--ip-range", "ip_ranges", multiple=True, metavar="CIDR", help="Part of a subnet that tasks get.")
@click.option(
    "--aux-address", "aux_addresses", multiple=True, metavar="NAME=IP",
    help="Address that something outside the swarm uses: never given to a task.",
)  # fmt: skip
@click.option("--opt", "-o", "options", multiple=True, metavar="KEY[=VALUE]", help="Driver option (docs/cli.md).")
@click.option("--label", multiple=True, metavar="KEY=VALUE", help="Label of the network.")
@click.option("--internal", is_flag=True, help="No way out of the network.")
@click.option("--attachable", is_flag=True, help="Recorded, with a warning: only services attach to networks here.")
@click.option("--ingress", is_flag=True, help="Make the network that publishes ports; there is one at a time.")
@click.option("--ipv6", is_flag=True, help="IPv6 besides IPv4; the subnet is chosen if none is given.")
@click.option("--scope", default="swarm", show_default=True, help="Networks span the swarm.")
@click.option("--ipv4", default="true", hidden=True)
@click.option("--ipam-driver", default="default", hidden=True)
@click.option("--ipam-opt", multiple=True, hidden=True)
@click.option("--config-from", hidden=True)
@click.option("--config-only", is_flag=True, hidden=True)
def create(
    *,
    name: str,
    driver: str,
    subnets: tuple[str, ...],
    gateways: tuple[str, ...],
    ip_ranges: tuple[str, ...],
    aux_addresses: tuple[str, ...],
    options: tuple[str, ...],
    label: tuple[str, ...],
    internal: bool,
    attachable: bool,
    ingress: bool,
    ipv6: bool,
    scope: str,
    **refused: str | bool | tuple[str, ...],
) -> None:
    """Create a network and print its ID.

    \b
    Example:
      pyswarm network create --subnet 10.5.0.0/24 wpnet
      pyswarm network create --ipv6 --opt encrypted secure
      pyswarm network create -d macvlan -o parent=eth0 --subnet 192.168.1.0/24 --ip-range 192.168.1.128/25 lan
    """
    _refuse(scope, refused)
    spec = NetworkSpec(driver=driver, internal=internal, attachable=attachable, ingress=ingress, ipv6=ipv6)
    spec.annotations.name = name
    spec.annotations.labels.update(parse_pairs(label, "label"))
    spec.options.update(parse_pairs(options, "opt"))
    set_ipam(spec, subnets, gateways, ip_ranges, aux_addresses)
    client = connect()
    network_id = client.call(client.control.CreateNetwork, NetworkRequest(spec=spec)).id
    if attachable:
        click.echo(f"WARNING: --attachable has no effect: {UNATTACHABLE}", err=True)
    click.echo(network_id)


def _refuse(scope: str, refused: dict[str, str | bool | tuple[str, ...]]) -> None:
    """Docker's flags that nothing stands behind here. Raises Failure, naming the flag."""
    if scope != "swarm":
        raise Failure(f"--scope {scope} is not supported: networks span the swarm; every node has its own {_LOCAL}")
    if not parse_bool(str(refused["ipv4"])):
        raise Failure("--ipv4=false is not supported: every network has IPv4 addresses")
    if refused["ipam_driver"] != "default" or refused["ipam_opt"]:
        raise Failure("--ipam-driver and --ipam-opt are not supported: the managers allocate addresses")
    if refused["config_from"] or refused["config_only"]:
        raise Failure("--config-from and --config-only are not supported: give each network its own options")


_LOCAL = f"{', '.join(drivers.PREDEFINED[:-1])} and {drivers.PREDEFINED[-1]}"


@command(network, "ls")
@listing_options(filters=", ".join(NETWORK_FILTERS))
def list_networks(form: str | None, quiet: bool, no_trunc: bool, filters: tuple[str, ...]) -> None:
    """List networks.

    \b
    Example:
      pyswarm network ls --filter name=wp
      pyswarm network ls --filter dangling=true --format '{{.Name}} {{.Driver}}'
    """
    wanted = parse_filters(filters, NETWORK_FILTERS)
    for kind in set(wanted.get("type", ())) - {*NETWORK_TYPES}:
        raise Failure(f"invalid filter 'type={kind}': known are {' and '.join(NETWORK_TYPES)}")
    client = connect()
    found = [item for item in _networks(client, wanted) if _is_wanted(item, wanted)]
    if "dangling" in wanted:
        services = client.call(client.control.ListServices, ListRequest()).services
        asked = parse_bool(wanted["dangling"][-1])
        found = [item for item in found if _is_dangling(item, services) == asked]
    found.sort(key=lambda item: natural_key(item.spec.annotations.name))
    show_rows([network_row(item, no_trunc) for item in found], NETWORK_COLUMNS, form, quiet)


def _networks(client: Client, wanted: dict[str, list[str]]) -> Iterable[Network]:
    condition = Filter(ids=wanted.get("id", ()), labels=label_filter(wanted.get("label", ())))
    return client.call(client.control.ListNetworks, ListRequest(filter=condition)).networks


def _is_wanted(item: Network, wanted: dict[str, list[str]]) -> bool:
    row = network_row(item, no_trunc=True)
    facts = {"driver": row["Driver"], "scope": row["Scope"], "type": NETWORK_TYPES[not _is_custom(item)]}
    # Of networks any part of the name, as in Docker; other objects are found by its beginning.
    named = any(part in item.spec.annotations.name for part in wanted.get("name", [""]))
    return named and all(fact in wanted.get(key, (fact,)) for key, fact in facts.items())


def _is_custom(item: Network) -> bool:
    return not (item.spec.ingress or drivers.is_local(item))


def _is_dangling(item: Network, services: Iterable[Service]) -> bool:
    """Nothing would miss it."""
    return _is_custom(item) and not services_on(item, services)


@command(network, "inspect")
@click.argument("refs", metavar="NETWORK...", nargs=-1, required=True, shell_complete=network_names)
@click.option("--format", "-f", "form", metavar="FORMAT", help="json, or a Go template such as '{{.IPAM.Config}}'.")
@click.option("--verbose", "-v", is_flag=True, help="With the services and tasks on it.")
def inspect(refs: tuple[str, ...], form: str | None, verbose: bool) -> None:
    """Show networks in detail: addresses, options, the nodes on it (Peers).

    \b
    Example:
      pyswarm network inspect --format '{{json .IPAM.Config}}' wpnet
      pyswarm network inspect --verbose wpnet
    """
    client = connect()

    def find(ref: str) -> dict[str, object]:
        found = client.call(client.control.GetNetwork, GetRequest(ref=ref))
        if not verbose:
            return network_json(found)
        services = client.call(client.control.ListServices, ListRequest()).services
        nodes = client.call(client.control.ListNodes, ListRequest()).nodes
        on_it = ListRequest(filter=Filter(network_ids=[found.id]))
        tasks = client.call(client.control.ListTasks, on_it).tasks
        return network_json(found, services_on(found, services, tasks), tasks, nodes)

    inspect_all(refs, find, form)


@command(network, "rm")
@click.argument("refs", metavar="NETWORK...", nargs=-1, required=True, shell_complete=network_names)
@click.option("--force", "-f", is_flag=True, help="Do not ask, nor fail for a network that is not there.")
def remove(refs: tuple[str, ...], force: bool) -> None:
    """Remove networks that no service uses.

    \b
    Example:
      pyswarm network rm wpnet
    """
    client = connect()

    def act(ref: str) -> str:
        try:
            found = client.call(client.control.GetNetwork, GetRequest(ref=ref))
            if found.spec.ingress and not force and not click.confirm(INGRESS_WARNING, default=False):
                raise Failure(f"network {ref} was not removed")
            client.call(client.control.RemoveNetwork, RemoveRequest(ref=found.id))
        except ApiFailure as failure:
            if not (force and failure.code == "NOT_FOUND"):
                raise
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


@command(network, "prune")
@click.option("--force", "-f", is_flag=True, help="Do not ask.")
@click.option("--filter", "filters", multiple=True, metavar="KEY=VALUE", help="Only: label.")
def prune(force: bool, filters: tuple[str, ...]) -> None:
    """Remove all networks that no service uses.

    \b
    Example:
      pyswarm network prune --filter label=stage=test
    """
    wanted = parse_filters(filters, ("label",))
    question = "WARNING! This will remove all custom networks not used by at least one service.\nAre you sure you want"
    if not force and not click.confirm(f"{question} to continue?", default=False):
        return
    client = connect()
    removed, failures = [], []
    for item in _networks(client, wanted):
        if not _is_custom(item):
            continue
        try:
            client.call(client.control.RemoveNetwork, RemoveRequest(ref=item.id))
            removed.append(item.spec.annotations.name)
        except ApiFailure as failure:
            if failure.code not in ("FAILED_PRECONDITION", "NOT_FOUND"):  # in use, or gone already
                failures.append(failure.message)
    if removed:
        click.echo("\n".join(["Deleted Networks:", *removed]))
    finish(failures)


def _refused_attachment(name: str) -> None:
    @command(network, name, hidden=True, context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1)
    def refuse(arguments: tuple[str, ...]) -> None:
        """Not supported: only services attach to networks.

        \b
        Example:
          pyswarm service update --network-add wpnet web
        """
        flag = "add" if name == "connect" else "rm"
        raise Failure(
            f"network {name} is not supported: {UNATTACHABLE}; use `pyswarm service update --network-{flag} NETWORK"
            " SERVICE`"
        )


_refused_attachment("connect")
_refused_attachment("disconnect")
