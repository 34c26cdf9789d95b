"""Creating, updating and removing services: decided from the store, written through the backend.

`Service.spec_version` moves with the spec and with nothing else. It starts at 1; an update sets it to the
version at which the object stood before, or one more than any version still known of it, whichever is
larger: so it never repeats, and it tells whether a spec that somebody read is still the current one.
"""

from __future__ import annotations

from collections.abc import Callable

from proto.control_pb2 import RebalanceReply, RemoveReply, ServiceReply, ServiceUpdateRequest
from proto.objects_pb2 import Service, ServiceSpec, UpdateStatus
from swarm.allocate.ports import port_conflict
from swarm.api import attachments, validate
from swarm.api.backend import Backend, object_id
from swarm.api.find import find_service
from swarm.api.views import shown_service
from swarm.errors import AlreadyExists, Conflict, Invalid, NotFound
from swarm.orchestrate.moves import planned
from swarm.orchestrate.restart import is_limit_out_of_reach
from swarm.schedule import fits
from swarm.store import states
from swarm.store.changes import Create, Group, Update
from swarm.store.store import Store

REMOVAL_WAIT_S = 8.0
"""`service rm` followed by `service create` with the same name or port works: the new one waits for the old
one's tasks to stop, within what the command line allows for one call."""

_ROLLBACKS = (UpdateStatus.ROLLBACK_STARTED, UpdateStatus.ROLLBACK_PAUSED, UpdateStatus.ROLLBACK_COMPLETED)


# ---------------------------------------------------------------- decisions (pure)


def completed(store: Store, spec: ServiceSpec) -> ServiceSpec:
    """The spec as it is stored: valid, networks by ID, a mode chosen. Raises Invalid, NotFound."""
    full = ServiceSpec()
    full.CopyFrom(spec)
    if full.WhichOneof("mode") is None:
        full.replicated.replicas = 1
    attachments.complete(store, full)
    validate.service_spec(full)
    return full


def warnings(spec: ServiceSpec) -> list[str]:
    """What is allowed, but hardly meant."""
    policy = spec.task.restart
    if not is_limit_out_of_reach(policy):
        return []
    fits_not = f"restart window {policy.window_s:g}s is too short for {policy.max_attempts} attempts and their delays"
    return [f"{fits_not}: the limit is never reached, so a failing task is restarted for ever"]


def check_networks(store: Store, service_id: str, spec: ServiceSpec) -> None:
    """Raises Invalid when another service has one of the published ports, or the ingress network is missing."""
    attachments.check_ingress(store, spec)
    why = port_conflict(store, service_id, spec.endpoint.ports)
    if why is not None:
        raise Invalid(f"{why}: publish another port, or remove it there")


def created(store: Store, service_id: str, spec: ServiceSpec, now: float) -> Service:
    """The new service. `now` in Unix s. Raises AlreadyExists, Invalid."""
    name = spec.annotations.name
    holder = store.services.by_name(name)
    if holder is not None:
        state = "is still being removed; try again in a moment" if holder.pending_delete else "already exists"
        raise AlreadyExists(f"name conflicts with an existing object: service {name} {state}")
    check_networks(store, service_id, spec)
    made = Service(id=service_id, spec=spec, spec_version=1)
    if states.is_job(spec):
        made.job_status.last_execution = now
    return made


def _begin_iteration(service: Service, now: float) -> None:
    """Every change of a job's spec runs it anew."""
    service.job_status.iteration += 1
    service.job_status.last_execution = now


def updated(store: Store, request: ServiceUpdateRequest, now: float) -> Service | None:
    """The service with its new spec; None when nothing changes. `now` in Unix s.
    Raises NotFound, Invalid, Conflict."""
    service = _current(store, request)
    if request.rollback:
        return _rolled_back(service, now)
    spec = completed(store, request.spec)
    old = service.spec
    if spec.annotations.name != old.annotations.name:
        raise Invalid(f"renaming service {old.annotations.name} is not supported: create one with the new name")
    if spec.WhichOneof("mode") != old.WhichOneof("mode"):
        mode = (old.WhichOneof("mode") or "").replace("_", " ")
        raise Invalid(f"service mode change is not allowed: {old.annotations.name} is {mode}")
    if not spec.task.container.registry_auth:  # reads do not show it, so a spec read and sent back lacks it
        spec.task.container.registry_auth = old.task.container.registry_auth
    check_networks(store, service.id, spec)
    if spec == old:
        return None
    changed = _copy(service)
    changed.previous_spec.CopyFrom(old)
    changed.previous_spec_version = service.spec_version
    changed.spec.CopyFrom(spec)
    changed.spec_version = max(service.meta.version, service.spec_version + 1, service.previous_spec_version + 1)
    changed.ClearField("update_status")
    if states.is_job(spec):
        _begin_iteration(changed, now)
    return changed


