"""A disk whose files cannot be read without the manager's key: log and snapshots hold secrets and the CA's key.

A file is MAGIC, a salt, a check of the key, and frames, one for each write: MARK, length, nonce, and what AES-256-GCM
makes of the bytes. The key of a file is derived from the manager's and the salt (HKDF-SHA256), so a random nonce never
comes near its limit (NIST SP 800-38D, 8.3: 2**32 frames per key). A frame's place in the file is authenticated with it.

Readers see the bytes that were written. A frame that does not open, torn or damaged, reads as zeros: telling the two
apart is left to those who know the contents, as on a disk in clear.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterator

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from swarm.consensus.disk import AppendFile, Disk

KEY_BYTES = 32
FRAME_BYTES_MAX = 1 << 20
"""Larger writes are cut into several frames, so that a reader holds one of them and not a whole file."""
_MAGIC = b"PYSWSEAL"
_SALT_BYTES = 16
_MARK = b"\xa7SF\n"
_HEADER = struct.Struct(">4sI12s")
_TAG_BYTES = 16
_CHECK_BYTES = 8
_START = len(_MAGIC) + _SALT_BYTES + _CHECK_BYTES


class WrongKey(OSError):
    """The file is not one that was sealed with this key."""


def _cipher(key: bytes, salt: bytes) -> tuple[AESGCM, bytes]:
    """That of one file, and what its header shows to tell a wrong key from damage."""
    derived = HKDF(SHA256(), KEY_BYTES + _CHECK_BYTES, salt, b"pyswarm file").derive(key)
    return AESGCM(derived[:KEY_BYTES]), derived[KEY_BYTES:]


def _header(cipher: tuple[AESGCM, bytes], salt: bytes) -> bytes:
    return _MAGIC + salt + cipher[1]


class Sealed:
    """A `Disk` on another one. `randomness`: count -> bytes."""

    def __init__(self, disk: Disk, key: bytes, randomness: Callable[[int], bytes] = os.urandom) -> None:
        self._disk = disk
        self._key = key
        self._randomness = randomness

    def __str__(self) -> str:
        return str(self._disk)

    def names(self) -> list[str]:
        return self._disk.names()

    def read(self, name: str) -> bytes:
        data = self._disk.read(name)
        return b"".join(_open_frames(data, self._opened(name, data[:_START])))

    def open(self, name: str) -> io.BufferedReader:
        """All after a frame that does not open reads as zeros, too."""
        file = self._disk.open(name)
        try:
            return io.BufferedReader(_Reader(file, self._opened(name, file.read(_START))), FRAME_BYTES_MAX)
        except BaseException:
            file.close()
            raise

    def _opened(self, name: str, header: bytes) -> AESGCM:
        salt = header[len(_MAGIC) : len(_MAGIC) + _SALT_BYTES]
        cipher = _cipher(self._key, salt)
        if header != _header(cipher, salt):
            raise WrongKey(f"{self._disk}/{name} was not sealed with this manager's key, or its beginning is damaged")
        return cipher[0]

    def create(self, name: str) -> AppendFile:
        salt = self._randomness(_SALT_BYTES)
        cipher = _cipher(self._key, salt)
        file = self._disk.create(name)
        file.write(_header(cipher, salt))
        return _Writer(file, cipher[0], _START, self._randomness)

    def append(self, name: str, size: int) -> AppendFile:
        """`size` must be where a write ended."""
        data = self._disk.read(name)
        end, clear = _START, 0
        while clear < size:
            _, length, _ = _HEADER.unpack_from(data, end)
            end += _HEADER.size + length
            clear += length - _TAG_BYTES
        if clear != size:
            raise ValueError(f"{self._disk}/{name}: no write ended at byte {size}")
        cipher = self._opened(name, data[:_START])
        return _Writer(self._disk.append(name, end), cipher, end, self._randomness)

    def rename(self, old: str, new: str) -> None:
        self._disk.rename(old, new)

    def remove(self, name: str) -> None:
        self._disk.remove(name)

    def sync_names(self) -> None:
        self._disk.sync_names()

    def free_bytes(self) -> int:
        return self._disk.free_bytes()


class _Writer:
    def __init__(self, file: AppendFile, cipher: AESGCM, offset: int, randomness: Callable[[int], bytes]) -> None:
        self._file = file
        self._cipher = cipher
        self._offset = offset
        self._randomness = randomness

    def write(self, data: bytes) -> None:
        frames = []
        for start in range(0, len(data), FRAME_BYTES_MAX):
            piece = data[start : start + FRAME_BYTES_MAX]
            nonce = self._randomness(12)
            body = self._cipher.encrypt(nonce, piece, _place(self._offset))
            frames.append(_HEADER.pack(_MARK, len(body), nonce) + body)
            self._offset += len(frames[-1])
        self._file.write(b"".join(frames))

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


class _Reader(io.RawIOBase):
    """`file` stands at the first frame."""

    def __init__(self, file: io.BufferedReader, cipher: AESGCM) -> None:
        super().__init__()
        self._file = file
        self._cipher = cipher
        self._offset = _START
        self._rest = memoryview(b"")
        self._is_broken = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if not self._rest:
            self._rest = memoryview(self._next())
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _next(self) -> bytes:
        head = self._file.read(FRAME_BYTES_MAX if self._is_broken else _HEADER.size)
        if self._is_broken or len(head) < _HEADER.size:
            return bytes(len(head))
        _, length, _ = _HEADER.unpack(head)
        frame = head + self._file.read(min(length, FRAME_BYTES_MAX + _TAG_BYTES))
        piece, _ = _open_at(frame, 0, self._cipher, self._offset)
        self._is_broken = piece is None
        self._offset += len(frame)
        return bytes(len(frame)) if piece is None else piece


def _open_frames(data: bytes, cipher: AESGCM) -> Iterator[bytes]:
    """What was written, in order; zeros for what does not open."""
    offset = _START
    while offset < len(data):
        piece, end = _open_at(data, offset, cipher, offset)
        if piece is None:
            # Find the next frame that opens: what stands before it was one, or several, and is lost.
            later = data.find(_MARK, offset + 1)
            while later >= 0 and _open_at(data, later, cipher, later)[0] is None:
                later = data.find(_MARK, later + 1)
            end = later if later >= 0 else len(data)
            piece = bytes(end - offset)
        yield piece
        offset = end


def _open_at(data: bytes, offset: int, cipher: AESGCM, place: int) -> tuple[bytes | None, int]:
    """The frame at `offset`, which is byte `place` of the file, and where it ends; None if it does not open."""
    if offset + _HEADER.size > len(data):
        return None, len(data)
    mark, length, nonce = _HEADER.unpack_from(data, offset)
    end = offset + _HEADER.size + length
    if mark != _MARK or not _TAG_BYTES <= length <= FRAME_BYTES_MAX + _TAG_BYTES or end > len(data):
        return None, len(data)
    try:
        return cipher.decrypt(nonce, data[offset + _HEADER.size : end], _place(place)), end
    except InvalidTag:
        return None, end


def _place(offset: int) -> bytes:
    return offset.to_bytes(8, "big")
