"""Real containers under conmon and crun: what they may do, what they see, how they end, what they leave."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from node.bundle import find_init
from node.cgroups import CgroupMode, read_layout
from node.commands import Commands
from node.images import ImageStore
from node.interface import Phase, ResolvedImage, RuntimeFault
from node.process import run
from node.seccomp import filtered
from node.taskdir import identify
from proto.dispatch_pb2 import ExecInput, ExecOutput, ExecResize, ExecStart, LogOptions
from proto.objects_pb2 import Device, Mount, Resources, Ulimit
from tests.containers import CGROUP_PARENT, Host, agent_namespace, host_in, load_tool_image, scratch_directory
from tests.images import WEB_IMAGE, build_web_image
from tests.waiting import until

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def ground() -> Iterator[tuple[Path, ResolvedImage]]:
    with scratch_directory() as directory:
        image = asyncio.run(load_tool_image(directory))
        with agent_namespace(directory / "run"):
            yield directory, image


@pytest.fixture
async def host(ground: tuple[Path, ResolvedImage]) -> AsyncIterator[Host]:
    async with host_in(*ground) as host:
        yield host
    assert host.leftovers() == []


@pytest.fixture
def netns() -> Iterator[Path]:
    name = f"pyswarm-rt-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=10)
    yield Path("/run/netns", name)
    subprocess.run(["ip", "netns", "del", name], check=True, timeout=10)


async def test_a_container_has_namespaces_of_its_own(host: Host, netns: Path) -> None:
    await host.started("t1", ["sleep", "100"], netns=netns)
    status = await host.runtime.status("t1")
    assert status is not None
    for kind in ("pid", "mnt", "uts", "ipc", "net"):
        assert os.readlink(f"/proc/{status.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    assert os.stat(f"/proc/{status.pid}/ns/net").st_ino == netns.stat().st_ino
    code, output = await host.runtime.exec("t1", ["sh", "-c", "hostname; ls /proc | grep -c '^[0-9]*$'"], 20.0)
    assert (code, output.split()[0]) == (0, b"box")
    assert int(output.split()[1]) < 10


async def test_a_container_without_netns_is_on_the_hosts_network(host: Host) -> None:
    await host.started("t1", ["sleep", "100"])
    status = await host.runtime.status("t1")
    assert status is not None
    assert os.readlink(f"/proc/{status.pid}/ns/net") == os.readlink("/proc/self/ns/net")


async def test_any_user_may_bind_low_ports_in_a_namespace_of_its_own(host: Host, netns: Path) -> None:
    text = await host.output("t1", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start", netns=netns)
    assert text == "0"


async def test_limits_are_in_the_cgroup(host: Host) -> None:
    limits = Resources(memory_bytes=64 << 20, nano_cpus=500_000_000, pids=77)
    await host.started("t1", ["sleep", "100"], limits=limits)
    layout = read_layout()
    relative = CGROUP_PARENT.strip("/") + "/t1"
    if layout.mode is CgroupMode.V2:
        read = {name: Path("/sys/fs/cgroup", relative, name).read_text().split() for name in ("memory.max", "cpu.max")}
        assert read == {"memory.max": [str(64 << 20)], "cpu.max": ["50000", "100000"]}
    else:
        root = Path("/sys/fs/cgroup")
        assert int((root / "memory" / relative / "memory.limit_in_bytes").read_text()) == 64 << 20
        assert int((root / "cpu" / relative / "cpu.cfs_quota_us").read_text()) == 50_000
        assert int((root / "pids" / relative / "pids.max").read_text()) == 77


@pytest.mark.parametrize("task_id", ["compiled-now", "compiled-before"])
async def test_capabilities_and_the_seccomp_filter_are_dockers(host: Host, task_id: str) -> None:
    """The second start takes the filter that the first one's compilation left."""
    text = await host.output(task_id, "grep -E 'CapEff|CapBnd|Seccomp:' /proc/self/status; unshare -U true; echo $?")
    assert "CapEff:\t00000000a80425fb" in text
    assert "CapBnd:\t00000000a80425fb" in text
    assert "Seccomp:\t2" in text
    assert "Operation not permitted" in text


