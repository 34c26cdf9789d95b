"""Object IDs as Docker writes them: 25 characters of base 36 (research: object model, section 1)."""

from __future__ import annotations

import secrets

ID_LENGTH = 25
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def base36(number: int, width: int) -> str:
    """`number` in base 36, left-padded with zeros to `width` characters."""
    out = ""
    while number:
        number, digit = divmod(number, 36)
        out = _DIGITS[digit] + out
    return out.rjust(width, "0")


def random_id() -> str:
    """A fresh opaque ID of 25 characters, about 128 bits of it random."""
    bits = 1 << 128 | secrets.randbits(128)
    return base36(bits, ID_LENGTH)[-ID_LENGTH:]
