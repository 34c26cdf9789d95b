"""The stage: which services to look at, and the order of questions asked about each."""

from __future__ import annotations

from collections.abc import Callable

from proto.objects_pb2 import Service
from swarm.orchestrate import everywhere, jobs, moves, reaper, replicated, restart, rollout
from swarm.orchestrate.view import Fits, Surplus, View, slots_of
from swarm.store import states
from swarm.store.changes import Decision, Group, Remove
from swarm.store.dirty import Dirty
from swarm.store.store import Store


def decide(
    store: Store, now: float, new_id: Callable[[], str], dirty: Dirty, *, fits: Fits, surplus: Surplus
) -> Decision:
    """What must change so that the tasks become what the services say: created, stopped, moved, updated, forgotten.

    `now` is Unix s; `new_id` gives fresh task IDs; `fits` and `surplus` are those of `swarm.schedule`. Only
    services named by `dirty`, and those with tasks on its nodes, are looked at. Each is settled per slot and look;
    what follows from a decision is found in the next look, which its own changes cause."""
    groups: list[Group] = []
    wakes: list[tuple[str, float]] = []
    for service in _touched(store, dirty):
        view = look(store, now, new_id, service, fits=fits, surplus=surplus)
        groups.extend(view.groups)
        if view.wake_at is not None:
            wakes.append((service.id, view.wake_at))
    groups.extend((Remove(network),) for network in reaper.unused_networks(store))
    return Decision(tuple(groups), wakes=tuple(wakes))


def look(
    store: Store, now: float, new_id: Callable[[], str], service: Service, *, fits: Fits, surplus: Surplus
) -> View:
    """Decide about one service; the view's groups and wake time say what."""
    view = View(store, now, new_id, fits, surplus, service, slots_of(store, service))
    if service.pending_delete:
        reaper.remove_service(view)
        return view
    if view.is_job:
        jobs.clear(view)
    restart.replace_ended(view)
    if view.is_global:
        everywhere.spread(view)
    elif view.is_job:
        jobs.start(view)
    else:
        replicated.scale(view)
    moves.advance(view)
    if not view.is_job:
        rollout.advance(view)
    restart.promote(view)
    reaper.trim(view)
    return view


def _touched(store: Store, dirty: Dirty) -> list[Service]:
    if dirty.everything:
        ids = {service.id for service in store.services} | set(store.tasks.keys("service"))
    else:
        ids = set(dirty.services)
        for node_id in dirty.nodes:
            ids.update(task.service_id for task in store.tasks.where("node", node_id))
        if dirty.nodes:
            ids.update(service.id for service in store.services if states.is_global(service.spec))
    # A service that is gone may have left tasks; those of no service at all (service_id "") are nobody's business here.
    return [store.services.get(service_id) or reaper.ownerless(service_id) for service_id in sorted(ids) if service_id]