async def test_the_second_start_uses_the_compiled_filter(host: Host) -> None:
    await host.started("t1", ["sleep", "100"])
    await host.started("t2", ["sleep", "100"])
    assert "run.oci.seccomp_bpf_data" in (host.state / "tasks/t2/config.json").read_text()


async def test_a_compiled_filter_that_does_not_work_is_given_up_for_good(host: Host) -> None:
    await host.started("t1", ["sleep", "100"])
    cached = next((host.state / "seccomp").iterdir())
    good = cached.read_bytes()
    cached.write_bytes(b"\xff" * 16)
    other = host.open()
    try:
        await other.create(host.request("t2", ["sleep", "100"]))
        await other.create(host.request("t3", ["sleep", "100"]))
        for task_id in ("t2", "t3"):
            assert "run.oci.seccomp_bpf_data" not in (host.state / "tasks" / task_id / "config.json").read_text()
            status = await other.status(task_id)
            assert status is not None
            assert filtered(status.pid)
    finally:
        await other.close()
        cached.write_bytes(good)
        (host.state / "seccomp/distrusted").unlink()


async def test_added_and_dropped_capabilities(host: Host) -> None:
    text = await host.output(
        "t1", "grep CapEff /proc/self/status", capability_drop=["ALL"], capability_add=["NET_ADMIN", "CAP_CHOWN"]
    )
    assert int(text.split()[1], 16) == (1 << 12) | (1 << 0)


async def test_another_user_has_no_capabilities_and_its_groups(host: Host) -> None:
    text = await host.output("t1", "id; grep CapEff /proc/self/status; echo $HOME", user="www")
    assert "uid=33(www) gid=33(www) groups=33(www),44(extra)" in text
    assert "CapEff:\t0000000000000000" in text
    assert text.endswith("/var/www")


async def test_an_unknown_user_rejects_the_task(host: Host) -> None:
    with pytest.raises(RuntimeFault, match="unable to find user nobody-here") as caught:
        await host.runtime.create(host.request("t1", ["true"], user="nobody-here"))
    assert caught.value.permanent


async def test_an_unknown_command_rejects_the_task_and_leaves_nothing(host: Host) -> None:
    with pytest.raises(RuntimeFault, match="executable file `/nope` not found") as caught:
        await host.runtime.create(host.request("t1", ["/nope"]))
    assert caught.value.permanent
    assert host.leftovers() == []


async def test_a_read_only_root_filesystem(host: Host) -> None:
    text = await host.output("t1", "touch /x; touch /dev/shm/y && echo fine", read_only=True)
    assert "Read-only file system" in text
    assert text.endswith("fine")


async def test_environment_working_directory_and_etc_files(host: Host) -> None:
    shell = "pwd; env; cat /etc/hosts /etc/resolv.conf /etc/hostname"
    text = await host.output(
        "t1",
        shell,
        dir="/made/for/it",
        env=["A=1", "B=two words"],
        hosts=["10.9.8.7 other"],
        netns=Path("/proc/self/ns/net"),
        addresses=("10.0.1.5/24",),
    )
    lines = text.splitlines()
    assert lines[0] == "/made/for/it"
    assert {"A=1", "B=two words", "HOSTNAME=box"} <= set(lines)
    assert {"10.9.8.7\tother", "10.0.1.5\tbox", "nameserver 127.0.0.11", "options ndots:0", "box"} <= set(lines)


async def test_whiteouts_hide_and_the_image_is_never_written(host: Host) -> None:
    text = await host.output("t1", "ls /gone; echo changed > /data/kept; cat /data/kept")
    assert "No such file" in text
    assert text.endswith("changed")
    assert await host.output("t2", "cat /data/kept") == "from the image"


async def test_a_bind_mount_read_only_and_writable(host: Host) -> None:
    shared = host.directory / "shared"
    shared.mkdir()
    (shared / "file").write_text("hello\n")
    mounts = [
        Mount(type=Mount.BIND, source=str(shared), target="/ro", read_only=True),
        Mount(type=Mount.BIND, source=str(shared), target="/rw/deep"),
    ]
    text = await host.output("t1", "cat /ro/file; touch /ro/x; echo new > /rw/deep/file", mounts=mounts)
    assert text.startswith("hello")
    assert "Read-only file system" in text
    assert (shared / "file").read_text() == "new\n"


