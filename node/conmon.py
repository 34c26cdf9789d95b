"""The container runtime: crun (or runc) under conmon, one directory and one root mount per task.

The agent may die at any instant: conmon keeps the container, its log and its exit code. Every step is
written into the task's record first (taskdir.py), every call looks at the record and repeats safely.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from node import bundle, cgroups, execs, logs, monitor
from node.inotify import Inotify
from node.interface import ContainerStatus, CreateRequest, ExecCommand, RuntimeFault
from node.logrotate import LogRotation
from node.process import CommandMissing, CommandTimeout, Finished, run
from node.seccomp import SeccompFilters, filtered
from node.spec import Facts, capabilities
from node.taskdir import (
    UNFINISHED,
    Record,
    Step,
    TaskPaths,
    alive,
    boot_id,
    encode,
    load,
    settle,
    status_of,
    task_paths,
    write_text,
)
from node.volumes import Volumes, wanted_mounts
from proto.dispatch_pb2 import ExecStart, LogLine, LogOptions
from proto.objects_pb2 import Mount

STARTS_IN_FLIGHT_MAX = 8
"""More at once only queue for the CPU (research: runtime, section 4)."""
REMOVALS_IN_FLIGHT_MAX = 8
START_TIMEOUT_S = 30.0
DELETE_TIMEOUT_S = 30.0
KILL_TIMEOUT_S = 10.0
"""From SIGKILL to the monitor's end; only a process stuck in the kernel takes longer."""


class _FilterRefused(RuntimeFault):
    """The compiled seccomp program did not do; it has been given up and the creation can be repeated."""


