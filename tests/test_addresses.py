"""What `swarm init` and `swarm join` accept as pools of subnets and as the address of overlay traffic."""

from __future__ import annotations

import pytest

from swarm.addresses import check_pools, vtep_of
from swarm.errors import Invalid

ADDRESSES = {"eth0": ["192.0.2.7/24"], "eth1": ["198.51.100.7/24", "198.51.100.8/24"]}


def test_pools_that_do_not_meet_are_accepted() -> None:
    check_pools(["10.10.0.0/16", "10.20.0.0/16"], 24)
    check_pools(["10.10.0.0/16"], 16)


@pytest.mark.parametrize(
    ("pools", "bits", "why"),
    [
        (["10.10.0.1/16"], 24, "has host bits set"),
        (["ten"], 24, "invalid --default-addr-pool 'ten'"),
        (["fd00::/8"], 24, "IPv6 subnets come from the swarm's own prefix"),
        (["10.10.0.0/16", "10.10.128.0/17"], 24, "it overlaps pool 10.10.0.0/16"),
        (["10.10.0.0/16"], 15, "must be from 16"),
        (["10.10.0.0/16"], 30, "to 29"),
    ],
)
def test_bad_pools_name_the_flag(pools: list[str], bits: int, why: str) -> None:
    with pytest.raises(Invalid, match=why) as caught:
        check_pools(pools, bits)
    assert "--default-addr-pool" in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "advertised", "address"),
    [
        ("", "", ""),
        ("", "192.0.2.7", "192.0.2.7"),
        ("", "127.0.0.1", "127.0.0.1"),
        ("198.51.100.8", "203.0.113.1", "198.51.100.8"),
        ("eth0", "node1.example.com", "192.0.2.7"),
    ],
)
def test_the_data_path_is_an_address_of_this_host(wanted: str, advertised: str, address: str) -> None:
    assert vtep_of(wanted, advertised, ADDRESSES) == address


@pytest.mark.parametrize("wanted", ["0.0.0.0", "eth9", "192.0.2.7:4789", "2001:db8::1", "192.0.2.9"])
def test_bad_data_paths_name_the_flag(wanted: str) -> None:
    with pytest.raises(Invalid, match="invalid --data-path-addr"):
        vtep_of(wanted, "192.0.2.7", ADDRESSES)


@pytest.mark.parametrize("advertised", ["203.0.113.1", "node1.example.com", "2001:db8::1"])
def test_an_advertised_address_that_is_elsewhere_needs_a_data_path(advertised: str) -> None:
    with pytest.raises(Invalid, match=f"{advertised} is no IPv4 address of this host.*--data-path-addr"):
        vtep_of("", advertised, ADDRESSES)


def test_an_interface_of_two_addresses_is_no_choice() -> None:
    with pytest.raises(Invalid, match="eth1 has 2 addresses"):
        vtep_of("eth1", "", ADDRESSES)
