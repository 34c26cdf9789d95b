"""What of a host itself explains failed checks: its settings, our own tables and entries, foreign firewall rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from proto.control_pb2 import Diagnosis
from proto.dispatch_pb2 import HostFacts, NetworkFacts
from swarm.doctor.checks import Check, Kind
from swarm.doctor.evidence import Evidence

ENDPOINTS_TOLD = 5_000
"""As many a node tells of one network (node/doctor.py)."""
MTU_OPTION = "com.docker.network.driver.mtu"
OVERHEAD_BYTES = 50
"""Of VXLAN over IPv4."""
SHOWN_MAX = 5

Concerns = Callable[[Check], bool]


def of_host(
    node_id: str, name: str, facts: HostFacts, called: Callable[[str], str]
) -> Iterator[tuple[Diagnosis, Concerns]]:
    """What is wrong on the node, each with the checks that may fail because of it."""

    def broken(what: str, why: str, remedy: str) -> Diagnosis:
        return Diagnosis(severity=Diagnosis.BROKEN, subject=name, what=what, why=why, remedy=remedy)

    def is_here(check: Check) -> bool:
        return node_id in (check.node_id, check.peer_id)

    if not facts.underlay_link:
        what = "no link of the host has its data path address"
        remedy = "give the address back to the host, or leave and join again with --data-path-addr"
        yield broken(what, facts.networks_error or "the address was taken away", remedy), is_here
    elif facts.networks_error:
        what = "its networks could not be brought up to date"
        yield broken(what, facts.networks_error, "mend what it says: the daemon tries again every few seconds"), is_here
    if not facts.forwards:
        yield (
            broken(
                "forwarding is off (net.ipv4.ip_forward=0)",
                "so tasks do not get out, and published ports lead only to tasks on the host itself",
                "sysctl -w net.ipv4.ip_forward=1, and find what turns it off: /etc/sysctl.d, a firewall's start script;"
                " the daemon turns it on again every few seconds",
            ),
            lambda check: _is_forwarded(check, node_id),
        )
    if facts.strict_links:
        yield (
            broken(
                f"rp_filter is strict on {', '.join(facts.strict_links[:SHOWN_MAX])}",
                "so answers that come by another way than their question are dropped",
                f"sysctl -w net.ipv4.conf.{facts.strict_links[0]}.rp_filter=2, and net.ipv4.conf.all.rp_filter=2",
            ),
            lambda check: _is_forwarded(check, node_id),
        )
    if facts.tables_missing:
        yield _tables(node_id, facts, broken)
    for network in facts.networks:
        if network.missing or network.foreign:
            yield _drift(node_id, network, called(network.network_id), broken)


def _is_forwarded(check: Check, node_id: str) -> bool:
    if check.kind is Kind.PUBLISHED:
        return check.peer_id == node_id
    return check.node_id == node_id and check.kind is Kind.EGRESS


def _tables(node_id: str, facts: HostFacts, broken: Callable[..., Diagnosis]) -> tuple[Diagnosis, Concerns]:
    tasks = set(facts.tables_missing) - {"host"}
    where = ["of the host"] if "host" in facts.tables_missing else []
    where += [f"of {len(tasks)} tasks"] if tasks else []
    diagnosis = broken(
        f"the nftables tables of pyswarm {' and '.join(where)} are missing",
        "without them there is no balancing, no way out, and names do not resolve",
        "find what flushes them: `nft flush ruleset` at the start of /etc/nftables.conf, a firewall's reload;"
        " the daemon lays them anew every few seconds",
    )

    def concerns(check: Check) -> bool:
        if "host" in facts.tables_missing and (
            _is_forwarded(check, node_id) or (check.kind is Kind.BACKEND and check.node_id == node_id)
        ):
            return True
        return check.task_id in tasks and check.kind in (Kind.NAMES, Kind.VIP)

    return diagnosis, concerns


def _drift(
    node_id: str, network: NetworkFacts, name: str, broken: Callable[..., Diagnosis]
) -> tuple[Diagnosis, Concerns]:
    parts = [(network.missing, "missing"), (network.foreign, "not ours")]
    diagnosis = broken(
        f"the kernel does not have network {name} as the managers say",
        "; ".join(f"{words}: {_listed(entries)}" for entries, words in parts if entries),
        "find what changes links and entries in the namespaces of pyswarm (NetworkManager, a script);"
        " the daemon repairs them every few seconds and logs it as overlay_repaired",
    )
    return diagnosis, lambda check: check.network_id == network.network_id and node_id in (check.node_id, check.peer_id)


def _listed(entries: Iterable[str]) -> str:
    found = list(entries)
    more = f" and {len(found) - SHOWN_MAX} more" if len(found) > SHOWN_MAX else ""
    return ", ".join(found[:SHOWN_MAX]) + more


# ---- foreign firewalls


def firewall(
    evidence: Evidence, node_ids: Iterable[str], traffic: str, pairs: Iterable[frozenset[str]]
) -> tuple[str, str]:
    """(why, remedy) from foreign rules on these nodes that drop the traffic; ("", "") if there are none. Of VXLAN and
    pings, only what goes between the pairs counts."""
    pairs = list(pairs)
    whys: list[str] = []
    remedies: list[str] = []
    for node_id in sorted(node_ids, key=evidence.name):
        peers = {peer for pair in pairs if node_id in pair for peer in pair - {node_id}}
        found = evidence.drops(node_id, traffic, _addresses_of(evidence, peers))
        rules = dict.fromkeys((drop.table, drop.chain, drop.rule, drop.certain) for drop in found)
        for table, chain, rule, certain in list(rules)[:SHOWN_MAX]:
            name = evidence.name(node_id)
            verb = "drops" if certain else "may drop"
            whys.append(f"on {name}, chain {chain} of table {table} {verb} them: {rule}")
            remedies.append(f"on {name}: {_mended(table, chain, rule)}")
    return "; ".join(whys), "; ".join(remedies)


def _addresses_of(evidence: Evidence, node_ids: set[str]) -> set[str]:
    return {
        check.address
        for check in evidence.plan.checks
        if check.kind in (Kind.UNDERLAY, Kind.PATH) and check.peer_id in node_ids
    }


def _mended(table: str, chain: str, rule: str) -> str:
    _, has_handle, handle = rule.rpartition(" # handle ")
    if has_handle:
        return f"nft delete rule {table} {chain} handle {handle}, or accept the packets before it"
    return f"accept the packets before the policy of that chain: nft insert rule {table} {chain} ... accept"
