"""Run a command in a virtual machine with Debian's own kernel, on a copy-on-write view of this machine's files.

For what the kernel here lacks: pure cgroup v2 (which users have), ESP and IPVS. The kernel package is downloaded
once and only unpacked, never installed. QEMU emulates the processor (about 20 times slower): keep what runs inside
small.

    python -m tests.vm -- COMMAND [ARG ...]
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path("/var/cache/pyswarm-vm")
PACKAGES = ("qemu-system-x86", "kmod", "busybox-static", "cpio")
BOOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
GUEST_MODULES = (
    "vxlan",
    "veth",
    "bridge",
    "nf_tables",
    "nft_ct",
    "nft_chain_nat",
    "nft_masq",
    "nft_redir",
    "nft_numgen",
    "nft_reject_ipv4",
    "nft_fib_ipv4",
    "nft_xfrm",
    "nft_meta_bridge",
    "xfrm_user",
    "esp4",
    "gcm",
    "nft_fib_ipv6",
    "nft_fib_inet",
    "nft_reject_ipv6",
    "nft_hash",
    "nft_limit",
    "nf_conntrack_netlink",
    "nf_tables_netdev",
    "ip_vs",
    "ip_vs_wrr",
    "ip_vs_wlc",
    "ip_vs_sh",
    "sctp",
    "tcp_diag",
)
MEMORY_MIB = 3072
TIMEOUT_S = 1200

INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t devtmpfs dev /dev
while read f; do $b insmod /modules/$f; done < /order
$b mkdir -p /lower /upper /root
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro machine /lower || $b poweroff -f
$b mount -t tmpfs -o size=80% tmpfs /upper; $b mkdir /upper/up /upper/work
$b mount -t overlay overlay -o lowerdir=/lower,upperdir=/upper/up,workdir=/upper/work /root || $b poweroff -f
cd /root
$b mount -t proc proc proc; $b mount -t sysfs sysfs sys; $b mount -t devtmpfs dev dev
$b mkdir -p dev/pts dev/shm; $b mount -t devpts devpts dev/pts; $b mount -t tmpfs shm dev/shm
[ -e dev/fd ] || $b ln -s /proc/self/fd dev/fd
$b mount -t tmpfs run run; $b mount -t tmpfs -o mode=1777 tmp tmp
$b mkdir -p run/netns lib/modules
# Not on the overlay: overlayfs cannot be the upper layer of another overlayfs.
$b mkdir -p var/lib/pyswarm var/lib/containers
$b mount -t tmpfs state var/lib/pyswarm; $b mount -t tmpfs images var/lib/containers
$b mount --bind /lower{cache}/modules lib/modules
$b mount -t cgroup2 cgroup2 sys/fs/cgroup
$b cp /command root-command
exec $b chroot . /bin/sh /root-command
"""

COMMAND = """
exec </dev/null >/dev/console 2>&1
stty -F /dev/console raw -echo 2>/dev/null
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TMPDIR=/tmp PYSWARM_VM=1
ip link set lo up
for m in {modules}; do modprobe $m 2>/dev/null; done
cd {directory}
{command}
echo "{token} $?"
/bin/busybox poweroff -f
"""


def prepare() -> None:
    """Download and unpack the kernel, once; a second caller waits for the first."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (CACHE / "vmlinuz").exists():
            _download()


def _download() -> None:
    missing = [
        name for name in PACKAGES if subprocess.run(["dpkg", "-s", name], capture_output=True, check=False).returncode
    ]
    if missing:
        subprocess.run(["apt-get", "update", "-q"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(
            ["apt-get", "install", "-qy", "--no-install-recommends", *missing],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )
    depends = subprocess.run(["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True, check=True)
    package = next(line.split()[-1] for line in depends.stdout.splitlines() if "Depends:" in line)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        subprocess.run(["apt-get", "download", "-q", package], check=True, cwd=scratch, stdout=subprocess.DEVNULL)
        archive = next(Path(scratch).glob("*.deb"))
        subprocess.run(["dpkg", "-x", str(archive), f"{scratch}/x"], check=True)
        release = next(Path(scratch, "x/lib/modules").iterdir()).name
        subprocess.run(["depmod", "-b", f"{scratch}/x", release], check=True)
        shutil.rmtree(CACHE / "modules", ignore_errors=True)
        shutil.move(f"{scratch}/x/lib/modules", CACHE / "modules")
        shutil.move(next(Path(scratch, "x/boot").glob("vmlinuz-*")), CACHE / "vmlinuz")


def initramfs(directory: Path, command: str, token: str) -> Path:
    """Busybox, the modules that mounting the machine's files needs, and the command."""
    root = directory / "initramfs"
    for name in ("bin", "proc", "sys", "dev", "modules"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    release = next((CACHE / "modules").iterdir()).name
    base = directory / "base/lib"
    base.mkdir(parents=True)
    (base / "modules").symlink_to(CACHE / "modules")
    order: list[str] = []
    for module in BOOT_MODULES:
        shown = subprocess.run(
            ["modprobe", "-d", str(directory / "base"), "-S", release, "--show-depends", module],
            capture_output=True,
            text=True,
            check=True,
        )
        for line in shown.stdout.splitlines():
            path = Path(line.split()[1])
            if line.startswith("insmod") and path.name not in order:
                order.append(path.name)
                shutil.copy(path, root / "modules" / path.name)
    (root / "order").write_text("\n".join(order) + "\n")
    (root / "init").write_text(INIT.replace("{cache}", str(CACHE)))
    (root / "init").chmod(0o755)
    (root / "command").write_text(
        COMMAND.format(
            modules=" ".join(GUEST_MODULES), directory=shlex.quote(os.getcwd()), command=command, token=token
        )
    )
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*"))) + "\n"
    packed = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), capture_output=True, cwd=root, check=True
    ).stdout
    image = directory / "initrd.gz"
    image.write_bytes(gzip.compress(packed, 1))
    return image


def run(argv: list[str]) -> int:
    """Its exit status; 255 when the machine did not report one."""
    prepare()
    token = f"vm-exit-{secrets.token_hex(8)}"
    status = 255
    with tempfile.TemporaryDirectory(prefix="pyswarm-vm-") as scratch:
        image = initramfs(Path(scratch), shlex.join(argv), token)
        words = f"""
            timeout -k 5 {TIMEOUT_S} qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max -smp 2 -m {MEMORY_MIB}
            -nodefaults -no-user-config -no-reboot -display none -serial stdio -device virtio-rng-pci
            -kernel {CACHE}/vmlinuz -initrd {image}
            -append 'console=ttyS0 quiet loglevel=0 panic=-1 mitigations=off random.trust_cpu=on'
            -virtfs local,path=/,mount_tag=machine,security_model=none,readonly=on,multidevs=remap
        """
        machine = subprocess.Popen(
            shlex.split(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        assert machine.stdout is not None
        for line in machine.stdout:
            if line.startswith(token):
                status = int(line.split()[1])
            else:
                print(line.rstrip(), flush=True)
        machine.wait()
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="+")
    sys.exit(run(parser.parse_args().command))


if __name__ == "__main__":
    main()
