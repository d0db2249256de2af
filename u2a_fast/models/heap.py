"""Freed memory kept by the process while a model is scored, as PyTorch keeps a GPU's.

glibc hands large blocks, and the end of the heap, back to the system as they are freed. A pass over a batch frees and
takes the same tens of megabytes for every layer, and each page then comes back through a fault and is cleared: a
seventh of a float32 pass over a small model (benchmarks/LOG.md).
"""

import ctypes
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


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of malloc.h, in glibc from 2.33 on: ten sizes."""

    _fields_ = [("others", ctypes.c_size_t * 8), ("free_bytes", ctypes.c_size_t), ("top", ctypes.c_size_t)]


def _libc() -> Any:
    """The C library, where it is glibc and nobody has told it what to keep."""
    environment = " ".join((*os.environ, os.environ.get("GLIBC_TUNABLES", "")))
    if sys.platform != "linux" or any(name in environment for name in _OWN):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def _hand_back(libc: Any) -> None:
    """Give free memory back where it is more than glibc keeps by itself: of less, short blocks would only fault."""
    libc.mallopt(_TRIM_THRESHOLD, _TRIMMED)
    if hasattr(libc, "mallinfo2"):
        libc.mallinfo2.restype = _Mallinfo2
        if libc.mallinfo2().free_bytes < _TRIMMED:
            return
    libc.malloc_trim(0)


@contextmanager
def kept_heap() -> Iterator[None]:
    """Have glibc keep what is freed, up to 2 GiB, for the duration of the block; after it, hand back 64 MiB and more.

    Blocks may overlap, in any threads. Nothing happens with another C library, nor where the environment says what
    malloc is to keep (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``).
    """
    global _inside
    libc = _libc()
    if libc is None:
        yield
        return
    with _lock:
        _inside += 1
        libc.mallopt(_MMAP_THRESHOLD, _MAPPED)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _hand_back(libc)