async def test_a_missing_bind_source_rejects_with_dockers_words(host: Host) -> None:
    mount = Mount(type=Mount.BIND, source="/does/not/exist", target="/x")
    with pytest.raises(RuntimeFault) as caught:
        await host.runtime.create(host.request("t1", ["true"], mounts=[mount]))
    assert str(caught.value) == (
        'invalid mount config for type "bind": bind source path does not exist: /does/not/exist'
    )
    assert caught.value.permanent
    assert host.leftovers() == []


async def test_a_named_volume_is_filled_from_the_image_once_and_outlives_its_tasks(host: Host) -> None:
    mounts = [Mount(type=Mount.VOLUME, source="vol", target="/data")]
    assert await host.output("t1", "cat /data/kept; echo mine > /data/kept", mounts=mounts) == "from the image"
    await host.runtime.remove("t1")
    assert await host.output("t2", "cat /data/kept", mounts=mounts) == "mine"
    assert (host.state / "volumes/vol/_data/kept").stat().st_mode & 0o777 == 0o640


async def test_an_anonymous_volume_goes_with_its_task(host: Host) -> None:
    await host.started("t1", ["sleep", "100"], mounts=[Mount(type=Mount.VOLUME, target="/data")])
    volume = host.state / "tasks/t1/volumes/0/_data"
    assert (volume / "kept").read_text() == "from the image\n"
    await host.runtime.remove("t1")
    assert not volume.exists()


async def test_a_tmpfs_has_its_size_and_mode(host: Host) -> None:
    mounts = [Mount(type=Mount.TMPFS, target="/t", tmpfs_size_bytes=1 << 20, tmpfs_mode=0o700)]
    text = await host.output("t1", "df -k /t | tail -1; stat -c %a /t", mounts=mounts)
    assert text.split()[1] == "1024"
    assert text.endswith("700")


async def test_ulimits(host: Host) -> None:
    assert await host.output("t1", "ulimit -n", ulimits=[Ulimit(name="nofile", soft=321, hard=321)]) == "321"


async def test_exit_codes_are_kept(host: Host) -> None:
    await host.started("t1", shell="exit 7")
    status = await host.runtime.wait("t1")
    assert (status.phase, status.exit_code, status.error) == (Phase.EXITED, 7, "")
    assert await host.runtime.status("t1") == status


async def test_want_of_memory_is_told(host: Host) -> None:
    await host.started("t1", shell="tail /dev/zero", limits=Resources(memory_bytes=8 << 20))
    status = await host.runtime.wait("t1")
    assert (status.exit_code, status.oom_killed) == (137, True)


async def test_a_kill_by_hand_is_not_taken_for_want_of_memory(host: Host) -> None:
    await host.started("t1", ["sleep", "100"], limits=Resources(memory_bytes=8 << 20))
    status = await host.runtime.stop("t1", "SIGKILL", 5)
    assert (status.exit_code, status.oom_killed) == (137, False)


async def test_stop_sends_the_stop_signal_of_the_spec(host: Host) -> None:
    await host.started("t1", shell="trap 'exit 5' USR1; echo up; while :; do sleep 0.05; done", stop_signal="SIGUSR1")
    async for line in host.runtime.logs("t1", LogOptions(follow=True, tail=-1)):
        if line.data == b"up":
            break
    assert (await host.runtime.stop("t1", "", 10)).exit_code == 5


async def test_stop_kills_after_the_grace_period(host: Host) -> None:
    await host.started("t1", ["sleep", "100"])  # process 1 without a handler ignores SIGTERM
    assert (await host.runtime.stop("t1", "", 0.1)).exit_code == 137
    assert (await host.runtime.stop("t1", "", 0.1)).exit_code == 137


