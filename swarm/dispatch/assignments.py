"""What each node has to know, kept up to date change by change.

The index holds every item once, by the scopes in which it is seen, and a view per connected node: the
scopes the node is in, what it was sent, and what changed since (latest wins per key, so a slow node
costs no more memory than its number of keys). One event costs the items it touches times the nodes
that see them; nothing is ever scanned. Pure: no clock, no I/O; it reads the store inside one turn of
the event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from proto.dispatch_pb2 import Assignments
from proto.objects_pb2 import Network, Node, Service, Task
from swarm.dispatch.items import (
    EVERYWHERE,
    Scoped,
    Told,
    encoded,
    ingress_network_of,
    is_down,
    is_live,
    network_item,
    network_scope,
    networks_of,
    node_scope,
    peer_item,
    predefined_network,
    service_item,
    task_items,
    weight_of,
)
from swarm.dispatch.releases import Releases
from swarm.store.changes import Record
from swarm.store.states import is_encrypted, is_runnable
from swarm.store.store import Event, Store


class View:
    """One node's picture. `take` hands out the next message; messages chain by `base` and `result`."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.scopes: set[str] = set()
        self._own_peer = f"peer/{node_id}"
        self._sent: dict[str, bytes] = {}
        self._pending: dict[str, bytes | None] = {}
        self._snapshot_due = True
        self._sequence = 0
        self._leaving: list[str] = []
        """Tasks that left since the last message: the next one asks for a confirmation."""
        self._unconfirmed: dict[int, list[str]] = {}
        """Sequence of a message -> tasks that left by it."""

    @property
    def is_dirty(self) -> bool:
        return self._snapshot_due or bool(self._pending or self._leaving)

    def note(self, key: str, change: bytes | None) -> None:
        """This change (`items.encoded`) tells what the item is from now on; None: not seen any more."""
        if key != self._own_peer:
            self._pending[key] = change

    def leaves(self, task_id: str) -> None:
        """The task leaves this node's balancers by the changes noted now."""
        self._leaving.append(task_id)

    def confirmed(self, sequence: int) -> list[str]:
        """The node has applied everything up to this message: the tasks that it has let go by that."""
        done = [each for each in self._unconfirmed if each <= sequence]
        return [task_id for each in done for task_id in self._unconfirmed.pop(each)]

    def restart(self) -> None:
        """Forget what was sent: the next message is a whole snapshot."""
        self._sent.clear()
        self._pending.clear()
        self._snapshot_due = True

    def take(self) -> Assignments | None:
        """The snapshot, or the delta since the last message; None when nothing differs."""
        message = Assignments(
            snapshot=self._snapshot_due,
            base=self._sequence,
            result=self._sequence + 1,
            confirm=bool(self._leaving),
        )
        changes = []
        for key, change in self._pending.items():
            known = self._sent.get(key)
            if change is None:
                if known is not None:
                    del self._sent[key]
                    changes.append(encoded(key, None))
            elif known != change:
                self._sent[key] = change
                changes.append(change)
        self._pending.clear()
        message.MergeFromString(b"".join(changes))
        if not changes and not self._snapshot_due and not self._leaving:
            return None
        self._snapshot_due = False
        self._sequence += 1
        if self._leaving:
            self._unconfirmed[self._sequence], self._leaving = self._leaving, []
        return message


