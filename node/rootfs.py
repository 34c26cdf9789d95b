"""Look into a container's root filesystem without being led out of it by its symbolic links.

Images are other people's files: /etc/passwd may be a link to the host's, or a FIFO that never answers.
openat2(RESOLVE_IN_ROOT) lets the kernel resolve every path as if the rootfs were "/".
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

_SYS_OPENAT2 = 437  # the same number on every architecture
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
ACCOUNT_FILE_BYTES_MAX = 1_000_000
"""Of /etc/passwd and /etc/group; a larger one is not an account file."""

_libc = ctypes.CDLL(None, use_errno=True)


def open_in_root(root: Path | int, path: str, flags: int) -> int:
    """A file descriptor for `path` inside `root`. Raises OSError."""
    root_fd = root if isinstance(root, int) else os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how = struct.pack("QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
        fd: int = _libc.syscall(_SYS_OPENAT2, root_fd, path.encode(), how, ctypes.c_size_t(len(how)))
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{path} in the image: {os.strerror(number)}")
        return fd
    finally:
        if not isinstance(root, int):
            os.close(root_fd)


def read_small_file(root: Path, path: str) -> str:
    """A regular file's text inside `root`; "" when it is absent, something else, or too large."""
    try:
        fd = open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return ""
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > ACCOUNT_FILE_BYTES_MAX:
            return ""
        return file.read(ACCOUNT_FILE_BYTES_MAX).decode(errors="replace")


def make_directory(root: Path, path: str) -> None:
    """mkdir -p inside `root`, mode 0755, owned by root. Raises OSError (NotADirectoryError for a file there)."""
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        done = "/"
        for name in (part for part in path.split("/") if part not in ("", ".")):
            parent_fd = open_in_root(root_fd, done, os.O_PATH | os.O_DIRECTORY)
            try:
                if name != "..":
                    os.mkdir(name, 0o755, dir_fd=parent_fd)
            except FileExistsError:
                pass
            finally:
                os.close(parent_fd)
            done = f"{done.rstrip('/')}/{name}"
        os.close(open_in_root(root_fd, done, os.O_PATH | os.O_DIRECTORY))
    finally:
        os.close(root_fd)


@dataclass(frozen=True, slots=True)
class Account:
    """Who the process runs as, by number."""

    uid: int = 0
    gid: int = 0
    additional_gids: tuple[int, ...] = ()
    home: str = "/"


def _rows(text: str, fields: int) -> list[list[str]]:
    rows = [line.split(":") for line in text.splitlines() if line and not line.startswith("#")]
    return [row for row in rows if len(row) >= fields]


def _number(text: str) -> int | None:
    # IDs of containers are at most 2^31-1, as in the reference's user lookup.
    return int(text) if text.isascii() and text.isdigit() and int(text) < 1 << 31 else None


def _group_id(name: str, groups: list[list[str]]) -> int:
    for row in groups:
        if row[0] == name and (number := _number(row[2])) is not None:
            return number
    number = _number(name)
    if number is None:
        raise ValueError(f"unable to find group {name}: no matching entries in the image's /etc/group")
    return number


def find_account(user: str, extra_groups: tuple[str, ...], passwd: str, group: str) -> Account:
    """Resolve "user[:group]" (names or numbers) against the image's account files, as Docker does.
    Raises ValueError for a name that is not there."""
    name, _, group_name = user.partition(":")
    users = [row for row in _rows(passwd, 6) if _number(row[2]) is not None and _number(row[3]) is not None]
    groups = [row for row in _rows(group, 3) if _number(row[2]) is not None]
    wanted = name or "0"
    number = _number(wanted)
    row = next((row for row in users if row[0] == wanted), None)
    if row is None and number is not None:
        row = next((row for row in users if int(row[2]) == number), None)
    if row is None and number is None:
        raise ValueError(f"unable to find user {name}: no matching entries in the image's /etc/passwd")
    uid, gid, home = (int(row[2]), int(row[3]), row[5] or "/") if row else (number or 0, 0, "/")
    additional: list[int] = []
    if group_name:
        gid = _group_id(group_name, groups)
    elif row is not None:
        additional = [int(entry[2]) for entry in groups if len(entry) > 3 and row[0] in entry[3].split(",")]
    # The primary group too, as Docker does since CVE-2022-36109: else a process could shed it and with it a denial.
    additional += [gid, *(_group_id(extra, groups) for extra in extra_groups)]
    return Account(uid, gid, tuple(sorted(set(additional))), home)
