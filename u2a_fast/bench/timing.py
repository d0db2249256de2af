"""Times of contestants that take turns in one process, so that whatever else the machine does hits all alike."""

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TypeVar

import numpy as np
import torch

__all__ = ["Spread", "Task", "alternate", "in_turns", "once", "ratios"]

Block = TypeVar("Block")

Task = Callable[[int], object]  # called with a running number, so that a task can rotate among input sets


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile of samples."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> "Spread":
        """The spread of ``samples``, of which there is at least one."""
        p20, p50, p80 = np.percentile(samples, (20, 50, 80))
        return cls(float(p20), float(p50), float(p80))

    def to_list(self) -> list[float]:
        """[p20, p50, p80] to 4 digits, as a row holds it."""
        return [float(f"{q:.4g}") for q in (self.p20, self.p50, self.p80)]


def ratios(numerator: list[float], denominator: list[float]) -> Spread:
    """Spread of the ratios round by round: what was measured side by side is compared."""
    return Spread.of([x / y for x, y in zip(numerator, denominator, strict=True)])


def once(task: Callable[[], object]) -> float:
    """Seconds of one call on the CPU."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def in_turns(
    contestants: Mapping[str, Callable[[Block], object]], blocks: Sequence[Block], *, rounds: int
) -> dict[str, list[float]]:
    """Seconds that every contestant takes for every block of work, ``rounds`` times over, on the CPU.

    All take a block before anybody goes on to the next; every second time in reverse order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds * len(blocks)):
        for name in _order(contestants, i):
            seconds[name].append(once(partial(contestants[name], blocks[i % len(blocks)])))
    return seconds


def _order(names: Iterable[str], turn: int) -> list[str]:
    """Every second turn in reverse, so that nobody always follows the same one."""
    return list(names)[:: 1 if turn % 2 == 0 else -1]


def _loop(task: Task, repeats: int, first: int) -> float:
    """Seconds of one call, from ``repeats`` calls back to back on the CPU."""
    start = time.perf_counter()
    for i in range(repeats):
        task(first + i)
    return (time.perf_counter() - start) / repeats


def _cuda_loop(task: Task, repeats: int, first: int) -> float:
    """Seconds of one call on the GPU, from ``repeats`` calls between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for i in range(repeats):
        task(first + i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def alternate(
    tasks: Mapping[str, Task], *, rounds: int, device: str = "cpu", sample_seconds: float = 0.01
) -> dict[str, list[float]]:
    """Seconds of one call of every task, ``rounds`` samples each, taken in turns.

    Each task is called once to warm up and once to size a sample at ``sample_seconds`` or one call. Every second round
    runs in reverse order, so that no task always follows the same one. On a GPU times lie between events on the stream;
    where the host needs longer to launch than the device to run, the time is the host's.
    """
    loop = _loop if device == "cpu" else _cuda_loop
    running, repeats = count(), {}
    for name, task in tasks.items():
        loop(task, 1, next(running))
        repeats[name] = max(1, math.ceil(sample_seconds / max(loop(task, 1, next(running)), 1e-9)))
        repeats[name] = min(repeats[name], 1000)
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in _order(tasks, i):
                samples[name].append(loop(tasks[name], repeats[name], next(running)))
    finally:
        gc.enable()
    return samples
