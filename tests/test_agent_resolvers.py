"""The host's resolv.conf, and what of it tasks get."""

from __future__ import annotations

from node.resolvers import ResolvConf, of_host, parse, search_domains


def test_addresses_of_nameservers_and_the_last_list_of_domains_count() -> None:
    text = (
        "# nameserver 9.9.9.9\nsearch lan\nnameserver 10.0.0.2\nnameserver fd00::1 # second\nnameserver\noptions x\n"
        "nameserver dns.example\nnameserver fe80::1%eth0\n\nsearch corp.example example\n"
    )
    assert parse(text) == ResolvConf(("10.0.0.2", "fd00::1", "fe80::1%eth0"), ("corp.example", "example"))


def test_a_task_without_search_domains_has_the_host_s_and_a_dot_means_none() -> None:
    assert search_domains(["a.example", "b"]) == ("a.example", "b")
    assert search_domains([]) == of_host().search
    assert search_domains(["."]) == ()
