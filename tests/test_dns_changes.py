"""Pictures told as changes: the server ends where the whole picture would have led it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dns.changes import Changes, difference, digest_of, whole
from dns.interface import NetworkNames, Picture, Sandbox, ServiceNames, TaskNames
from dns.wire import decode, encode
from dns.zones import OutOfStep, Zones

words = st.sampled_from(["a", "b", "c", "d"])
ipv4 = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3"])
services = st.builds(
    lambda name, aliases, vip, tasks, vip6, ports: ServiceNames((name, *aliases), vip, tuple(tasks), vip6, ports),
    words,
    st.sets(words, max_size=2).map(sorted),
    st.one_of(st.none(), ipv4),
    st.lists(ipv4, max_size=2, unique=True),
    st.sampled_from([None, "fd00::2"]),
    st.sampled_from([(), (("http", "tcp", 80),)]),
)
tasks = st.builds(lambda name, address: TaskNames((f"{name}.1.{name}", f"{name}.1"), address), words, ipv4)
networks = st.builds(
    NetworkNames,
    network_id=words,
    name=words,
    internal=st.booleans(),
    services=st.lists(services, max_size=3, unique_by=lambda each: each.names[0]).map(tuple),
    tasks=st.lists(tasks, max_size=3, unique_by=lambda each: each.names[0]).map(tuple),
)
boxes = st.builds(
    Sandbox,
    words,
    st.just("/run/netns/x"),
    st.lists(words, max_size=2).map(tuple),
    search=st.sampled_from([(), ("s",)]),
)
pictures = st.builds(
    Picture,
    st.lists(networks, max_size=3, unique_by=lambda each: each.network_id).map(tuple),
    st.lists(boxes, max_size=3, unique_by=lambda each: each.task_id).map(tuple),
    st.sampled_from([(), ("10.9.9.9",)]),
)


def content(zones: Zones) -> dict[str, object]:
    """Everything that an answer may depend on, but for the order of equals."""
    return {
        "networks": {
            network_id: (
                view.names,
                {name: frozenset(holders) for name, holders in view._holders.items()},
                view.services,
                view.tasks,
            )
            for network_id, view in zones.networks.items()
        },
        "sandboxes": zones.sandboxes,
        "upstreams": zones.upstreams,
        "digest": zones.digest,
    }


@given(st.lists(pictures, min_size=1, max_size=6))
def test_changes_lead_where_the_whole_picture_leads(history: list[Picture]) -> None:
    zones, before = Zones(), Picture()
    for picture in history:
        zones.apply(decode(encode(difference(before, picture, zones.digest))))
        afresh = Zones()
        afresh.apply(decode(encode(whole(picture, zones.digest))))
        assert content(zones) == content(afresh)
        assert zones.digest == digest_of(picture)
        before = picture


@given(pictures, pictures)
def test_pictures_with_one_digest_are_one_picture(one: Picture, other: Picture) -> None:
    def sets(picture: Picture) -> tuple[object, ...]:
        networks = {replace(each, services=(), tasks=()) for each in picture.networks}
        parts = {(each.network_id, part) for each in picture.networks for part in (*each.services, *each.tasks)}
        return networks, parts, set(picture.sandboxes), picture.upstreams

    assert (digest_of(one) == digest_of(other)) == (sets(one) == sets(other))


@given(pictures)
def test_a_picture_survives_the_wire(picture: Picture) -> None:
    assert decode(encode(whole(picture, 7))) == whole(picture, 7)


NETWORK = NetworkNames(
    "n1",
    "net",
    False,
    tuple(ServiceNames((f"s{number}",), f"10.0.1.{number}", ()) for number in range(100)),
    tuple(TaskNames((f"s{number}.1.x",), f"10.0.2.{number}") for number in range(100)),
)


def test_one_changed_service_is_all_that_is_said() -> None:
    changed = ServiceNames(("s7",), "10.0.1.7", ("10.0.2.7",))
    before = Picture((NETWORK,), (), ())
    after = Picture((replace(NETWORK, services=(*NETWORK.services[:7], changed, *NETWORK.services[8:])),), (), ())
    (only,) = difference(before, after, digest_of(before)).networks
    assert (only.names.services, only.names.tasks, only.gone_services, only.gone_tasks) == ((changed,), (), (), ())
    assert difference(after, after, digest_of(after)) == Changes(digest_of(after), digest_of(after))


def test_a_change_of_another_picture_is_refused_and_changes_nothing() -> None:
    zones = Zones()
    zones.apply(whole(Picture((NETWORK,), (), ()), 7))
    before = content(zones)
    with pytest.raises(OutOfStep):
        zones.apply(difference(Picture(), Picture(), digest_of(Picture())))
    assert content(zones) == before


def test_a_change_says_which_networks_it_touches() -> None:
    zones, before = Zones(), Picture((NETWORK, replace(NETWORK, network_id="n2")), (), ())
    assert zones.apply(whole(before, 7)) is None
    after = replace(before, networks=(replace(NETWORK, tasks=()), before.networks[1]))
    assert zones.apply(difference(before, after, zones.digest)) == frozenset({"n1"})
    assert zones.apply(difference(after, replace(after, networks=after.networks[:1]), zones.digest)) is None
