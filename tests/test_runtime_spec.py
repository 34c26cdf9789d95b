"""What is decided before a container exists: config.json, seccomp, cgroups, accounts, records. No root needed."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import cgroups, etcfiles, spec, taskdir
from node.interface import CreateRequest, ImageConfig, Phase, ResolvedImage, RuntimeFault
from node.monitor import runtime_fault, signal_number
from node.mounts import is_shared, mount_points, needs_private_namespace, overlay_options
from node.process import CommandMissing, CommandTimeout, run
from node.rootfs import Account, find_account, make_directory, read_small_file
from node.seccomp import SeccompFilters, kernel_version, resolve
from node.taskdir import ProcessId, Record, Step
from node.volumes import check_mount, wanted_mounts
from proto.objects_pb2 import ContainerSpec, Mount, Resources, Ulimit
from tests.waiting import until

IMAGE = ImageConfig(entrypoint=("/entry",), cmd=("default",), env=("PATH=/img", "A=1"))
PROFILE = json.loads((Path(cgroups.__file__).parent / "docker-seccomp-default.json").read_text())


def built(facts: dict[str, Any] | None = None, request: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    wanted = CreateRequest(
        "t1", "s.1", ContainerSpec(**fields), ResolvedImage("i", (), IMAGE), Path("/run/netns/x"), "box"
    )
    known = spec.Facts(rootfs=Path("/r"), account=Account(), cgroups_path="/p/t1", seccomp={})
    return spec.build(replace(wanted, **(request or {})), replace(known, **(facts or {})))


@pytest.mark.parametrize(
    ("command", "args", "argv"),
    [
        ([], [], ["/entry", "default"]),
        ([], ["x"], ["/entry", "x"]),
        (["/c"], [], ["/c"]),
        (["/c", "d"], ["x"], ["/c", "d", "x"]),
    ],
)
def test_command_and_arguments_as_docker_merges_them(command: list[str], args: list[str], argv: list[str]) -> None:
    assert built(command=command, args=args)["process"]["args"] == argv


def test_no_command_at_all_is_a_fault() -> None:
    with pytest.raises(RuntimeFault, match="no command specified"):
        spec.arguments(ContainerSpec(image="x"), ImageConfig())


def test_the_environment_keeps_its_order_and_the_spec_wins() -> None:
    assert spec.environment(ContainerSpec(env=["B=2", "A=3", "HOSTNAME"], tty=True), IMAGE, "box", "/home") == [
        "PATH=/img",
        "TERM=xterm",
        "A=3",
        "B=2",
        "HOME=/home",
    ]


def test_capabilities_all_and_unknown() -> None:
    available = frozenset(spec.ALL_CAPS) - {"CAP_SYS_RESOURCE"}
    assert spec.capabilities([], [], available) == tuple(cap for cap in spec.ALL_CAPS if cap in spec.DEFAULT_CAPS)
    assert set(spec.capabilities(["all"], ["net_raw"], available)) == available - {"CAP_NET_RAW"}
    assert spec.capabilities(["CHOWN"], ["ALL"], available) == ("CAP_CHOWN",)
    with pytest.raises(RuntimeFault, match="CAP_FLY"):
        spec.capabilities(["fly"], [], available)


def facts(**fields: Any) -> spec.Facts:
    return spec.Facts(rootfs=Path("/r"), account=Account(), cgroups_path="/x", seccomp={}, **fields)


def test_limits_in_the_kernels_units() -> None:
    limits = Resources(nano_cpus=1_500_000_000, memory_bytes=100, pids=5)
    assert spec.resources(limits, Resources(memory_bytes=7), facts(swap_limit=True)) | {"devices": 0} == {
        "devices": 0,
        "memory": {"limit": 100, "swap": 200, "reservation": 7},
        "cpu": {"quota": 150_000, "period": 100_000},
        "pids": {"limit": 5},
    }
    tiny = spec.resources(Resources(nano_cpus=1), Resources(), facts())
    assert tiny["cpu"]["quota"] == spec.CPU_QUOTA_US_MIN
    swapping = Resources(memory_bytes=100, memory_swap_bytes=-1, memory_swappiness=0)
    assert spec.resources(swapping, Resources(), facts(swap_limit=True))["memory"] == {
        "limit": 100,
        "swap": -1,
        "swappiness": 0,
    }
    assert spec.resources(swapping, Resources(), facts(cgroup_v2=True))["memory"] == {"limit": 100}


def test_deeper_mounts_come_later_and_the_user_may_replace_our_files() -> None:
    mounts = [
        (Mount(target="/a/b"), Path("/2")),
        (Mount(target="/a"), Path("/1")),
        (Mount(target="/etc/hosts"), Path("/3")),
    ]
    files = ((Path("/x/hosts"), "/etc/hosts"), (Path("/x/hostname"), "/etc/hostname"))
    config = built({"mounts": tuple(mounts), "files": files})
    targets = [mount["destination"] for mount in config["mounts"]]
    assert targets.index("/a") < targets.index("/a/b")
    assert [m["source"] for m in config["mounts"] if m["destination"] == "/etc/hosts"] == ["/3"]
    assert "/etc/hostname" in targets


def test_propagation_and_bad_propagation() -> None:
    shared = Mount(type=Mount.BIND, source="/s", target="/t", propagation="rshared")
    config = built({"mounts": ((shared, Path("/s")),)}, mounts=[shared])
    assert config["linux"]["rootfsPropagation"] == "shared"
    bad = Mount(type=Mount.BIND, source="/s", target="/t", propagation="sideways")
    with pytest.raises(RuntimeFault, match="sideways"):
        built({"mounts": ((bad, Path("/s")),)})


def test_cgroup_v2_brings_a_cgroup_namespace_and_its_mount() -> None:
    v2, v1 = built({"cgroup_v2": True}), built()
    assert {"type": "cgroup"} in v2["linux"]["namespaces"]
    assert {"type": "cgroup"} not in v1["linux"]["namespaces"]
    assert "/sys/fs/cgroup" in [mount["destination"] for mount in v2["mounts"]]


def test_the_hosts_network_gets_no_sysctls_of_ours() -> None:
    assert "sysctl" not in built(request={"netns": None})["linux"]
    assert built(sysctls={"net.core.somaxconn": "9"})["linux"]["sysctl"]["net.core.somaxconn"] == "9"


def test_other_users_get_only_a_bounding_set_and_an_init_wraps_the_command() -> None:
    process = built({"account": Account(5, 6, (6, 7)), "init": Path("/usr/bin/tini")})["process"]
    assert set(process["capabilities"]) == {"bounding"}
    assert process["user"] == {"uid": 5, "gid": 6, "additionalGids": [6, 7]}
    assert process["args"][:3] == [spec.INIT_TARGET, "--", "/entry"]


def test_unlimited_and_unknown_ulimits() -> None:
    [limit] = spec.rlimits(ContainerSpec(ulimits=[Ulimit(name="nofile", soft=-1, hard=-1)]))
    assert limit == {"type": "RLIMIT_NOFILE", "soft": 2**64 - 1, "hard": 2**64 - 1}
    with pytest.raises(RuntimeFault, match="invalid ulimit type files"):
        spec.rlimits(ContainerSpec(ulimits=[Ulimit(name="files")]))


def allowed(caps: list[str], machine: str = "x86_64", kernel: tuple[int, int] = (6, 1)) -> set[str]:
    rules = resolve(PROFILE, caps, machine, kernel)["syscalls"]
    return {
        name for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule for name in rule["names"]
    }


def test_the_seccomp_profile_follows_capabilities_architecture_and_kernel() -> None:
    assert "mount" not in allowed([])
    assert "mount" in allowed(["CAP_SYS_ADMIN"])
    assert ("arch_prctl" in allowed([]), "arch_prctl" in allowed([], "aarch64")) == (True, False)
    assert ("ptrace" in allowed([], kernel=(4, 8)), "ptrace" in allowed([], kernel=(4, 7))) == (True, False)
    assert resolve(PROFILE, [], "x86_64", (6, 1))["architectures"] == [
        "SCMP_ARCH_X86_64",
        "SCMP_ARCH_X86",
        "SCMP_ARCH_X32",
    ]
    assert kernel_version("6.1.0-18-amd64") == (6, 1)


def test_the_cache_of_compiled_filters_is_keyed_and_can_be_given_up(tmp_path: Path) -> None:
    filters = SeccompFilters(tmp_path / "cache", "crun 1", enabled=True)
    key, _ = filters.section(["CAP_CHOWN"])
    assert filters.section(["CAP_SYS_ADMIN"])[0] != key
    assert filters.section(["CAP_KILL"])[0] == key  # the profile does not mention it: the same program
    assert SeccompFilters(tmp_path / "cache", "crun 2", enabled=True).section(["CAP_CHOWN"])[0] != key
    program = tmp_path / "program"
    program.write_bytes(b"1234567")  # torn
    filters.learn(key, program)
    assert filters.annotations(key) == {}
    program.write_bytes(b"12345678")
    filters.learn(key, program)
    assert list(filters.annotations(key).values()) == ["MTIzNDU2Nzg="]
    filters.distrust()
    assert filters.annotations(key) == {}
    assert SeccompFilters(tmp_path / "cache", "crun 1", enabled=True).annotations(key) == {}


V1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
HYBRID = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
V2 = "32 31 0:29 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("mountinfo", "controllers", "mode", "private"),
    [
        (V1, "", cgroups.CgroupMode.V1, False),
        (HYBRID, "", cgroups.CgroupMode.HYBRID, False),  # systemd's usual hybrid: crun is content
        (HYBRID, "hugetlb\n", cgroups.CgroupMode.HYBRID, True),
        (V2, "", cgroups.CgroupMode.V2, False),
    ],
)
def test_only_a_hybrid_host_with_controllers_needs_a_private_namespace(
    mountinfo: str, controllers: str, mode: cgroups.CgroupMode, private: bool
) -> None:
    layout = cgroups.parse_layout(mountinfo, controllers, swap_limit=False)
    assert (layout.mode, needs_private_namespace(layout, "crun")) == (mode, private)
    assert not needs_private_namespace(layout, "runc")


def test_cgroup_names_for_both_drivers() -> None:
    assert cgroups.cgroups_path("cgroupfs", "/pyswarm/w1", "t") == "/pyswarm/w1/t"
    assert cgroups.relative_dir("cgroupfs", "/pyswarm/w1", "t") == "pyswarm/w1/t"
    assert cgroups.cgroups_path("systemd", "/pyswarm/w1", "t") == "pyswarm-w1.slice:pyswarm:t"
    assert cgroups.relative_dir("systemd", "/pyswarm/w1", "t") == "pyswarm.slice/pyswarm-w1.slice/pyswarm-t.scope"
    assert cgroups.runtime_args("/usr/bin/crun", "systemd") == ("--cgroup-manager=systemd",)
    assert cgroups.runtime_args("/usr/sbin/runc", "systemd") == ("--systemd-cgroup",)
    assert cgroups.runtime_args("/usr/sbin/runc", "cgroupfs") == ()
    layout = cgroups.parse_layout(V2, "", swap_limit=True)
    assert cgroups.default_driver(layout, "") == "cgroupfs"
    with pytest.raises(ValueError, match="unknown"):
        cgroups.default_driver(layout, "other")


def test_oom_kills_are_read_from_either_version(tmp_path: Path) -> None:
    for mode, name in ((cgroups.CgroupMode.V1, "memory.oom_control"), (cgroups.CgroupMode.V2, "memory.events")):
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / name).write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
        assert cgroups.oom_kills(cgroups.CgroupLayout(mode, (str(tmp_path),)), "p") == 2
        assert cgroups.oom_kills(cgroups.CgroupLayout(mode, (str(tmp_path),)), "gone") == 0


PASSWD = "root:x:0:0::/root:/bin/sh\nbob:x:7:8::/home/bob:/bin/sh\nbroken\nbad:x:nine:9::/:\n123:x:1:1::/n:\n"
GROUP = "root:x:0:\nbobs:x:8:\nwheel:x:10:bob,eve\n"


@pytest.mark.parametrize(
    ("user", "extra", "account"),
    [
        ("", (), Account(0, 0, (0,), "/root")),
        ("bob", (), Account(7, 8, (8, 10), "/home/bob")),
        ("7", (), Account(7, 8, (8, 10), "/home/bob")),
        ("bob:wheel", (), Account(7, 10, (10,), "/home/bob")),
        ("99", (), Account(99, 0, (0,), "/")),
        ("99:98", ("bobs", "55"), Account(99, 98, (8, 55, 98), "/")),
        ("123", (), Account(1, 1, (1,), "/n")),  # a name of digits is a name first
    ],
)
def test_accounts_of_an_image(user: str, extra: tuple[str, ...], account: Account) -> None:
    assert find_account(user, extra, PASSWD, GROUP) == account


@pytest.mark.parametrize("user", ["eve", "bob:none", "bad", "4294967296"])
def test_unknown_accounts(user: str) -> None:
    with pytest.raises(ValueError, match="unable to find"):
        find_account(user, (), PASSWD, GROUP)


def test_paths_of_an_image_never_lead_out_of_it(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "etc").mkdir(parents=True)
    outside.mkdir()
    (outside / "passwd").write_text("the host's")
    (root / "etc/passwd").symlink_to(outside / "passwd")
    (root / "etc/up").symlink_to("../../outside/passwd")
    (root / "link").symlink_to(outside)
    os.mkfifo(root / "etc/fifo")
    assert [read_small_file(root, f"/etc/{name}") for name in ("passwd", "up", "fifo", "absent")] == [""] * 4
    make_directory(root, "/a/../b/c")
    assert (root / "b/c").is_dir()
    with pytest.raises(OSError, match="in the image"):
        make_directory(root, "/link/d")
    assert list(outside.iterdir()) == [outside / "passwd"]


def test_etc_files() -> None:
    hosts = etcfiles.hosts_file("box", ("10.0.0.1/24",), ("1.2.3.4 a b",)).splitlines()
    assert hosts[0] == "127.0.0.1\tlocalhost"
    assert hosts[-2:] == ["1.2.3.4\ta b", "10.0.0.1\tbox"]
    assert etcfiles.resolv_conf(("1.1.1.1",), ("d",), ("ndots:0",)) == "search d\nnameserver 1.1.1.1\noptions ndots:0\n"
    assert etcfiles.merge_options(("ndots:2",), ("ndots:0", "rotate")) == ("ndots:2", "rotate")


@pytest.mark.parametrize(
    "mount",
    [
        Mount(type=Mount.BIND, source="/x", target="relative"),
        Mount(type=Mount.BIND, source="/x", target="/"),
        Mount(type=Mount.BIND, source="relative", target="/t"),
        Mount(type=Mount.VOLUME, source="../up", target="/t"),
        Mount(type=Mount.TMPFS, target="//"),
    ],
)
def test_mounts_that_no_host_could_make(mount: Mount) -> None:
    with pytest.raises(RuntimeFault, match="invalid mount config for type"):
        check_mount(mount)


def test_places_declared_by_the_image_become_anonymous_volumes_unless_covered() -> None:
    mounts = [Mount(type=Mount.TMPFS, target="/a/"), Mount(type=Mount.VOLUME, source="v", target="/b")]
    assert [(m.source, m.target) for m in wanted_mounts(mounts, ("/a", "/b", "/c"))] == [("v", "/b"), ("", "/c")]


def test_mount_options_are_escaped() -> None:
    assert overlay_options(["/a:b", "/c"], "/u,p", "/w") == "lowerdir=/a\\:b:/c,upperdir=/u\\,p,workdir=/w"


def test_mountinfo_is_parsed() -> None:
    text = "22 1 0:1 / /a\\040b rw shared:3 - x x rw\n23 1 0:1 / /c rw - x x rw,shared:9\n"
    assert mount_points(text) == ["/a b", "/c"]
    assert (is_shared(text, "/a b"), is_shared(text, "/c"), is_shared(text, "/d")) == (True, False, False)


RECORD = Record("t1", Step.STARTED, "boot", "image", monitor=ProcessId(1, 2), container=ProcessId(3, 4))


@given(
    step=st.sampled_from(Step),
    code=st.none() | st.integers(0, 255),
    error=st.text(max_size=20),
    process=st.none() | st.builds(ProcessId, st.integers(1, 1 << 22), st.integers(0, 1 << 60)),
)
def test_records_survive_being_written(step: Step, code: int | None, error: str, process: ProcessId | None) -> None:
    record = replace(RECORD, step=step, exit_code=code, error=error, monitor=process)
    assert taskdir.decode(taskdir.encode(record)) == record


@given(
    st.text(max_size=40) | st.sampled_from(["{}", "[]", "null", '{"step": "x"}', '{"task_id": 1, "step": "created"}'])
)
def test_a_torn_record_is_a_value_error_or_a_record(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert taskdir.decode(text).step in Step


def test_how_a_container_ended() -> None:
    assert taskdir.settle(RECORD, "7\n", False, True).exit_code == 7
    assert taskdir.settle(RECORD, "137", True, True).oom_killed
    assert "conmon) was killed" in taskdir.settle(RECORD, None, False, True).error
    assert "host was restarted" in taskdir.settle(RECORD, "", False, False).error
    phases = {
        step: status.phase if (status := taskdir.status_of(replace(RECORD, step=step))) else None for step in Step
    }
    assert phases == {
        Step.PREPARING: None,
        Step.CREATING: None,
        Step.CREATED: Phase.CREATED,
        Step.STARTING: Phase.CREATED,
        Step.STARTED: Phase.RUNNING,
        Step.EXITED: Phase.EXITED,
        Step.REMOVING: None,
    }


@pytest.mark.parametrize("task_id", ["", "..", "a/b", "a.b", "ä"])
def test_a_task_id_cannot_leave_its_directory(task_id: str) -> None:
    with pytest.raises(ValueError, match="not usable"):
        taskdir.task_paths(Path("/s"), Path("/r"), task_id)


def test_processes_are_not_mistaken_for_later_ones() -> None:
    me = taskdir.identify(os.getpid())
    assert me is not None
    assert taskdir.alive(me)
    assert not taskdir.alive(replace(me, start_ticks=me.start_ticks + 1))
    assert taskdir.remains_of(Path("/b"), {1: b"conmon\0-b\0/b\0", 2: b"vi\0/b/config.json\0"}) == [1]


def test_signals_by_every_name() -> None:
    assert [signal_number(name) for name in ("SIGTERM", "term", "15", "SIGRTMIN+3")] == [15, 15, 15, 37]
    for name in ("SIGNOPE", "", "999"):
        with pytest.raises(ValueError, match="unknown signal"):
            signal_number(name)


def test_want_of_resources_may_pass_but_a_bad_command_will_not() -> None:
    assert runtime_fault("executable file `x` not found in $PATH").permanent
    assert not runtime_fault("fork: Resource temporarily unavailable").permanent


async def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    with pytest.raises(CommandTimeout, match=r"sh -c did not finish within 0\.2 s"):
        await run(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"], timeout_s=0.2)
    pid = int((tmp_path / "pid").read_text())
    await until(lambda: taskdir.identify(pid) is None, what="the end of the child's child")


async def test_a_command_that_does_not_exist_is_told() -> None:
    with pytest.raises(CommandMissing, match="no-such-command is not installed"):
        await run(["no-such-command"], timeout_s=1)


async def test_output_errors_and_lines_of_a_command() -> None:
    lines: list[str] = []
    done = await run(["sh", "-c", "echo a; echo b >&2; exit 3"], timeout_s=5, on_line=lines.append)
    assert (done.code, done.output, done.errors, sorted(lines)) == (3, b"a\n", b"b\n", ["a", "b"])
