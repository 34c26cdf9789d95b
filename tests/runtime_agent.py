"""A process that uses the runtime as an agent does, and may kill itself right after writing a given step.

    python -m tests.runtime_agent DIRECTORY LAYERS DIE_AFTER COMMAND...
COMMANDS: adopt, create, start, stop, wait, remove. Prints one line of JSON for each. LAYERS: joined by ":".
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from node.conmon import ConmonRuntime
from node.interface import CreateRequest, ImageConfig, ResolvedImage
from node.mounts import prepare_mount_namespace
from node.taskdir import Record
from proto.dispatch_pb2 import LogOptions
from proto.objects_pb2 import ContainerSpec

TASK_ID = "t1"
CGROUP_PARENT = "/pyswarm-rt-kill"
SHELL = "trap 'exit 3' TERM; echo up; while :; do sleep 0.05; done"


class Mortal(ConmonRuntime):
    """Dies by SIGKILL as soon as the record says `die_after`, before the step itself is done."""

    die_after = ""

    def _write(self, record: Record) -> Record:
        super()._write(record)
        if record.step == self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return record


async def up(runtime: ConmonRuntime) -> None:
    """Wait until the shell has set its trap: process 1 ignores a signal that it does not handle."""
    async for line in runtime.logs(TASK_ID, LogOptions(follow=True, tail=-1)):
        if line.data == b"up":
            return


async def main(directory: Path, layers: str, die_after: str, commands: list[str]) -> None:
    runtime = Mortal(directory / "state", directory / "run", CGROUP_PARENT, host_id="kill")
    runtime.die_after = die_after
    image = ResolvedImage("image", tuple(map(Path, layers.split(":"))), ImageConfig())
    spec = ContainerSpec(image="tool", command=["/bin/sh", "-c", SHELL])
    request = CreateRequest(TASK_ID, "kill.1", spec, image, None, "box")
    for command in commands:
        answer: object = None
        match command:
            case "adopt":
                answer = [[status.task_id, status.phase.value] for status in await runtime.containers()]
            case "create":
                await runtime.create(request)
            case "start":
                answer = (await runtime.start(TASK_ID)).phase.value
            case "stop":
                await up(runtime)
                answer = (await runtime.stop(TASK_ID, "", 10)).exit_code
            case "wait":
                answer = (await runtime.wait(TASK_ID)).exit_code
            case "remove":
                await runtime.remove(TASK_ID)
        print(json.dumps(answer), flush=True)
    await runtime.close()


if __name__ == "__main__":
    prepare_mount_namespace(Path(sys.argv[1], "run"))
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