class AssignmentIndex:
    """Call `apply` with each sequence of events of the store, in order."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.releases = Releases()
        self._views: dict[str, View] = {}
        self._nodes_by_scope: dict[str, set[str]] = {}
        self._clear()
        self._rebuild()

    def _clear(self) -> None:
        self._items: dict[str, Told] = {}
        self._keys_by_scope: dict[str, dict[str, None]] = {}
        self._task_keys: dict[str, tuple[str, ...]] = {}
        self._task_networks: dict[str, tuple[str, frozenset[str]]] = {}
        self._uses: dict[str, Counter[str]] = {}
        self._ingress_of: dict[str, str] = {}
        self._ingress_uses: Counter[str] = Counter()
        self._predefined = predefined_network(self._store)
        self._encrypted = {network.id for network in self._store.networks if is_encrypted(network)}
        self._dirty: set[str] = set()
        """Nodes whose views were touched by the events being applied."""

    def _rebuild(self) -> None:
        self._clear()
        for network in self._store.networks:
            self._set(f"network/{network.id}", network_item(network))
        for node in self._store.nodes:
            self._put_peer(node.id)
        for service in self._store.services:
            self._put_service(service.id, service)
        for task in self._store.tasks:
            self._put_task(task.id, task)

    # ---- views

    def attach(self, node_id: str) -> View:
        """A fresh view, which replaces an earlier one of the same node; its first message is a snapshot."""
        earlier = self._views.get(node_id)
        if earlier is not None:
            self.detach(earlier)
        view = self._views[node_id] = View(node_id)
        self._fill(view)
        return view

    def detach(self, view: View) -> None:
        """The node's session has ended; a view that was replaced already is left alone."""
        if self._views.get(view.node_id) is not view:
            return
        del self._views[view.node_id]
        self.releases.gone(view.node_id)
        for scope in list(view.scopes):
            self._leave(view, scope)

    def uses_encryption(self, node_id: str) -> bool:
        """The node is on an encrypted network: by a task, or because it lets published traffic in."""
        return not self._encrypted.isdisjoint(self._uses.get(node_id, Counter()).keys() | self._ingress_uses.keys())

    def _fill(self, view: View) -> None:
        for scope in list(view.scopes):
            self._leave(view, scope)
        view.restart()
        networks = set(self._uses.get(view.node_id, ())) | set(self._ingress_uses)
        for scope in (EVERYWHERE, node_scope(view.node_id), *map(network_scope, sorted(networks))):
            self._enter(view, scope)
            for key in self._keys_by_scope.get(scope, ()):
                view.note(key, self._items[key].change)

    # ---- events

    def apply(self, events: Sequence[Event]) -> set[str]:
        """Take in what happened; returns the nodes whose views have something to send.
        An empty sequence means that the store was replaced: all is built anew."""
        self._dirty = set()
        if not events:
            self._rebuild()
            for view in self._views.values():
                self._fill(view)
            return set(self._views)
        for event in events:
            record = event.record
            after = event.after
            if isinstance(record, Task):
                self._put_task(record.id, after if isinstance(after, Task) else None)
            elif isinstance(record, Service):
                self._put_service(record.id, after if isinstance(after, Service) else None)
                if _weight_label(event.before) != _weight_label(after):
                    self._put_tasks("service", record.id)
            elif isinstance(record, Network):
                self._put_network(event)
            elif isinstance(record, Node):
                self._put_node(event)
        return {node_id for node_id in self._dirty if self._views[node_id].is_dirty}

    def _put_task(self, task_id: str, task: Task | None) -> None:
        items: dict[str, Scoped] = {}
        if task is not None:
            node, service = self._store.nodes.get(task.node_id), self._store.services.get(task.service_id)
            items = task_items(task, is_down(node), self._unreached(task), weight_of(service, node))
        stops = self._begins_to_stop(task_id, task)
        viewers = self._served_to(task_id) if stops else set()
        # In whichever order scopes and items change, a view settles per key on what is true at the end.
        self._use(task_id, task.node_id if task is not None else "", networks_of(task) if task else frozenset())
        for key in self._task_keys.pop(task_id, ()):
            if key not in items:
                self._set(key, None)
        for key, scoped in items.items():
            self._set(key, scoped)
        if items:
            self._task_keys[task_id] = tuple(items)
        if task is None or not is_live(task):
            self.releases.forget(task_id)
        elif stops:
            for node_id in viewers:
                self._views[node_id].leaves(task_id)
                self._dirty.add(node_id)
            self.releases.begin(task_id, task.node_id, viewers)

    def _begins_to_stop(self, task_id: str, task: Task | None) -> bool:
        known = self._items.get(f"task/{task_id}")
        return task is not None and not is_runnable(task) and known is not None and is_runnable(known.item.task)

    def _served_to(self, task_id: str) -> set[str]:
        """Connected nodes whose balancers or names hold the task now."""
        return {
            node_id
            for key in self._task_keys.get(task_id, ())
            if self._items[key].item.endpoint.serving
            for scope in self._items[key].scopes
            for node_id in self._nodes_by_scope.get(scope, ())
        }

    def _unreached(self, task: Task) -> str:
        """The predefined network, for tasks of a service that receives no published traffic there. It serves no names
        and has no VIPs; tasks without networks of their own, which may be all of a swarm's, are on it to get out.
        Telling each of them to every node would cost nodes times tasks, twice."""
        return "" if self._ingress_of.get(task.service_id, "") == self._predefined else self._predefined

    def _use(self, task_id: str, node_id: str, networks: frozenset[str]) -> None:
        before = self._task_networks.pop(task_id, ("", frozenset()))
        if networks:
            self._task_networks[task_id] = (node_id, networks)
        if before == (node_id, networks):
            return
        touched = {node_id, before[0]} - {""}
        used = {each: set(self._uses.get(each, ())) for each in touched}
        if networks:
            self._uses.setdefault(node_id, Counter()).update(networks)
        old_node, old_networks = before
        if old_networks:
            uses = self._uses[old_node]
            _decrement(uses, old_networks)
            if not uses:
                del self._uses[old_node]
        for each in touched:
            if used[each] != self._uses.get(each, Counter()).keys():
                self._put_peer(each)
                if each in self._views:
                    self._rescope(self._views[each], networks | old_networks)

    def _put_peer(self, node_id: str) -> None:
        """A node is told to those who share a network with it on which the two have something to say: all hosts do on
        one with published ports, and nobody does on the predefined one otherwise."""
        node = self._store.nodes.get(node_id)
        networks = (self._uses.get(node_id, Counter()).keys() - {self._predefined}) | self._ingress_uses.keys()
        encrypts = not self._encrypted.isdisjoint(networks)
        self._set(f"peer/{node_id}", peer_item(node, networks, encrypts) if node is not None else None)

    def _put_service(self, service_id: str, service: Service | None) -> None:
        self._set(f"service/{service_id}", service_item(self._store, service) if service is not None else None)
        before = self._ingress_of.pop(service_id, "")
        after = ingress_network_of(self._store, service) if service is not None else ""
        if after:
            self._ingress_of[service_id] = after
        if before == after:
            return
        if after:
            self._ingress_uses[after] += 1
        if before:
            _decrement(self._ingress_uses, (before,))
        for node in self._store.nodes:
            self._put_peer(node.id)
        for view in self._views.values():
            self._rescope(view, {network_id for network_id in (before, after) if network_id})
        self._put_tasks("service", service_id)  # published now, or not any more: who has to know of it

    def _put_network(self, event: Event) -> None:
        before, after = event.before, event.after
        network = after if isinstance(after, Network) else None
        self._set(f"network/{event.record.id}", network_item(network) if network is not None else None)
        if network is None:
            self._encrypted.discard(event.record.id)
        elif is_encrypted(network):
            self._encrypted.add(network.id)
        if before is None or after is None:
            # Rare, and it may move the published traffic of any service.
            for service in self._store.services:
                self._put_service(service.id, service)
            predefined, self._predefined = self._predefined, predefined_network(self._store)
            if predefined != self._predefined:
                for task in self._store.tasks:
                    self._put_task(task.id, task)
                for node in self._store.nodes:
                    self._put_peer(node.id)

    def _put_node(self, event: Event) -> None:
        self._put_peer(event.record.id)
        if _shown_by_tasks(event.before) != _shown_by_tasks(event.after):
            self._put_tasks("node", event.record.id)

    def _put_tasks(self, index: str, key: str) -> None:
        for task in self._store.tasks.where(index, key):
            self._put_task(task.id, task)

    # ---- the engine: items, scopes, views

    def _set(self, key: str, scoped: Scoped | None) -> None:
        old = self._items.get(key)
        new = Told(encoded(key, scoped.item), scoped.scopes) if scoped is not None else None
        if old == new:
            return
        old_scopes = old.scopes if old is not None else frozenset()
        new_scopes = new.scopes if new is not None else frozenset()
        for scope in old_scopes - new_scopes:
            keys = self._keys_by_scope[scope]
            del keys[key]
            if not keys:
                del self._keys_by_scope[scope]
        for scope in new_scopes - old_scopes:
            self._keys_by_scope.setdefault(scope, {})[key] = None
        if new is None:
            del self._items[key]
        else:
            self._items[key] = new
        seen_by = {node_id for scope in old_scopes | new_scopes for node_id in self._nodes_by_scope.get(scope, ())}
        for node_id in seen_by:
            view = self._views[node_id]
            visible = new is not None and not new_scopes.isdisjoint(view.scopes)
            self._note(view, key, new.change if new is not None and visible else None)

    def _rescope(self, view: View, network_ids: Iterable[str]) -> None:
        """Enter or leave the scopes of these networks, as their use now says."""
        uses = self._uses.get(view.node_id, Counter())
        for network_id in network_ids:
            scope = network_scope(network_id)
            used = network_id in uses or network_id in self._ingress_uses
            if used == (scope in view.scopes):
                continue
            if used:
                self._enter(view, scope)
            else:
                self._leave(view, scope)
            for key in self._keys_by_scope.get(scope, ()):
                told = self._items[key]
                self._note(view, key, None if told.scopes.isdisjoint(view.scopes) else told.change)

    def _enter(self, view: View, scope: str) -> None:
        view.scopes.add(scope)
        self._nodes_by_scope.setdefault(scope, set()).add(view.node_id)

    def _leave(self, view: View, scope: str) -> None:
        view.scopes.discard(scope)
        nodes = self._nodes_by_scope.get(scope, set())
        nodes.discard(view.node_id)
        if not nodes:
            self._nodes_by_scope.pop(scope, None)

    def _note(self, view: View, key: str, change: bytes | None) -> None:
        view.note(key, change)
        self._dirty.add(view.node_id)


def _weight_label(record: Record | None) -> str:
    return record.endpoint.spec.weight_label if isinstance(record, Service) else ""


def _shown_by_tasks(record: Record | None) -> tuple[bool, dict[str, str]]:
    """What endpoints say of their node: whether it is down, and its labels, as weights."""
    return (is_down(record), dict(record.spec.annotations.labels)) if isinstance(record, Node) else (False, {})


def _decrement(counter: Counter[str], keys: Iterable[str]) -> None:
    """Counter that holds no zeros, so that its keys are what is in use."""
    for key in keys:
        counter[key] -= 1
        if counter[key] <= 0:
            del counter[key]
