"""`pyswarm swarm`: forming, joining and leaving."""

from __future__ import annotations

import click

from proto import objects_pb2 as pb
from proto.control_pb2 import ClusterRequest, GetRequest, RotateTokenRequest
from proto.local_pb2 import InitRequest, JoinRequest, LeaveRequest
from swarm.cli.autolock import unlock, unlock_key, unlock_text, update
from swarm.cli.backup import backup, restore
from swarm.cli.client import MEMBERSHIP_S, Client, connect
from swarm.cli.command import GoCommand, command
from swarm.cli.failure import Failure
from swarm.cli.joining import DEFAULT_LISTEN, join_text
from swarm.cli.node import AVAILABILITIES
from swarm.cli.spec import choice, flag_value
from swarm.cli.units import parse_duration_s, parse_uint

DEFAULT_MASK_BITS = 24
DEFAULT_VXLAN_PORT = 4789
FORCED = (
    "this is the only manager now. What the others had acknowledged last, and this one had not received, is lost.\n"
    "Do not start the former managers together again: they would go on as the old swarm. One that comes back alone\n"
    "becomes a worker; to make a manager of it, promote it (`pyswarm node promote`)."
)
JOIN_PORT_OFFSET = 1
"""A manager's mTLS listener stands one above the port that nodes join at (ARCHITECTURE.md, ports)."""


@click.group()
def swarm() -> None:
    """Form, join and leave a swarm.

    \b
    Example:
      pyswarm swarm init
      pyswarm swarm join --token SWMTKN-1-... 10.0.0.1:2377
    """


for _command in (backup, restore, update, unlock, unlock_key):
    swarm.add_command(_command)


@command(swarm, "init")
@click.option("--advertise-addr", default="", metavar="ADDR", help="Address told to others: IP[:PORT] or interface.")
@click.option("--listen-addr", default=DEFAULT_LISTEN, show_default=True, help="Where managers listen.")
@click.option("--data-path-addr", default="", metavar="ADDR", help="Address for overlay traffic (default: as above).")
@click.option(
    "--data-path-port", default=str(DEFAULT_VXLAN_PORT), metavar="PORT", show_default=True, help="VXLAN port."
)
@click.option("--default-addr-pool", multiple=True, metavar="CIDR", help="Where networks get subnets (10.0.0.0/8).")
@click.option(
    "--default-addr-pool-mask-length", default=str(DEFAULT_MASK_BITS), metavar="BITS", show_default=True,
    help="Size of those subnets.",
)  # fmt: skip
@click.option("--availability", default="active", show_default=True, help="active, pause or drain.")
@click.option("--task-history-limit", default="5", show_default=True, help="Ended tasks kept for each slot.")
@click.option("--dispatcher-heartbeat", default="1s", show_default=True, help="How often nodes report.")
@click.option("--cert-expiry", default="2160h", show_default=True, help="Validity of node certificates.")
@click.option("--force-new-cluster", is_flag=True, help="Start a swarm of one manager from this host's state.")
@click.option("--autolock", is_flag=True, help="Managers need an unlock key to start after their host was restarted.")
@click.option("--external-ca", hidden=True)
def init(
    *,
    advertise_addr: str,
    listen_addr: str,
    data_path_addr: str,
    data_path_port: str,
    default_addr_pool: tuple[str, ...],
    default_addr_pool_mask_length: str,
    availability: str,
    task_history_limit: str,
    dispatcher_heartbeat: str,
    cert_expiry: str,
    force_new_cluster: bool,
    autolock: bool,
    external_ca: str | None,
) -> None:
    """Make this host the first manager of a new swarm.

    \b
    Example:
      pyswarm swarm init --advertise-addr 192.168.99.11
    """
    if external_ca:
        raise Failure("--external-ca is not supported: certificates are signed by the swarm's own CA")
    request = InitRequest(
        advertise_addr=advertise_addr,
        listen_addr=listen_addr,
        data_path_addr=data_path_addr,
        data_path_port=flag_value("data-path-port", lambda text: parse_uint(text, 1024, 49151), data_path_port),
        default_addr_pool=[address for text in default_addr_pool for address in text.split(",")],
        subnet_size=flag_value(
            "default-addr-pool-mask-length", lambda text: parse_uint(text, 8, 29), default_addr_pool_mask_length
        ),
        availability=flag_value("availability", choice(**AVAILABILITIES), availability),
        task_history_limit=flag_value("task-history-limit", lambda t: parse_uint(t, 0, 10_000), task_history_limit),
        heartbeat_period_s=flag_value("dispatcher-heartbeat", parse_duration_s, dispatcher_heartbeat),
        node_cert_expiry_s=flag_value("cert-expiry", parse_duration_s, cert_expiry),
        force_new_cluster=force_new_cluster,
        auto_lock_managers=autolock,
    )
    client = connect()
    reply = client.ask(client.local.Init, request, MEMBERSHIP_S)
    if force_new_cluster:
        click.echo(f"WARNING: {FORCED}", err=True)
    click.echo(f"Swarm initialized: current node ({reply.node_id}) is now a manager.\n")
    click.echo(join_text("worker", reply.tokens.worker, reply.join_addr))
    click.echo("To add a manager to this swarm, run 'pyswarm swarm join-token manager' and follow the instructions.\n")
    if reply.unlock_key:
        click.echo(unlock_text(reply.unlock_key))


