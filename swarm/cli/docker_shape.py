"""Objects as the JSON that Docker's inspect prints, as far as ours go. Pure.

Durations are nanoseconds and times RFC 3339 there; what is unset is left out or has Docker's default.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from proto import objects_pb2 as pb
from swarm.cli.units import NANO, format_time
from swarm.store import states

Json = dict[str, Any]

RESTART = {pb.RESTART_ANY: "any", pb.RESTART_ON_FAILURE: "on-failure", pb.RESTART_NONE: "none"}
FAILURE = {pb.PAUSE: "pause", pb.CONTINUE: "continue", pb.ROLLBACK: "rollback"}
BALANCE = {
    pb.ROUND_ROBIN: "round-robin",
    pb.LEAST_CONNECTIONS: "least-connections",
    pb.SOURCE_HASH: "source",
}
ORDER = {pb.STOP_FIRST: "stop-first", pb.START_FIRST: "start-first"}
RESTART_DELAY_S = 5.0
MONITOR_S = 5.0
PARALLELISM = 1
STOP_GRACE_S = 10.0
"""Docker's defaults, shown where the spec leaves a field unset; managers and nodes apply the same."""


def service_json(service: pb.Service) -> Json:
    """As `docker service inspect`."""
    shape: Json = {
        **_head(service.id, service.meta),
        "Spec": service_spec_json(service.spec),
        "Endpoint": {
            "Spec": _endpoint_spec(service.endpoint.spec),
            "Ports": _ports(service.endpoint.spec.ports),
            "VirtualIPs": [_virtual_ip(vip) for vip in service.endpoint.virtual_ips],
        },
    }
    if service.HasField("previous_spec"):
        shape["PreviousSpec"] = service_spec_json(service.previous_spec)
    if service.update_status.state != pb.UpdateStatus.NONE:
        status = service.update_status
        shape["UpdateStatus"] = {
            "State": update_state(status.state),
            "StartedAt": format_time(status.started_at),
            **({"CompletedAt": format_time(status.completed_at)} if status.completed_at else {}),
            "Message": status.message,
        }
    if service.HasField("job_status"):
        shape["JobStatus"] = {
            "JobIteration": {"Index": service.job_status.iteration},
            "LastExecution": format_time(service.job_status.last_execution),
        }
    if clients := client_addresses(service):
        shape["Endpoint"]["ClientAddresses"] = clients
    if service.allocation_error:
        shape["AllocationError"] = service.allocation_error
    return shape


def client_addresses(service: pb.Service) -> str:
    """What tasks see of the clients of ports that the ingress network publishes; "" = there are none."""
    if not any(port.mode == pb.INGRESS for port in service.endpoint.spec.ports):
        return ""
    hidden = service.masquerading_nodes
    return f"masqueraded for tasks on {', '.join(hidden)}" if hidden else "kept"


def _virtual_ip(vip: pb.VirtualIP) -> Json:
    return {"NetworkID": vip.network_id, "Addr": vip.address, **given("Addr6", vip.address6)}


def update_state(state: pb.UpdateStatus.State.ValueType) -> str:
    """ROLLBACK_STARTED -> "rollback_started"."""
    return pb.UpdateStatus.State.Name(state).lower()


def service_spec_json(spec: pb.ServiceSpec) -> Json:
    job = spec.replicated_job
    modes: dict[str, Json] = {
        "global": {"Global": {}},
        "global_job": {"GlobalJob": {}},
        "replicated_job": {
            "ReplicatedJob": {
                "MaxConcurrent": job.max_concurrent or job.total_completions,
                "TotalCompletions": job.total_completions,
            }
        },
    }
    mode = modes.get(spec.WhichOneof("mode") or "", {"Replicated": {"Replicas": spec.replicated.replicas}})
    return {
        **_annotations(spec.annotations),
        "TaskTemplate": task_spec_json(spec.task),
        "Mode": mode,
        **(
            {}
            if states.is_job(spec)
            else {"UpdateConfig": _update_config(spec.update), "RollbackConfig": _update_config(spec.rollback)}
        ),
        **given("MaxUnavailable", spec.max_unavailable),
        "EndpointSpec": _endpoint_spec(spec.endpoint),
    }


