"""What benchmarks read from the machine: memory, CPU time, and how they print."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
INSTALL_TIMEOUT_S = 300


def pss_mib(pids: Iterable[int]) -> float:
    """Proportional set size of the processes: shared pages are divided among their users."""
    total_kib = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total_kib += int(line.split()[1])
    return total_kib / 1024


class CpuAccount:
    """A cpuacct (v1) cgroup whose processes and their later children are counted together."""

    def __init__(self, name: str) -> None:
        self._path = CGROUP / "cpuacct" / name

    def adopt(self, pids: Iterable[int]) -> bool:
        """False where there is no v1 cpuacct hierarchy."""
        if not (CGROUP / "cpuacct").is_dir():
            return False
        self._path.mkdir(exist_ok=True)
        for pid in pids:
            (self._path / "cgroup.procs").write_text(str(pid))
        return True

    def seconds(self) -> float:
        return usage_s(self._path)

    def close(self) -> None:
        """Hand the processes back and remove the group."""
        for pid in (self._path / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (CGROUP / "cpuacct" / "cgroup.procs").write_text(pid)
        with contextlib.suppress(OSError):
            os.rmdir(self._path)


def usage_s(path: Path) -> float:
    """CPU seconds of a v1 cgroup and all below it; 0 if it is gone."""
    with contextlib.suppress(OSError):
        return int((path / "cpuacct.usage").read_text()) / 1e9
    return 0.0


def cpu_ticks_s(pids: Iterable[int]) -> float:
    """User and system seconds of these processes alone."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def install(packages: Mapping[str, str]) -> None:
    """Install what is missing (command -> Debian's package); no service of theirs is started."""
    missing = sorted({package for command, package in packages.items() if shutil.which(command) is None})
    if not missing:
        return
    print("installing:", *missing, flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for words in (["update", "-q"], ["install", "-qy", "--no-install-recommends", *missing]):
        subprocess.run(["apt-get", *words], env=quiet, stdout=subprocess.DEVNULL, timeout=INSTALL_TIMEOUT_S, check=True)


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def table(rows: Iterable[tuple[str, str, str]]) -> None:
    """Rows of (what, measured, aim)."""
    print(f"{'':46} {'measured':>16}   aim")
    for what, measured, aim in rows:
        print(f"{what:46} {measured:>16}   {aim}")


def finish(as_json: bool, results: Mapping[str, float | None]) -> None:
    if as_json:
        print(json.dumps({key: None if value is None else round(value, 4) for key, value in results.items()}))
