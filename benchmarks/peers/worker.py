"""The process of one contestant: loads the task, and runs when the parent says so.

    python -m benchmarks.peers.worker FOLDER ADAPTER MODE THREADS

Reads ``run COUNT`` lines and answers each with one line of JSON: seconds by the clock and of CPU time, peak memory and
the scores of the first COUNT examples. Whatever a library prints goes to standard error.
"""

import ctypes
import gc
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.peers.task import Example, Scorer, Task

MIB = 1 << 20
PROCESS = Path("/proc/self")


def _resident(field: str) -> float:
    lines = (PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _settle() -> float:
    """Give free memory back, reset the high-water mark; the resident set in MiB."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if not os.access(PROCESS / "clear_refs", os.W_OK):
        return 0.0
    ctypes.CDLL(None).malloc_trim(0)
    (PROCESS / "clear_refs").write_text("5", encoding="ascii")
    return _resident("VmRSS")


def _peak(before: float) -> dict[str, float | None]:
    device = torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else None
    if not before:
        return {"peak_mib": None, "rise_mib": None, "device_mib": device}
    peak = _resident("VmHWM")
    return {"peak_mib": peak, "rise_mib": peak - before, "device_mib": device}


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _run(score: Scorer, examples: list[Example]) -> dict[str, Any]:
    before = _settle()
    start = _clocks()
    scores = score(examples).tolist()
    end = _clocks()
    memory = _peak(before)
    # What a query costs however many negatives follow is timed beside the run, and taken off.
    query = getattr(score, "query", None)
    query_start = _clocks()
    if query is not None:
        query()
    query_end = _clocks()
    spent = [(e - s) - (qe - qs) for s, e, qs, qe in zip(start, end, query_start, query_end, strict=True)]
    return {"seconds": spent[0], "cpu_seconds": spent[1], "scores": scores} | memory


def _reply(channel: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=channel, flush=True)


def main() -> int:
    """Serve until the parent closes the pipe."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    folder, adapter, mode, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    try:
        task = Task.load(Path(folder))
        start = time.perf_counter()
        score = getattr(import_module(f"benchmarks.peers.adapters.{adapter}"), mode)(task)
        _reply(channel, {"setup_seconds": time.perf_counter() - start})
        for line in sys.stdin:
            _reply(channel, _run(score, task.examples[: int(line.split()[1])]))
    except Exception as error:  # a library may raise anything; it becomes the contestant's row
        _reply(channel, {"error": f"{type(error).__name__}: {error}"})
        raise
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