def task_spec_json(task: pb.TaskSpec) -> Json:
    resources = task.resources
    restart = task.restart
    return {
        "ContainerSpec": container_json(task.container),
        "Resources": {
            "Limits": _resources(resources.limits),
            "Reservations": _resources(resources.reservations),
            **given("SwapBytes", resources.limits.memory_swap_bytes),
            **(
                {"MemorySwappiness": resources.limits.memory_swappiness}
                if resources.limits.HasField("memory_swappiness")
                else {}
            ),
        },
        "RestartPolicy": {
            "Condition": RESTART[restart.condition],
            "Delay": _ns(restart.delay_s if restart.HasField("delay_s") else RESTART_DELAY_S),
            "MaxAttempts": restart.max_attempts,
            **given("Window", _ns(restart.window_s)),
        },
        "Placement": {
            **given("Constraints", list(task.placement.constraints)),
            **given("Preferences", [{"Spread": {"SpreadDescriptor": s}} for s in task.placement.spread]),
            **given("MaxReplicas", task.placement.max_replicas_per_node),
            **given("Platforms", [{"Architecture": p.architecture, "OS": p.os} for p in task.placement.platforms]),
        },
        **given("Networks", [_attachment_config(network) for network in task.networks]),
        **given("LogDriver", {"Name": "json-file", "Options": dict(task.log_options)} if task.log_options else None),
        "ForceUpdate": task.force_update,
        "Runtime": "container",
    }


def container_json(c: pb.ContainerSpec) -> Json:
    """Credentials are never shown."""
    grace_s = c.stop_grace_period_s if c.HasField("stop_grace_period_s") else STOP_GRACE_S
    dns = {
        **given("Nameservers", list(c.dns_nameservers)),
        **given("Search", list(c.dns_search)),
        **given("Options", list(c.dns_options)),
    }
    return {
        "Image": c.image,
        **given("Labels", dict(c.labels)),
        **given("Command", list(c.command)),
        **given("Args", list(c.args)),
        **given("Hostname", c.hostname),
        **given("Env", list(c.env)),
        **given("Dir", c.dir),
        **given("User", c.user),
        **given("Groups", list(c.groups)),
        **({"Init": c.init} if c.HasField("init") else {}),
        **given("TTY", c.tty),
        **given("ReadOnly", c.read_only),
        **given("StopSignal", c.stop_signal),
        "StopGracePeriod": _ns(grace_s),
        **given("Mounts", [_mount(mount) for mount in c.mounts]),
        **given("Healthcheck", _health(c.health)),
        **given(
            "Devices",
            [
                {
                    "PathOnHost": device.host_path,
                    "PathInContainer": device.container_path or device.host_path,
                    "CgroupPermissions": device.permissions or "rwm",
                }
                for device in c.devices
            ],
        ),
        **given("Hosts", list(c.hosts)),
        **given("DNSConfig", dns),
        **given("CapabilityAdd", list(c.capability_add)),
        **given("CapabilityDrop", list(c.capability_drop)),
        **given("Ulimits", [{"Name": u.name, "Soft": u.soft, "Hard": u.hard} for u in c.ulimits]),
        **given("Sysctls", dict(c.sysctls)),
        **given("OomScoreAdj", c.oom_score_adj),
        "Isolation": "default",
    }


def _health(health: pb.HealthConfig) -> Json:
    return {
        **given("Test", list(health.test)),
        **given("Interval", _ns(health.interval_s)),
        **given("Timeout", _ns(health.timeout_s)),
        **given("StartPeriod", _ns(health.start_period_s)),
        **given("StartInterval", _ns(health.start_interval_s)),
        **given("Retries", health.retries),
    }


