"""The process of one contestant: loads the task, and runs when the parent says so.

    python -m benchmarks.peers.worker FOLDER ADAPTER MODE THREADS

Imports what it needs and waits for a ``load`` line, which it answers with the seconds that setting up took; then it
answers ``run COUNT`` lines with one line of JSON each: seconds by the clock and of CPU time, peak memory, the scores of
the first COUNT examples and the examples of a batch. Where a batch does not fit in a device's memory it is halved, and
the run repeated. Whatever a library prints goes to standard error.
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


def _settle(device: str) -> float:
    """Give free memory back, reset the high-water marks; the resident set in MiB."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    if not os.access(PROCESS / "clear_refs", os.W_OK):
        return 0.0
    ctypes.CDLL(None).malloc_trim(0)
    (PROCESS / "clear_refs").write_text("5", encoding="ascii")
    return _resident("VmRSS")


def _peak(before: float, device: str) -> dict[str, float | None]:
    on_device = torch.cuda.max_memory_allocated() / MIB if device != "cpu" else None
    if not before:
        return {"peak_mib": None, "rise_mib": None, "device_mib": on_device}
    peak = _resident("VmHWM")
    return {"peak_mib": peak, "rise_mib": peak - before, "device_mib": on_device}


def _clocks(device: str) -> tuple[float, float]:
    """Now, when the device has done all that it was asked to."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def _run(score: Scorer, examples: list[Example], device: str) -> dict[str, Any]:
    before = _settle(device)
    start = _clocks(device)
    scores = score(examples).tolist()
    end = _clocks(device)
    memory = _peak(before, device)
    # What a query costs however many negatives follow is timed beside the run, and taken off.
    query = getattr(score, "query", None)
    query_start = _clocks(device)
    if query is not None:
        query()
    query_end = _clocks(device)
    spent = [(e - s) - (qe - qs) for s, e, qs, qe in zip(start, end, query_start, query_end, strict=True)]
    return {"seconds": spent[0], "cpu_seconds": spent[1], "scores": scores} | memory


def _fitting_run(score: Scorer, task: Task, count: int) -> dict[str, Any]:
    """A run with batches that fit in the device's memory; RuntimeError where one example does not."""
    while True:
        try:
            return _run(score, task.examples[:count], task.device) | {"batch": task.batch}
        except RuntimeError as error:
            if task.device == "cpu" or task.batch == 1 or "out of memory" not in str(error):
                raise
        # here, not in the handler: the error would hold the failed batch's tensors
        task.batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def _wake(folder: Path) -> None:
    """Make the device's context, if there is one, before anything waits for it."""
    if (written := folder / "recipe.json").exists():
        torch.zeros(1, device=json.loads(written.read_text(encoding="utf-8"))["recipe"]["device"])


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
        make = getattr(import_module(f"benchmarks.peers.adapters.{adapter}"), mode)
        _wake(Path(folder))
        if not sys.stdin.readline():
            return 0
        task = Task.load(Path(folder))
        start = time.perf_counter()
        score = make(task)
        _reply(channel, {"setup_seconds": time.perf_counter() - start})
        for line in sys.stdin:
            _reply(channel, _fitting_run(score, task, int(line.split()[1])))
    except Exception as error:  # a library may raise anything; it becomes the contestant's row
        _reply(channel, {"error": f"{type(error).__name__}: {error}"})
        raise
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
