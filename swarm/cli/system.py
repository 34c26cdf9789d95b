"""`pyswarm daemon`, `info` and `version`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from swarm.cli.command import GoCommand
from swarm.cli.failure import Failure
from swarm.cli.template import Template
from swarm.config import DEFAULT_CGROUP_PARENT, DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, DaemonConfig


def client_version() -> str:
    from swarm.version import __version__

    return __version__


@click.command(cls=GoCommand)
@click.option("--state-dir", default=str(DEFAULT_STATE_DIR), show_default=True, help="What survives a reboot.")
@click.option("--run-dir", default=str(DEFAULT_RUN_DIR), show_default=True, help="Sockets, mounts and namespaces.")
@click.option("--hostname", default="", help="This host's name in the swarm (default: the kernel's).")
@click.option("--cgroup-parent", default=DEFAULT_CGROUP_PARENT, show_default=True, help="Cgroup above all containers.")
@click.option("--image-store", "image_stores", multiple=True, metavar="DIR", help="Further image store, read-only.")
@click.option(
    "--insecure-registry", "insecure", multiple=True, metavar="HOST[:PORT]", help="Registry to be spoken to unverified."
)
@click.option(
    "--label", "labels", multiple=True, metavar="KEY=VALUE", help="Label that constraints call engine.labels.KEY."
)
@click.option(
    "--node-generic-resource",
    "generic",
    multiple=True,
    metavar="KIND=VALUE",
    help="What tasks may reserve here: a number (licences=4), or each by name (gpu=GPU1).",
)
@click.option("--runtime", default="crun", show_default=True, help="OCI runtime: name or path.")
@click.option(
    "--lb",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "ipvs", "nftables"]),
    help="What balances services; auto = IPVS where the kernel has it.",
)
@click.option(
    "--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning", "error"]),
    help="How much is logged to standard error.",
)  # fmt: skip
def daemon(
    *,
    state_dir: str,
    run_dir: str,
    hostname: str,
    cgroup_parent: str,
    image_stores: tuple[str, ...],
    insecure: tuple[str, ...],
    labels: tuple[str, ...],
    generic: tuple[str, ...],
    runtime: str,
    lb: str,
    log_level: str,
) -> None:
    """Run this host's daemon until it is stopped by a signal; containers go on without it.

    \b
    Example:
      pyswarm daemon --state-dir /srv/pyswarm --log-level debug
    """
    from swarm.cli.generic import parse_offered
    from swarm.cli.spec import parse_pairs

    config = DaemonConfig(
        state_dir=Path(state_dir).absolute(),
        run_dir=Path(run_dir).absolute(),
        hostname=hostname,
        cgroup_parent=cgroup_parent,
        image_stores=tuple(Path(store).absolute() for store in image_stores),
        insecure_registries=insecure,
        labels=parse_pairs(labels, "label"),
        generic_resources=tuple(parse_offered(generic, "node-generic-resource")),
        runtime=runtime,
        balancer=lb,
        log_level=log_level,
    )
    from swarm.start import start

    start(config)


@click.command(cls=GoCommand)
@click.option("--format", "-f", "form", metavar="FORMAT", help="json, or a Go template such as '{{.Swarm.NodeID}}'.")
def info(form: str | None) -> None:
    """Show this host's state, and of the swarm what a manager knows.

    \b
    Example:
      pyswarm info --format '{{.Swarm.LocalNodeState}}'
    """
    shape = _info_json()
    if form == "json":
        click.echo(json.dumps(shape, separators=(",", ":")))
    elif form:
        click.echo(Template(form).render(shape))
    else:
        click.echo(info_text(shape))


def _info_json() -> dict[str, Any]:
    from proto import objects_pb2 as pb
    from proto.control_pb2 import ClusterRequest, ListRequest
    from proto.local_pb2 import InfoReply
    from swarm.cli.client import connect

    client = connect()
    reply = client.info()
    is_manager = bool(reply.manager_socket) or (reply.state == InfoReply.ACTIVE and reply.role == pb.MANAGER)
    state: dict[str, Any] = {
        "LocalNodeState": InfoReply.State.Name(reply.state).lower(),
        "NodeID": reply.node_id,
        "NodeAddr": reply.node_addr,
        "ControlAvailable": is_manager,
        "Error": reply.error,
        "RemoteManagers": [{"Addr": addr} for addr in reply.manager_addrs],
        "Cluster": {"ID": reply.cluster_id},
    }
    if is_manager:
        try:
            cluster = client.call(client.control.GetCluster, ClusterRequest())
            nodes = client.call(client.control.ListNodes, ListRequest()).nodes
        except Failure as failure:
            state["Error"] = failure.message  # the host's own state is worth showing without a leader
        else:
            state["Nodes"] = len(nodes)
            state["Warnings"] = [node.manager_status.warning for node in nodes if node.manager_status.warning]
            state["Managers"] = sum(1 for node in nodes if node.role == pb.MANAGER)
            state["Cluster"] |= {
                "DefaultAddrPool": list(cluster.default_addr_pool),
                "SubnetSize": cluster.subnet_size,
                "DataPathPort": cluster.data_path_port,
            }
    return {
        "ServerVersion": reply.version,
        "ContainersRunning": reply.containers_running,
        "Swarm": state,
        "Processes": {"Agent": reply.agent_pid, "Manager": reply.manager_pid, "NameServer": reply.dns_pid},
    }


def info_text(shape: dict[str, Any]) -> str:
    """`pyswarm info` for people. Pure."""
    state = shape["Swarm"]
    lines = [
        f"Server Version: {shape['ServerVersion']}",
        f"Containers Running: {shape['ContainersRunning']}",
        f"Swarm: {state['LocalNodeState']}",
    ]
    if state["Error"]:
        lines.append(f" Error: {state['Error']}")
    if state["NodeID"]:
        lines += [
            f" NodeID: {state['NodeID']}",
            f" Is Manager: {str(state['ControlAvailable']).lower()}",
            f" ClusterID: {state['Cluster']['ID']}",
        ]
        if "Nodes" in state:
            cluster = state["Cluster"]
            lines += [
                f" Managers: {state['Managers']}",
                f" Nodes: {state['Nodes']}",
                f" Default Address Pool: {' '.join(cluster['DefaultAddrPool'])}",
                f" SubnetSize: {cluster['SubnetSize']}",
                f" Data Path Port: {cluster['DataPathPort']}",
            ]
        lines += [f" Node Address: {state['NodeAddr']}", " Manager Addresses:"]
        lines += [f"  {manager['Addr']}" for manager in state["RemoteManagers"]]
    lines += [f"WARNING: {warning}" for warning in state.get("Warnings", ())]
    pids = {name: pid for name, pid in shape["Processes"].items() if pid}
    lines.append("Processes: " + ", ".join(f"{name} {pid}" for name, pid in pids.items()))
    return "\n".join(lines)


@click.command(cls=GoCommand)
@click.option("--format", "-f", "form", metavar="FORMAT", help="json, or a Go template such as '{{.Server.Version}}'.")
def version(form: str | None) -> None:
    """Show the versions of this command and of the daemon.

    \b
    Example:
      pyswarm version --format '{{.Client.Version}}'
    """
    from swarm.cli.client import connect

    shape: dict[str, Any] = {"Client": {"Version": client_version()}}
    failure: Failure | None = None
    try:
        shape["Server"] = {"Version": connect().info().version}
    except Failure as error:
        failure = error  # the client's version is shown even so
    if form == "json":
        click.echo(json.dumps(shape, separators=(",", ":")))
    elif form:
        click.echo(Template(form).render(shape))
    else:
        for name, part in shape.items():
            click.echo(f"{name}:\n Version: {part['Version']}")
    if failure is not None:
        raise failure