class ConmonRuntime:
    """Implements `node.interface.Runtime`. `state_dir` survives reboots, `run_dir` holds mounts; see
    `node.mounts.prepare_mount_namespace`, which the process calls before. `cgroup_driver`: cgroupfs or systemd.
    `host_id` only shows in the monitors' command lines: which host of a lab they belong to."""

    def __init__(
        self,
        state_dir: Path,
        run_dir: Path,
        cgroup_parent: str,
        *,
        runtime: str = "auto",
        host_id: str = "",
        cgroup_driver: str = "",
    ) -> None:
        self._state_dir, self._run_dir, self._host_id = state_dir.resolve(), run_dir.resolve(), host_id
        self._cgroup_parent = cgroup_parent
        self._layout = cgroups.read_layout()
        self._driver = cgroups.default_driver(self._layout, cgroup_driver)
        path = monitor.find_runtime(runtime, self._layout)
        self._programs = self._programs_with(path)
        version = subprocess.run([path, "--version"], capture_output=True, timeout=10, check=False).stdout.decode()
        # Only crun knows the annotation, and leaves the compiled program to be found.
        self._filters = SeccompFilters(self._state_dir / "seccomp", version, enabled=Path(path).name == "crun")
        self._volumes = Volumes(self._state_dir / "volumes")
        self._caps = bundle.available_caps()
        self._boot_id = boot_id()
        self._inotify = Inotify()
        self._starts = asyncio.Semaphore(STARTS_IN_FLIGHT_MAX)
        self._removals = asyncio.Semaphore(REMOVALS_IN_FLIGHT_MAX)
        self._locks: dict[str, asyncio.Lock] = {}
        self._records: dict[str, Record] = {}
        self._watches: dict[str, asyncio.Task[ContainerStatus]] = {}
        self._rotation = LogRotation()
        self._exec_numbers = itertools.count(1)

    def _programs_with(self, runtime: str) -> monitor.Programs:
        root = self._run_dir / Path(runtime).name
        common = (f"--root={root}", *cgroups.runtime_args(runtime, self._driver))
        return monitor.Programs(shutil.which("conmon") or "conmon", runtime, common, root)

    # ------------------------------------------------------------------ the record of a task

    def _paths(self, task_id: str) -> TaskPaths:
        return task_paths(self._state_dir, self._run_dir, task_id)

    def _record(self, task_id: str) -> Record | None:
        if task_id not in self._records:
            record = load(self._paths(task_id))
            if record is None:
                return None
            self._records[task_id] = record
        return self._records[task_id]

    def _write(self, record: Record) -> Record:
        write_text(self._paths(record.task_id).record, encode(record))
        self._records[record.task_id] = record
        return record

    def _known(self, task_id: str) -> Record:
        record = self._record(task_id)
        if record is None or record.step in UNFINISHED:
            raise RuntimeFault(f"task {task_id} has no container on this node", permanent=False)
        return record

    @contextlib.asynccontextmanager
    async def _alone(self, task_id: str) -> AsyncGenerator[None]:
        lock = self._locks.setdefault(task_id, asyncio.Lock())
        async with lock:
            yield

    # ------------------------------------------------------------------ create and start

    async def create(self, request: CreateRequest) -> None:
        async with self._alone(request.task_id), self._starts:
            record = self._record(request.task_id)
            if record is not None and record.step not in UNFINISHED:
                return
            if record is not None:
                await self._reclaim(request.task_id)
            try:
                try:
                    await self._create(request)
                except _FilterRefused:
                    await self._reclaim(request.task_id)
                    await self._create(request)  # now with the filter compiled by the runtime
            except BaseException as error:
                await asyncio.shield(self._reclaim(request.task_id))
                if isinstance(error, OSError):
                    raise bundle.fault_of(error, f"preparing container {request.name}") from None
                raise

    async def _create(self, request: CreateRequest) -> None:
        paths = self._paths(request.task_id)
        paths.state.mkdir(parents=True, mode=0o710, exist_ok=True)
        record = self._write(
            Record(
                request.task_id,
                Step.PREPARING,
                self._boot_id,
                request.image.image_id,
                self._programs.runtime,
                request.spec.stop_signal or request.image.config.stop_signal or "SIGTERM",
                request.log_max_bytes,
                request.log_max_files,
            )
        )
        monitor.signal_of(record.stop_signal, "stop signal")
        await asyncio.to_thread(bundle.mount_rootfs, paths, request)
        mounts = await self._place_mounts(paths, request)
        seccomp_key, compiled = await asyncio.to_thread(self._configure, paths, request, mounts)
        record = self._write(replace(record, step=Step.CREATING))
        try:
            process, container = await monitor.launch(
                self._programs, paths, f"{self._host_id}:{request.name}", request.spec.tty
            )
        except RuntimeFault as fault:
            if not compiled or "seccomp" not in str(fault):
                raise
            self._filters.distrust()
            raise _FilterRefused(str(fault), permanent=False) from None
        record = replace(record, step=Step.CREATED, monitor=process, container=container)
        self._check_filter(record, seccomp_key, compiled)
        self._write(record)
        self._watch(request.task_id)

    async def _place_mounts(self, paths: TaskPaths, request: CreateRequest) -> tuple[tuple[Mount, Path], ...]:
        placed: list[tuple[Mount, Path]] = []
        wanted = wanted_mounts(list(request.spec.mounts), request.image.config.volumes)
        for number, mount in enumerate(wanted):
            anonymous = paths.state / "volumes" / str(number)
            placed.append((mount, await self._volumes.place(mount, paths.rootfs, anonymous)))
        return tuple(placed)

    def _configure(
        self, paths: TaskPaths, request: CreateRequest, mounts: tuple[tuple[Mount, Path], ...]
    ) -> tuple[str, bool]:
        wanted = request.spec
        caps = capabilities(wanted.capability_add, wanted.capability_drop, self._caps)
        key, section = self._filters.section(caps)
        annotations = self._filters.annotations(key)
        facts = Facts(
            rootfs=paths.rootfs,
            account=bundle.account_of(paths, request),
            cgroups_path=cgroups.cgroups_path(self._driver, self._cgroup_parent, request.task_id),
            seccomp=section,
            annotations=annotations,
            mounts=mounts,
            files=bundle.write_etc(paths, request),
            init=bundle.find_init() if wanted.init else None,
            cgroup_v2=self._layout.mode is cgroups.CgroupMode.V2,
            swap_limit=self._layout.swap_limit,
            devices=bundle.find_devices(wanted.devices),
            available_caps=self._caps,
        )
        bundle.write_config(paths, request, facts)
        return key, bool(annotations)

    def _check_filter(self, record: Record, key: str, compiled: bool) -> None:
        """The created process waits to be started and must have its filter by now."""
        assert record.container is not None
        try:
            if filtered(record.container.pid):
                if not compiled:
                    self._filters.learn(key, self._programs.root / record.task_id / "seccomp.bpf")
                return
        except OSError:
            return  # gone; starting it will say why
        if compiled:
            self._filters.distrust()
            raise _FilterRefused("starting container failed: it came up without its seccomp filter", permanent=False)
        # Without CAP_SYS_ADMIN in use the runtime sets the filter at the last moment: nothing to learn then.

    async def start(self, task_id: str) -> ContainerStatus:
        async with self._alone(task_id), self._starts:
            record = self._known(task_id)
            if record.step in (Step.CREATED, Step.STARTING) and alive(record.monitor):
                # A repeated start of one that runs already fails in the runtime, and is told by its state.
                repeated = record.step is Step.STARTING
                self._write(replace(record, step=Step.STARTING))
                done = await self._runtime("start", task_id, timeout_s=START_TIMEOUT_S)
                if done.code != 0 and not (repeated and await self._started(task_id)):
                    raise monitor.runtime_fault(_message(done))
                if self._records[task_id].step is Step.STARTING:  # it may have ended meanwhile
                    self._write(replace(self._records[task_id], step=Step.STARTED))
            self._watch(task_id)
        status = await self.status(task_id)
        assert status is not None
        return status

    async def _started(self, task_id: str) -> bool:
        done = await self._runtime("state", task_id, timeout_s=START_TIMEOUT_S)
        return done.code == 0 and b'"created"' not in done.output

    def _runtime_of(self, task_id: str) -> list[str]:
        """The runtime that made the container, which may not be the one for new ones."""
        record = self._records.get(task_id)
        programs = self._programs_with(record.runtime) if record and record.runtime else self._programs
        return [programs.runtime, *programs.runtime_args]

    async def _runtime(self, command: str, task_id: str, *, timeout_s: float) -> Finished:
        option = ("-f",) if command == "delete" else ()
        try:
            return await run([*self._runtime_of(task_id), command, *option, task_id], timeout_s=timeout_s)
        except (CommandTimeout, CommandMissing) as error:
            raise RuntimeFault(str(error), permanent=False) from None

    # ------------------------------------------------------------------ watch and stop

    def _watch(self, task_id: str) -> asyncio.Task[ContainerStatus]:
        if task_id not in self._watches:
            self._watches[task_id] = asyncio.create_task(self._supervise(task_id), name=f"watch {task_id}")
        return self._watches[task_id]

    async def _supervise(self, task_id: str) -> ContainerStatus:
        record = self._known(task_id)
        if record.monitor is not None and record.boot_id == self._boot_id:
            await monitor.ended(record.monitor)
        return self._settle(task_id)

    def _settle(self, task_id: str) -> ContainerStatus:
        """The monitor is gone: write down how the container ended."""
        record, paths = self._known(task_id), self._paths(task_id)
        if record.step is not Step.EXITED:
            text = paths.exit_file.read_text() if paths.exit_file.exists() else None
            same_boot = record.boot_id == self._boot_id
            if text is None and same_boot:
                # Killed monitor: its container may run on, without log or exit code. It is not one of ours any more.
                monitor.send(record.container, signal.SIGKILL)
            # The monitor may die before it has read the kernel's notice, so ask the counter as well.
            relative = cgroups.relative_dir(self._driver, self._cgroup_parent, task_id)
            oom = paths.oom_file.exists() or cgroups.oom_kills(self._layout, relative) > 0
            record = self._write(settle(record, text, oom and text is not None and text.strip() == "137", same_boot))
        status = status_of(record)
        assert status is not None
        return status

    async def wait(self, task_id: str) -> ContainerStatus:
        return await asyncio.shield(self._watch(task_id))

    async def status(self, task_id: str) -> ContainerStatus | None:
        record = self._record(task_id)
        if record is None or record.step in UNFINISHED:
            return None
        if record.step is not Step.EXITED and not (record.boot_id == self._boot_id and alive(record.monitor)):
            return self._settle(task_id)
        return status_of(record)

    async def stop(self, task_id: str, signal: str, grace_s: float) -> ContainerStatus:
        record = self._known(task_id)
        number = monitor.signal_of(signal or record.stop_signal, f"stopping task {task_id}")
        watch = self._watch(task_id)
        # One that was never started ignores everything but SIGKILL: it is the init of its PID namespace.
        if record.step is Step.STARTED and monitor.send(record.container, number):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    return await asyncio.shield(watch)
        return await self._kill(task_id, watch)

    async def _kill(self, task_id: str, watch: asyncio.Task[ContainerStatus]) -> ContainerStatus:
        record = self._known(task_id)
        monitor.send(record.container, signal.SIGKILL)
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                return await asyncio.shield(watch)
        except TimeoutError:
            raise RuntimeFault(
                f"task {task_id}: process {record.container.pid if record.container else 0} has not ended"
                f" {KILL_TIMEOUT_S:g} s after SIGKILL; it is stuck in the kernel",
                permanent=False,
            ) from None

    # ------------------------------------------------------------------ remove and adopt

    async def remove(self, task_id: str) -> None:
        async with self._alone(task_id), self._removals:
            record = self._record(task_id)
            if record is None:
                return
            if record.step not in UNFINISHED and record.step is not Step.EXITED:
                await self._kill(task_id, self._watch(task_id))
            if watch := self._watches.pop(task_id, None):
                watch.cancel()
            self._write(replace(self._records[task_id], step=Step.REMOVING))
            await self._reclaim(task_id)
        self._locks.pop(task_id, None)

    async def _reclaim(self, task_id: str) -> None:
        """Undo all of a task, however much of it there is."""
        paths = self._paths(task_id)
        record = self._records.get(task_id)
        if watch := self._watches.pop(task_id, None):
            watch.cancel()
        if record is None or record.step is not Step.REMOVING:
            await asyncio.to_thread(monitor.kill_remains, paths)
        made_by = record.runtime if record and record.runtime else self._programs.runtime
        runtime_state = self._programs_with(made_by).root / task_id
        if runtime_state.exists():
            await self._runtime("delete", task_id, timeout_s=DELETE_TIMEOUT_S)
        await asyncio.to_thread(self._clear, paths, runtime_state)
        self._records.pop(task_id, None)
        self._rotation.forget(paths.log)

    def _clear(self, paths: TaskPaths, runtime_state: Path) -> None:
        cgroups.remove(self._layout, cgroups.relative_dir(self._driver, self._cgroup_parent, paths.task_id))
        shutil.rmtree(runtime_state, ignore_errors=True)
        bundle.clear(paths)

    def _task_ids(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(self._state_dir / "tasks"))
        return []

    async def containers(self) -> list[ContainerStatus]:
        result: list[ContainerStatus] = []
        for task_id in self._task_ids():
            record = self._record(task_id)
            if record is None:
                continue
            if record.step in UNFINISHED:
                await self._finish_interrupted(task_id)
            elif status := await self.status(task_id):
                result.append(status)
        return result

    async def _finish_interrupted(self, task_id: str) -> None:
        """Clear what an earlier agent left half made or half removed; this one's own work holds the lock."""
        if (lock := self._locks.get(task_id)) and lock.locked():
            return
        async with self._alone(task_id):
            record = self._record(task_id)
            if record is not None and record.step in UNFINISHED:
                await self._reclaim(task_id)

    def images_in_use(self) -> frozenset[str]:
        """Image IDs that containers of this host use, running or not."""
        records = (self._record(task_id) for task_id in self._task_ids())
        return frozenset(record.image_id for record in records if record is not None and record.image_id)

    async def close(self) -> None:
        """Stop watching; containers run on and are adopted by the next runtime object."""
        watches = list(self._watches.values())
        self._watches.clear()
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)

    # ------------------------------------------------------------------ logs and exec

    def logs(self, task_id: str, options: LogOptions) -> AsyncIterator[LogLine]:
        return logs.read_log(
            task_id, self._paths(task_id).log, options, self._inotify, lambda: self._log_ended(task_id)
        )

    def _log_ended(self, task_id: str) -> bool:
        record = self._record(task_id)
        return record is None or record.step is Step.EXITED or not alive(record.monitor)

    async def rotate_logs(self) -> None:
        await asyncio.to_thread(self._rotate_logs, [*self._records.values()])

    def _rotate_logs(self, records: list[Record]) -> None:
        for record in records:
            if record.step is Step.STARTED:
                paths, now_s = self._paths(record.task_id), time.monotonic()
                limits = (record.log_max_bytes, record.log_max_files)
                with contextlib.suppress(OSError):  # removed meanwhile
                    self._rotation.run(paths.log, paths.control, *limits, now_s=now_s)

    async def exec(self, task_id: str, argv: Sequence[str], timeout_s: float) -> tuple[int, bytes]:
        self._known(task_id)
        token = str(next(self._exec_numbers))
        done = await execs.run_in(self._runtime_of(task_id), self._paths(task_id), token, argv, timeout_s)
        return done.code, done.output + done.errors

    def exec_command(self, task_id: str, wanted: ExecStart) -> AbstractContextManager[ExecCommand]:
        self._known(task_id)
        token = str(next(self._exec_numbers))
        return execs.command(self._runtime_of(task_id), self._paths(task_id), token, wanted)


def _message(done: Finished) -> str:
    return (done.errors or done.output).decode(errors="replace")[-2000:]
