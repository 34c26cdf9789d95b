from __future__ import annotations

from node.resolvers import parse


def test_only_nameserver_lines_count() -> None:
    text = "# nameserver 9.9.9.9\nsearch lan\nnameserver 10.0.0.2\nnameserver fd00::1 # second\nnameserver\noptions x\n"
    assert parse(text) == ("10.0.0.2", "fd00::1")
