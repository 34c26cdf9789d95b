"""The architecture, checked from the syntax tree: who may import whom, and who owns the top-level names."""

from __future__ import annotations

import ast
import importlib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "proto": set(),
    "overlay": {"proto"},
    "dns": {"proto"},
    "node": {"proto", "overlay", "dns"},
    "swarm": {"proto"},
}
SEES_BOTH = ("swarm/start.py", "swarm/daemon.py", "swarm/lab/")
PURE = ("swarm/orchestrate", "swarm/schedule", "swarm/allocate")
PURE_MAY_IMPORT = ("swarm.store", "swarm.errors")
PURE_MAY_NOT_IMPORT = ("swarm.store.writer",)
IMPURE_MODULES = {"time", "random", "asyncio", "socket", "subprocess", "os", "secrets", "uuid"}
LINES_MAX = 450
"""The rule is about 400; this is where "about" ends."""


def sources(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).rglob("*.py")) if "_pb2" not in path.name]


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    wrong = []
    for path in sources(package):
        name = str(path.relative_to(ROOT))
        if name.startswith(SEES_BOTH):
            continue
        tops = {module.partition(".")[0] for module in imported(path)}
        wrong += [f"{name} imports {top}" for top in sorted(tops & ALLOWED.keys() - ALLOWED[package] - {package})]
    assert wrong == []


@pytest.mark.parametrize("package", PURE)
def test_deciders_do_no_io_and_do_not_know_each_other(package: str) -> None:
    own = package.replace("/", ".")
    wrong = []
    for path in sources(package):
        for module in sorted(imported(path)):
            if module.partition(".")[0] in IMPURE_MODULES:
                wrong.append(f"{path.name} imports {module}")
            if module.startswith("swarm") and (
                not module.startswith((own, *PURE_MAY_IMPORT)) or module in PURE_MAY_NOT_IMPORT
            ):
                wrong.append(f"{path.name} imports {module}")
    assert wrong == []


def test_only_consensus_knows_pysyncobj() -> None:
    knowing = {
        path.relative_to(ROOT).parent
        for package in ALLOWED
        for path in sources(package)
        if any(module.partition(".")[0] == "pysyncobj" for module in imported(path))
    }
    assert knowing <= {Path("swarm/consensus")}


def test_nothing_unpickles() -> None:
    pickling = [
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in sources(package)
        if imported(path) & {"pickle", "shelve", "marshal", "dill"}
    ]
    assert pickling == []


def test_no_module_outgrows_one_concept() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for package in ALLOWED
        for path in sources(package)
        if (lines := len(path.read_text().splitlines())) > LINES_MAX
    }
    assert long == {}


@pytest.mark.parametrize("name", ALLOWED)
def test_top_level_names_are_ours_alone(name: str) -> None:
    """dnspython ships `dns`, proto-plus ships `proto`: neither may come in, even as a dependency's dependency."""
    assert Path(importlib.import_module(name).__file__ or "").is_relative_to(ROOT)
    assert set(packages_distributions().get(name, [])) <= {"pyswarm-cluster"}
