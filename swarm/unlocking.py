"""What the agent knows of its manager's lock: the unlock keys that people and the manager gave it, in memory only.

A manager that crashed is started again with them. An agent that was started anew knows none: then the manager waits
until somebody enters the key.
"""

from __future__ import annotations

from proto.local_pb2 import Bootstrap
from swarm.consensus.disk import Directory
from swarm.errors import Invalid
from swarm.hostfiles import HostPaths
from swarm.security.files import OPEN, Seal
from swarm.security.raft_key import KEY_FILE, KeyFile, read_key_file
from swarm.security.unlock_key import KEY_BYTES, parse

KEYS_MAX = 8
"""The manager tells a new key before it rewrites its file, and may fail to for a while (disk full): the file then still
needs an older one."""
WRONG_KEY = (
    "swarm could not be unlocked: invalid key provided. If the key was rotated while this manager was down, it still"
    " needs the one from before; what is right now shows `pyswarm swarm unlock-key` on a manager that is not locked"
)


class HostLock:
    def __init__(self, paths: HostPaths) -> None:
        self._paths = paths
        self._keys: list[bytes] = []
        self._seal = OPEN
        """As last seen. Its key stays the same as long as this host is that manager."""

    def _file(self) -> KeyFile | None:
        """None: there is none, or it is damaged, which the manager's start will tell."""
        if not (self._paths.raft / KEY_FILE).exists():
            return None
        try:
            return read_key_file(Directory(self._paths.raft))
        except (Invalid, OSError):
            return None

    def manager_input(self) -> bytes | None:
        """What a manager needs on its standard input to open its files (a `Bootstrap`); None: nobody gave us that yet.
        Forgets all keys when files are in clear."""
        file = self._file()
        if file is None or not file.is_wrapped:
            if file is not None:
                self._keys.clear()
            return b""
        for key in self._keys:
            if file.opened([key]) is not None:
                return Bootstrap(unlock_keys=[key]).SerializeToString()
        return None

    def is_locked(self) -> bool:
        """Whether a manager cannot be started for want of a key."""
        return self.manager_input() is None

    def seal(self) -> Seal:
        """How this host's private key is to lie on disk, and what opens it."""
        if not (self._paths.raft / KEY_FILE).exists():
            self._seal = OPEN
        elif file := self._file():
            key = file.opened(self._keys) or self._seal.key
            self._seal = Seal(key, file.is_wrapped and bool(key))
        return self._seal  # as it was, if the file is damaged

    def keep(self, key: bytes) -> None:
        """For the next start of the manager. Raises Invalid."""
        if len(key) != KEY_BYTES:
            raise Invalid(f"an unlock key has {KEY_BYTES} bytes, not {len(key)}")
        if key in self._keys:
            self._keys.remove(key)
        self._keys = [key, *self._keys][:KEYS_MAX]

    def unlock(self, text: str) -> None:
        """Keep the key that a person entered, if it opens this manager's files. Raises Invalid, and keeps nothing."""
        key = parse(text)
        file = self._file()
        if file is None or file.opened([key]) is None:
            raise Invalid(WRONG_KEY)
        self.keep(key)

    def forget(self) -> None:
        """This host is no manager any more."""
        self._keys.clear()
        self._seal = OPEN
