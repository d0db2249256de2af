"""What a process keeps of its freed memory while it scores."""

import ctypes
import os
import subprocess
import sys

import pytest

FOR_GLIBC = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="keeping what is freed is for glibc"
)
PAGES = """
import ctypes, mmap, resource, sys
import torch
from u2a_fast.models.heap import kept_heap

torch.set_num_threads(1)
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault is a page on every machine
pins = []
def resident():
    return int(open("/proc/self/statm").read().split()[1])
def faults(count=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(3 << 20) for _ in range(count)]
    if "pinned" in sys.argv and not pins:
        pins.append(torch.ones(1 << 14))
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pages = 20 * (12 << 20) // mmap.PAGESIZE
with kept_heap(), kept_heap():
    inside = sum(faults() for _ in range(8))
    kept = resident()
after = resident()
pins.clear()
outside = faults()
short = 0
for _ in range(20):
    with kept_heap():
        short += faults(3)
print(inside / pages, (kept - after) / pages, outside / pages, short / pages)
"""


def _shares(*arguments: str, **environment: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", PAGES, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(share) for share in done.stdout.split()]


@FOR_GLIBC
@pytest.mark.parametrize("layout", ["together", "pinned"])  # pinned: what is free ends below memory in use
def test_freed_memory_is_kept_inside_and_handed_back_after(layout: str) -> None:
    """Each round would fault in every page; kept, the first few do, until each block has its place."""
    inside, returned, outside, short = _shares(layout)
    assert inside < 2  # of 8
    assert returned > 0.9 and outside > 0.5
    assert short < 1  # of 20 * 3 / 20


@FOR_GLIBC
def test_a_decision_of_the_environment_stands() -> None:
    inside, *_ = _shares(MALLOC_TRIM_THRESHOLD_="0")
    assert inside > 4  # of 8


FORKED = """
import os, signal, threading, time
from u2a_fast.models import heap

def held():
    with heap._lock:
        time.sleep(0.3)
thread = threading.Thread(target=held)
thread.start()
time.sleep(0.1)
child = os.fork()
if not child:
    signal.alarm(20)
    with heap.kept_heap():
        os._exit(0)
thread.join()
print(os.waitpid(child, 0)[1])
"""


@FOR_GLIBC
def test_a_fork_beside_a_pass_does_not_hang() -> None:
    assert subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True).stdout == "0\n"
