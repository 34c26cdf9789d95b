"""nft's text form, run in the calling thread's namespace: by libnftables if it is there, else by `nft -f -`.

Needed once per namespace, for the fixed part of a table. The library takes a fraction of what starting a
process does, and python3-nftables is this same library.
"""

from __future__ import annotations

import ctypes
import subprocess
from functools import lru_cache

from overlay.interface import NetworkError

LIBRARY = "libnftables.so.1"
COMMAND_TIMEOUT_S = 20
"""`nft -f -` takes 10 to 50 ms; longer than this, the machine is stuck."""


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.nft_ctx_get_error_buffer.argtypes = [ctypes.c_void_p]
    library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    return library


def run(text: str, *, library: bool = True) -> None:
    """One atomic transaction. Raises NetworkError with nft's own message. `library=False`: the command."""
    found = _library() if library else None
    error = _run_command(text) if found is None else _run_library(found, text)
    if error is not None:
        raise NetworkError(f"nftables refused a ruleset of pyswarm: {error.strip()}")


def _run_library(library: ctypes.CDLL, text: str) -> str | None:
    # A context per call: its socket belongs to the namespace in which it is made, and it costs only 0.1 ms.
    context = library.nft_ctx_new(0)
    try:
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)
        if library.nft_run_cmd_from_buffer(context, text.encode()) == 0:
            return None
        message: bytes = library.nft_ctx_get_error_buffer(context)
        return message.decode(errors="replace")
    finally:
        library.nft_ctx_free(context)


def _run_command(text: str) -> str | None:
    try:
        done = subprocess.run(
            ["nft", "-f", "-"], input=text, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        return f"neither {LIBRARY} nor the command nft is installed; install the package nftables"
    except subprocess.TimeoutExpired:
        return f"nft did not finish within {COMMAND_TIMEOUT_S} s"
    return done.stderr or f"nft ended with status {done.returncode}" if done.returncode else None