async def test_a_container_that_was_never_started_can_be_stopped_and_removed(host: Host) -> None:
    await host.runtime.create(host.request("t1", ["sleep", "100"]))
    status = await host.runtime.status("t1")
    assert status is not None
    assert status.phase is Phase.CREATED
    assert (await host.runtime.stop("t1", "", 30)).phase is Phase.EXITED


async def test_create_start_and_remove_may_be_repeated(host: Host) -> None:
    request = host.request("t1", ["sleep", "100"])
    await asyncio.gather(host.runtime.create(request), host.runtime.create(request))
    first, second = await asyncio.gather(host.runtime.start("t1"), host.runtime.start("t1"))
    assert first == second
    await host.runtime.create(request)
    assert (await host.runtime.start("t1")).pid == first.pid
    await asyncio.gather(host.runtime.remove("t1"), host.runtime.remove("t1"))
    await host.runtime.remove("t1")
    assert host.leftovers() == []
    assert await host.runtime.status("t1") is None


async def test_a_killed_monitor_fails_the_task_and_ends_the_container(host: Host) -> None:
    await host.started("t1", ["sleep", "100"])
    status = await host.runtime.status("t1")
    assert status is not None
    os.kill(int((host.state / "tasks/t1/conmon.pid").read_text()), signal.SIGKILL)
    ended = await host.runtime.wait("t1")
    assert (ended.phase, ended.exit_code) == (Phase.EXITED, None)
    assert "its monitor (conmon) was killed" in ended.error
    await until(lambda: identify(status.pid) is None, what="the container's end")


async def test_containers_of_another_runtime_are_still_managed(host: Host) -> None:
    """The operator may change the runtime; what runs was made by the old one."""
    if not shutil.which("runc"):
        pytest.skip("needs runc beside crun")
    await host.started("t1", ["sleep", "100"])
    other = host.open(runtime="runc")
    try:
        assert await other.exec("t1", ["hostname"], 20.0) == (0, b"box\n")
        await other.create(host.request("t2", ["sleep", "100"]))
        assert (await other.start("t2")).phase is Phase.RUNNING
        assert await other.exec("t2", ["hostname"], 20.0) == (0, b"box\n")
        text = Path(f"/proc/{(await other.start('t2')).pid}/status").read_text()
        assert "Seccomp:\t2" in text
        await other.remove("t1")
        await other.remove("t2")
        assert host.leftovers() == []
    finally:
        await other.close()


async def test_an_init_process_that_the_host_lacks_is_a_clear_fault(host: Host) -> None:
    try:
        find_init()
    except RuntimeFault:
        with pytest.raises(RuntimeFault, match="install one"):
            await host.runtime.create(host.request("t1", ["true"], init=True))
    else:
        assert "docker-init" in await host.output("t1", "cat /proc/1/cmdline", init=True)


async def test_a_command_that_outlives_its_deadline_is_killed(host: Host) -> None:
    await host.started("t1", ["sleep", "100"])
    with pytest.raises(RuntimeFault, match="sh did not finish within 1 s"):
        await host.runtime.exec("t1", ["sh", "-c", "echo here > /tmp/began; exec sleep 77"], 1.0)
    code, output = await host.runtime.exec("t1", ["sh", "-c", "cat /tmp/began; ps"], 20.0)
    assert code == 0
    assert b"here" in output
    assert b"sleep 77" not in output
    assert list((host.state / "tasks" / "t1").glob("exec-*")) == []


async def test_a_device_of_the_host(host: Host) -> None:
    devices = [Device(host_path="/dev/null", container_path="/dev/mine", permissions="rw")]
    assert "c 1 3" in await host.output("t1", "stat -c '%F c %t %T' /dev/mine; echo x > /dev/mine", devices=devices)
    with pytest.raises(RuntimeFault, match="device /dev/nothing: No such file or directory on this node"):
        await host.runtime.create(host.request("t2", ["true"], devices=[Device(host_path="/dev/nothing")]))
    with pytest.raises(RuntimeFault, match="device /etc: it is no device"):
        await host.runtime.create(host.request("t3", ["true"], devices=[Device(host_path="/etc")]))


