"""The mirror as the name server sees it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dns.interface import NetworkNames, Picture, Sandbox
from dns.message import to_wire
from dns.names import NetworkView, TaskView
from node import view
from node.mirror import Mirror
from node.pictures import Pictures
from proto.dispatch_pb2 import Item
from proto.objects_pb2 import DNSRR, TASK_FAILED, TASK_RUNNING, UDP
from tests.test_agent_view import LOCAL, end, mirror, net, port, svc


def drawn(seen: Mirror, boxes: list[Sandbox], local: view.Local = LOCAL) -> Picture:
    return Pictures().draw(seen, local, boxes, ("192.0.2.53",))


def box(task_id: str = "t1", *network_ids: str) -> Sandbox:
    return Sandbox(task_id, f"/netns/{task_id}", network_ids or ("net1",), search=("corp",))


def test_names_of_a_network() -> None:
    seen = mirror(
        net("net1"),
        svc(aliases=("db", "svc1-name")),
        svc("svc2", vip="", mode=DNSRR),
        end("t1", "10.0.1.3"),
        end("t2", "10.0.1.4", node="n2", serving=False),
        end("t3", "10.0.1.5", service="svc2"),
    )
    picture = drawn(seen, [box()])
    (network,) = picture.networks
    assert (network.network_id, network.name, network.internal) == ("net1", "net1-name", False)
    one, two = sorted(network.services, key=lambda each: each.names)
    assert (one.names, one.vip, one.task_addresses) == (("svc1-name", "db"), "10.0.1.2", ("10.0.1.3",))
    assert (two.names, two.vip, two.task_addresses) == (("svc2-name",), None, ("10.0.1.5",))
    assert {(t.names, t.address) for t in network.tasks} == {
        (("web.1.t1", "t1", "web.1", "1.web"), "10.0.1.3"),
        (("web.2.t2", "t2"), "10.0.1.4"),  # not serving: the slot's name belongs to the one that is
        (("web.3.t3", "t3", "web.3", "3.web"), "10.0.1.5"),
    }
    assert picture.upstreams == ("192.0.2.53",)
    assert picture.sandboxes == (box(),)


def test_the_short_container_id_is_the_hostname_that_a_container_gets() -> None:
    long = "abcdefghijklmnopqrstuvwx1"
    (network,) = drawn(mirror(net("net1"), end(long, "10.0.1.3")), [box()]).networks
    assert "abcdefghijkl" in network.tasks[0].names


def test_both_families_and_the_ports_of_a_service() -> None:
    items = svc(ports=(port(8000, 80), port(53, 5353, protocol=UDP)))
    items["service/svc1"].service.virtual_ips[0].address6 = "fd00:1::2/64"
    items["service/svc1"].service.ports[0].name = "http"
    task = end("t1", "10.0.1.3")
    task["endpoint/net1/t1"].endpoint.address6 = "fd00:1::3"
    (network,) = drawn(mirror(net("net1"), items, task), [box()]).networks
    (service,) = network.services
    assert (service.vip, service.vip6) == ("10.0.1.2", "fd00:1::2")
    assert service.task_addresses == ("10.0.1.3", "fd00:1::3")
    assert service.ports == (("http", "tcp", 80), ("", "udp", 5353))
    assert network.tasks[0].address6 == "fd00:1::3"


def test_a_local_task_that_ended_leaves_the_names_before_the_managers_know() -> None:
    seen = mirror(net("net1"), svc(), end("t1", "10.0.1.3"), end("t2", "10.0.1.4"))
    pictures = Pictures()
    for states, left in (
        ({"t1": TASK_RUNNING}, ("10.0.1.3", "10.0.1.4")),
        ({"t1": TASK_FAILED}, ("10.0.1.4",)),
        ({}, ("10.0.1.3", "10.0.1.4")),
    ):
        local = view.Local("n1", "192.0.2.1", 7, states=states)
        assert pictures.draw(seen, local, [box()], ()).networks[0].services[0].task_addresses == left


def test_a_slot_keeps_its_name_when_another_task_takes_it_over() -> None:
    def looked_up(*serving: bool) -> list[str | None]:
        old, new = end("t1", "10.0.1.3", serving=serving[0]), end("s1", "10.0.1.4", node="n2", serving=serving[1])
        (network,) = drawn(mirror(net("net1"), svc(), old, new), [box()]).networks
        task_view = TaskView([NetworkView(network)])
        found = [task_view.lookup(to_wire(name) or b"") for name in ("1.web", "web.1", "1.web.net1-name")]
        return [None if each is None else str(each[1][0].addresses[0][-1]) for each in found]

    assert looked_up(True, False) == ["3"] * 3
    assert looked_up(False, True) == ["4"] * 3
    assert looked_up(False, False) == [None] * 3


def test_a_service_is_named_only_on_its_networks_and_ingress_has_no_names() -> None:
    seen = mirror(net("net1"), net("net2"), net("net3", ingress=True), svc(), end("t9", "10.0.3.3", "net3"))
    picture = drawn(seen, [box("t1", "net3", "net2", "net1")])
    assert {n.network_id: len(n.services) for n in picture.networks} == {"net1": 1, "net2": 0}
    assert picture.sandboxes[0].network_ids == ("net2", "net1"), "in the order of the task, without ingress"


def test_networks_that_no_local_task_sees_are_not_served() -> None:
    assert [each.network_id for each in drawn(mirror(net("net1"), net("net2"), svc()), [box()]).networks] == ["net1"]
    assert drawn(mirror(net("net1")), []).networks == ()


Step = tuple[dict[str, dict[str, Item]], dict[str, int], list[Sandbox]]
"""Items of the mirror, states of local tasks, sandboxes."""
choices = {
    "network/net1": [net("net1"), net("net1", internal=True)],
    "network/net2": [net("net2"), net("net2", ingress=True)],
    "service/svc1": [svc(), svc(mode=DNSRR), svc(aliases=("db",)), svc(vip="")],
    "service/svc2": [svc("svc2", "10.0.1.9")],
    "endpoint/net1/t1": [end("t1", "10.0.1.3"), end("t1", "10.0.1.3", serving=False)],
    "endpoint/net1/t2": [end("t2", "10.0.1.4"), end("t2", "10.0.1.4", service="svc2")],
    "endpoint/net2/t2": [end("t2", "10.0.2.4", "net2"), end("t2", "", "net2")],
}
steps = st.tuples(
    st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in choices.items()}),
    st.dictionaries(st.sampled_from(["t1", "t2"]), st.sampled_from([TASK_RUNNING, TASK_FAILED])),
    st.lists(st.sampled_from([box("t1"), box("t2", "net2", "net1")]), unique=True),
)


def sets(picture: Picture) -> tuple[object, ...]:
    def of_network(network: NetworkNames) -> tuple[object, ...]:
        return network.network_id, network.name, network.internal, set(network.services), set(network.tasks)

    return [of_network(each) for each in picture.networks], picture.sandboxes, picture.upstreams


@given(st.lists(steps, min_size=2, max_size=8))
def test_a_picture_drawn_from_the_one_before_is_the_one_drawn_afresh(history: list[Step]) -> None:
    pictures = Pictures()
    for items, states, boxes in history:
        known = [found for found in boxes if all(f"network/{each}" in items for each in found.network_ids)]
        seen, local = mirror(*items.values()), view.Local("n1", "192.0.2.1", 7, states=states)  # type: ignore[arg-type]
        assert sets(pictures.draw(seen, local, known, ())) == sets(Pictures().draw(seen, local, known, ()))


def test_what_did_not_change_is_the_same_object() -> None:
    items = [net("net1"), net("net2"), svc(), end("t1", "10.0.1.3"), end("t2", "10.0.2.4", "net2", service="svc2")]
    boxes = [box("t1", "net1", "net2")]
    pictures = Pictures()
    before = pictures.draw(mirror(*items), LOCAL, boxes, ()).networks
    after = pictures.draw(mirror(*items[:-1], end("t3", "10.0.2.5", "net2")), LOCAL, boxes, ()).networks
    assert before[0] is after[0]
    assert before[1] != after[1]