def _current(store: Store, request: ServiceUpdateRequest) -> Service:
    """The service to change. The version that the caller read may be an older one as long as the spec is
    still the one that was read: what the system wrote in between (addresses, progress) is no conflict."""
    service = find_service(store, request.id)
    name = service.spec.annotations.name
    if service.pending_delete:
        raise NotFound(f"service {name} is being removed")
    if not request.version:
        raise Invalid(f"update of service {name} carries no version: send the one that was read with the spec")
    same_spec = request.version > service.spec_version and service.update_status.state not in _ROLLBACKS
    if request.version != service.meta.version and not (same_spec and request.version < service.meta.version):
        raise Conflict(f"update out of sequence: service {name} was changed meanwhile; read it again and retry")
    return service


def _rolled_back(service: Service, now: float) -> Service:
    if not service.HasField("previous_spec"):
        raise Invalid(f"service {service.spec.annotations.name} does not have a previous spec: nothing to roll back to")
    changed = _copy(service)
    changed.spec.CopyFrom(service.previous_spec)
    changed.spec_version = service.previous_spec_version
    changed.previous_spec.CopyFrom(service.spec)
    changed.previous_spec_version = service.spec_version
    changed.update_status.Clear()
    if states.is_job(changed.spec):
        changed.spec_version = changed.previous_spec_version + 1  # what ran under that spec before is not this
        _begin_iteration(changed, now)
        return changed
    changed.update_status.state = UpdateStatus.ROLLBACK_STARTED
    changed.update_status.started_at = now
    changed.update_status.message = "manually requested rollback"
    changed.update_status.spec_version = changed.spec_version
    return changed


def removed(service: Service) -> Service | None:
    """The service, marked to go with its last task; None when it is already."""
    if service.pending_delete:
        return None
    changed = _copy(service)
    changed.pending_delete = True
    return changed


def in_the_way(store: Store, spec: ServiceSpec) -> bool:
    """A service that is being removed still has the name or a port of this new one."""
    holder = store.services.by_name(spec.annotations.name)
    return holder.pending_delete if holder is not None else ports_in_the_way(store, spec)


def ports_in_the_way(store: Store, spec: ServiceSpec) -> bool:
    wanted = {(port.protocol, port.published_port) for port in spec.endpoint.ports if port.published_port}
    leaving = (service for service in store.services if service.pending_delete)
    ports = (port for each in leaving for port in (*each.spec.endpoint.ports, *each.endpoint.spec.ports))
    return any((port.protocol, port.published_port) in wanted for port in ports)


def _copy(service: Service) -> Service:
    copy = Service()
    copy.CopyFrom(service)
    return copy


# ---------------------------------------------------------------- writing


async def create(backend: Backend, spec: ServiceSpec, request_id: str) -> ServiceReply:
    store = backend.store
    service_id = object_id(request_id)

    def decide() -> Group:
        if service_id in store.services:
            return ()  # the request was delivered twice
        return (Create(created(store, service_id, full, backend.now())),)

    full = completed(store, spec)
    if service_id not in store.services:
        await backend.until(lambda: not in_the_way(store, full), REMOVAL_WAIT_S)
    await backend.commit(decide, request_id)
    return _reply(store, service_id)


async def update(backend: Backend, request: ServiceUpdateRequest, request_id: str) -> ServiceReply:
    store = backend.store
    service_id = find_service(store, request.id).id
    # The version belongs to the ID: the same call with a newer version is another attempt, not the same one.
    write_id = f"{request_id}/{request.version}"
    if not backend.is_done(write_id):
        await backend.until(lambda: not ports_in_the_way(store, request.spec), REMOVAL_WAIT_S)
        await backend.commit(_deciding(lambda: updated(store, request, backend.now())), write_id)
    return _reply(store, service_id)


async def rebalance(backend: Backend, ref: str, request_id: str) -> RebalanceReply:
    """Have tasks moved until the nodes carry alike; how many, says the reply. Raises NotFound, Invalid."""
    store = backend.store
    service_id = find_service(store, ref).id

    def decide() -> Service | None:
        service = find_service(store, service_id)
        if service.spec.WhichOneof("mode") != "replicated":
            raise Invalid(f"service {service.spec.annotations.name} cannot be rebalanced: only replicated services can")
        changed = _copy(service)
        changed.rebalance_moves = planned(store, service, fits)
        return changed if changed != service else None

    if not backend.is_done(request_id):
        await backend.commit(_deciding(decide), request_id)
    return RebalanceReply(moves=find_service(store, service_id).rebalance_moves)


async def remove(backend: Backend, ref: str, request_id: str) -> RemoveReply:
    store = backend.store
    if backend.is_done(request_id):
        return RemoveReply(id=ref)
    service_id = find_service(store, ref).id

    def decide() -> Service | None:
        service = store.services.get(service_id)
        return removed(service) if service is not None else None

    await backend.commit(_deciding(decide), request_id)
    return RemoveReply(id=service_id)


def _deciding(change: Callable[[], Service | None]) -> Callable[[], Group]:
    def decide() -> Group:
        changed = change()
        return (Update(changed),) if changed is not None else ()

    return decide


def _reply(store: Store, service_id: str) -> ServiceReply:
    service = store.services.get(service_id)
    if service is None:
        raise NotFound(f"service {service_id} was removed meanwhile")
    told = warnings(service.spec) + attachments.warnings(store, service.spec)
    return ServiceReply(service=shown_service(service), warnings=told)