@command(swarm, "join")
@click.argument("remote_addr", metavar="HOST:PORT")
@click.option("--token", required=True, help="From `pyswarm swarm join-token` on a manager; decides the role.")
@click.option("--advertise-addr", default="", metavar="ADDR", help="Address told to others: IP[:PORT] or interface.")
@click.option("--listen-addr", default=DEFAULT_LISTEN, show_default=True, help="Where a manager listens.")
@click.option("--data-path-addr", default="", metavar="ADDR", help="Address for overlay traffic (default: as above).")
@click.option("--availability", default="active", show_default=True, help="active, pause or drain.")
def join(
    *,
    remote_addr: str,
    token: str,
    advertise_addr: str,
    listen_addr: str,
    data_path_addr: str,
    availability: str,
) -> None:
    """Make this host a node of an existing swarm.

    \b
    Example:
      pyswarm swarm join --token SWMTKN-1-... 192.168.99.11:2377
    """
    request = JoinRequest(
        token=token.strip(),
        remote_addr=remote_addr,
        advertise_addr=advertise_addr,
        listen_addr=listen_addr,
        data_path_addr=data_path_addr,
        availability=flag_value("availability", choice(**AVAILABILITIES), availability),
    )
    client = connect()
    reply = client.ask(client.local.Join, request, MEMBERSHIP_S)
    click.echo(f"This node joined a swarm as a {pb.NodeRole.Name(reply.role).lower()}.")


@swarm.command("join-token", cls=GoCommand)
@click.argument("role", type=click.Choice(["worker", "manager"]))
@click.option("--rotate", is_flag=True, help="Make a new token; the old one is refused from then on.")
@click.option("--quiet", "-q", is_flag=True, help="Only the token.")
def join_token(role: str, rotate: bool, quiet: bool) -> None:
    """Show, or replace, the token with which nodes join.

    \b
    Example:
      pyswarm swarm join-token -q worker
    """
    client = connect()
    if rotate:
        wanted = pb.MANAGER if role == "manager" else pb.WORKER
        cluster = client.call(client.control.RotateJoinToken, RotateTokenRequest(role=wanted))
    else:
        cluster = client.call(client.control.GetCluster, ClusterRequest())
    token: str = getattr(cluster.join_tokens, role)
    if quiet:
        click.echo(token)
        return
    if rotate:
        click.echo(f"Successfully rotated {role} join token.\n")
    click.echo(join_text(role, token, _join_addr(client)))


def _join_addr(client: Client) -> str:
    """Where this manager lets nodes join."""
    node = client.call(client.control.GetNode, GetRequest(ref=client.node_id))
    host, _, port = (node.manager_addr or f"{node.advertise_host}:2378").rpartition(":")
    return f"{host}:{int(port) - JOIN_PORT_OFFSET}"


@command(swarm, "leave")
@click.option("--force", "-f", is_flag=True, help="Even if this host is a manager.")
def leave(force: bool) -> None:
    """Take this host out of its swarm; its tasks are stopped and removed.

    \b
    Example:
      pyswarm swarm leave
    """
    client = connect()
    client.ask(client.local.Leave, LeaveRequest(force=force), MEMBERSHIP_S)
    click.echo("Node left the swarm.")
