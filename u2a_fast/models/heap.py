"""Freed memory kept by the process while a model is scored, as PyTorch keeps a GPU's.

glibc hands large blocks, and the end of the heap, back to the system as they are freed. A pass over a batch frees and
takes the same tens of megabytes for every layer, and each page then comes back through a fault and is cleared: a
seventh of a float32 pass over a small model (benchmarks/LOG.md).
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

__all__ = ["kept_heap"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
# The largest sizes that glibc comes to by itself as a program frees large blocks: where nothing is scored.
_MAPPED = 32 << 20
_TRIMMED = 2 * _MAPPED
_NEVER = 2**31 - 1
_OWN = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "glibc.malloc."

_lock = Lock()
_inside = 0
_before = 0
if hasattr(os, "register_at_fork"):  # a child must not find it taken by a thread that it does not have
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def _libc() -> Any:
    """The C library, where it is glibc and nobody has told it what to keep."""
    environment = " ".join((*os.environ, os.environ.get("GLIBC_TUNABLES", "")))
    if sys.platform != "linux" or any(name in environment for name in _OWN):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def _resident() -> int:
    """Bytes of the process in memory. What malloc counts as free may be gone long since: it keeps the addresses."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * mmap.PAGESIZE
    except OSError:  # no /proc, or no file may be opened: scoring goes on
        return 0


@contextmanager
def kept_heap() -> Iterator[None]:
    """Have glibc keep what is freed, up to 2 GiB, for the duration of the block.

    After it, what is free goes back to the system if the process has grown by more than the 64 MiB that glibc keeps by
    itself: after less, the next short block would only fault it in anew.

    Blocks may overlap, in any threads. Nothing happens with another C library, nor where the environment says what
    malloc is to keep (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``).
    """
    global _inside, _before
    libc = _libc()
    if libc is None:
        yield
        return
    with _lock:
        if not _inside:
            _before = _resident()
            libc.mallopt(_MMAP_THRESHOLD, _MAPPED)
            libc.mallopt(_TRIM_THRESHOLD, _NEVER)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                libc.mallopt(_TRIM_THRESHOLD, _TRIMMED)
                if _resident() - _before > _TRIMMED:
                    libc.malloc_trim(0)