def node_json(node: pb.Node) -> Json:
    """As `docker node inspect`."""
    description = node.description
    shape: Json = {
        **_head(node.id, node.meta),
        "Spec": {
            **_annotations(node.spec.annotations),
            "Role": pb.NodeRole.Name(node.spec.desired_role).lower(),
            "Availability": {pb.PAUSED: "pause", pb.DRAINED: "drain"}.get(node.spec.availability, "active"),
        },
        "Description": {
            "Hostname": description.hostname,
            "Platform": {"Architecture": description.platform.architecture, "OS": description.platform.os},
            "Resources": {
                **_resources(description.resources),
                **given("GenericResources", [_generic(resource) for resource in description.generic]),
            },
            "Engine": {
                "EngineVersion": description.engine_version,
                **given("Labels", dict(description.engine_labels)),
            },
            **given("Balancer", description.balancer),
            "AnswersThroughIngress": description.answers_through_ingress,
        },
        "Status": {
            "State": pb.NodeStatus.State.Name(node.status.state).lower(),
            **given("Message", node.status.message),
            "Addr": node.status.addr or node.advertise_host,
            **given("DataPathAddr", node.data_path_addr),
        },
    }
    if node.role == pb.MANAGER:
        status = node.manager_status
        shape["ManagerStatus"] = {
            **({"Leader": True} if status.leader else {}),
            "Reachability": "reachable" if status.reachable else "unreachable",
            "Addr": status.addr or node.manager_addr,
        }
    return shape


def _head(object_id: str, meta: pb.Meta) -> Json:
    return {
        "ID": object_id,
        "Version": {"Index": meta.version},
        "CreatedAt": format_time(meta.created_at),
        "UpdatedAt": format_time(meta.updated_at),
    }


def _annotations(annotations: pb.Annotations) -> Json:
    return {"Name": annotations.name, "Labels": dict(annotations.labels)}


def given(key: str, value: Any) -> Json:
    """As Go's omitempty."""
    return {key: value} if value else {}


def _ns(seconds: float) -> int:
    return round(seconds * NANO)


def _resources(resources: pb.Resources) -> Json:
    return {
        **given("NanoCPUs", resources.nano_cpus),
        **given("MemoryBytes", resources.memory_bytes),
        **given("Pids", resources.pids),
        **given("GenericResources", [_generic(resource) for resource in resources.generic]),
    }


def _generic(resource: pb.GenericResource) -> Json:
    if resource.id:
        return {"NamedResourceSpec": {"Kind": resource.kind, "Value": resource.id}}
    return {"DiscreteResourceSpec": {"Kind": resource.kind, "Value": resource.count}}


def _update_config(config: pb.UpdateConfig) -> Json:
    return {
        "Parallelism": config.parallelism if config.HasField("parallelism") else PARALLELISM,
        **given("Delay", _ns(config.delay_s)),
        "FailureAction": FAILURE[config.failure_action],
        "Monitor": _ns(config.monitor_s if config.HasField("monitor_s") else MONITOR_S),
        "MaxFailureRatio": round(config.max_failure_ratio, 6),  # a float on the wire: 0.1 is not 0.10000000149
        "Order": ORDER[config.order],
    }


def _endpoint_spec(spec: pb.EndpointSpec) -> Json:
    return {
        "Mode": "dnsrr" if spec.mode == pb.DNSRR else "vip",
        **given("Ports", _ports(spec.ports)),
        **given("Balance", BALANCE[spec.balance] if spec.balance else ""),
        **given("BalanceWeight", spec.weight_label),
    }


def _ports(ports: Iterable[pb.PortConfig]) -> list[Json]:
    return [
        {
            **given("Name", port.name),
            "Protocol": pb.Protocol.Name(port.protocol).lower(),
            "TargetPort": port.target_port,
            **given("PublishedPort", port.published_port),
            "PublishMode": pb.PublishMode.Name(port.mode).lower(),
            **given("HostIP", port.host_ip),
        }
        for port in ports
    ]


def _attachment_config(network: pb.NetworkAttachmentConfig) -> Json:
    return {"Target": network.network_id, **given("Aliases", list(network.aliases))}


def _mount(mount: pb.Mount) -> Json:
    tmpfs = {**given("SizeBytes", mount.tmpfs_size_bytes), **given("Mode", mount.tmpfs_mode)}
    return {
        "Type": pb.Mount.Type.Name(mount.type).lower(),
        **given("Source", mount.source),
        "Target": mount.target,
        **given("ReadOnly", mount.read_only),
        **given("BindOptions", given("Propagation", mount.propagation)),
        **given("VolumeOptions", {**given("NoCopy", mount.no_copy), **given("PerSlot", mount.per_slot)}),
        **given("TmpfsOptions", tmpfs),
    }
