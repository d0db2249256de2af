"""What a process keeps of its freed memory while it scores."""

import ctypes
import os
import subprocess
import sys

import pytest

PAGES = """
import mmap, resource
import torch
from u2a_fast.models.heap import kept_heap

torch.set_num_threads(1)
def resident():
    return int(open("/proc/self/statm").read().split()[1])
def faults(count=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(3 << 20) for _ in range(count)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pages = 20 * (12 << 20) // mmap.PAGESIZE
with kept_heap(), kept_heap():
    first, again = faults(), faults()
    kept = resident()
after = resident()
outside = faults()
for _ in range(2):
    with kept_heap():
        short = faults(3)
print(first / pages, again / pages, (kept - after) / pages, outside / pages, short / pages)
"""


def _shares(**environment: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", PAGES], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return [float(share) for share in done.stdout.split()]


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="keeping what is freed is for glibc"
)
def test_freed_memory_is_kept_inside_and_handed_back_after() -> None:
    first, again, returned, outside, short = _shares()
    assert again < first / 10
    assert returned > 0.9 and outside > first / 2
    assert short < first / 100  # of 36 MiB the next block finds what the last one freed
    first, again, *_ = _shares(MALLOC_TRIM_THRESHOLD_="0")  # someone else's decision stands
    assert again > first / 2