async def test_a_command_beside_the_process_has_its_user_environment_and_terminal(host: Host) -> None:
    await host.started("t1", ["sleep", "100"], env=["A=1"])
    wanted = ExecStart(tty=True, env=["B=2"], dir="/etc", user="65534:65533")
    wanted.command[:] = ["sh", "-c", "id -u; id -g; pwd; echo $A$B; tty"]
    with host.runtime.exec_command("t1", wanted) as command:
        done = await run(["script", "-qec", shlex.join(command.argv), "/dev/null"], timeout_s=20)
    # `script` tells the end of its own input with a NUL, which the terminal may echo.
    assert done.output.replace(b"^@", b"").split() == [b"65534", b"65533", b"/etc", b"12", b"/dev/pts/0"]
    with pytest.raises(RuntimeFault, match="ghost"), host.runtime.exec_command("t1", ExecStart(user="ghost")):
        pass


async def test_a_terminal_in_a_container_follows_the_size_of_its_window(host: Host) -> None:
    await host.started("t1", ["sleep", "100"])
    said: list[ExecOutput] = []
    commands = Commands(host.runtime, lambda _: True, said.append)
    script = "trap 'stty size' WINCH; stty size; while :; do sleep 0.05; done"
    start = ExecStart(task_id="t1", command=["sh", "-c", script], tty=True, stdin=True, rows=31, columns=91)
    commands.handle(ExecInput(exec_id="e1", start=start))
    await until(lambda: b"31 91" in b"".join(output.stdout for output in said))
    commands.handle(ExecInput(exec_id="e1", resize=ExecResize(rows=41, columns=101)))
    await until(lambda: b"41 101" in b"".join(output.stdout for output in said))
    await commands.close()
    assert b"stty" not in (await host.runtime.exec("t1", ["ps"], 20.0))[1]


async def test_nothing_of_a_command_outlives_its_block(host: Host) -> None:
    await host.started("t1", ["sleep", "100"])
    with host.runtime.exec_command("t1", ExecStart(command=["sleep", "66"])) as command:
        running = asyncio.create_task(run(command.argv, timeout_s=20))
        await until(lambda: list((host.state / "tasks" / "t1").glob("exec-*.pid")))
    assert (await running).code == 128 + signal.SIGKILL
    assert b"sleep 66" not in (await host.runtime.exec("t1", ["ps"], 20.0))[1]


async def test_a_terminal(host: Host) -> None:
    assert "/dev/pts/0" in await host.output("t1", "tty; echo $TERM", tty=True)


async def test_many_layers_mount_although_their_names_exceed_a_page(host: Host) -> None:
    base = host.directory / "many-layers-with-a-long-name"
    layers = []
    for number in range(120):
        layer = base / f"layer-{number:03d}"
        layer.mkdir(parents=True)
        (layer / f"file{number}").touch()
        layers.append(layer)
    image = ResolvedImage("many", (*layers, *host.image.layers), host.image.config)
    assert len(":".join(map(str, image.layers))) > 4096
    assert await host.output("t1", "ls / | grep -c ^file", image=image) == "120"


def _listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _request(port: int) -> str:
    with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", "/")
        return connection.getresponse().read().decode()


async def test_the_web_image_answers_and_ends_when_asked(host: Host) -> None:
    """The image that most other tests and the lab rely on."""
    build_web_image(host.directory / "web.tar")
    store = ImageStore(host.directory / "images", host.directory / "images-run")
    await store.load(host.directory / "web.tar", "", lambda _line: None)
    image = await store.ensure(WEB_IMAGE)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    request = host.request("t1", ["/bin/web"], image=image, env=[f"PORT={port}", "NODE=w1"], user="www")
    await host.runtime.create(request)
    await host.runtime.start("t1")
    await until(lambda: _listens(port), what="the web server")
    answers = [await asyncio.to_thread(_request, port) for _ in range(50)]
    assert set(answers) == {"box on w1\n"}
    assert await host.runtime.exec("t1", ["fetch", f"http://127.0.0.1:{port}/"], 20.0) == (0, b"box on w1\n")
    assert (await host.runtime.stop("t1", "", 10)).exit_code == 0
