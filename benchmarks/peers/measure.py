"""Rounds in which contestants take turns, and the rows that come of them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.peers.adapters import u2a_fast as ours
from benchmarks.peers.contestants import Contestant, user_code_lines
from benchmarks.peers.environments import PACKAGES, prepare
from benchmarks.peers.process import Worker, WorkerError
from benchmarks.peers.task import BATCH, Task
from benchmarks.peers.truth import AGREEMENT, judge, truths
from benchmarks.rows import Row, make_row
from benchmarks.timing import ratios

__all__ = ["GateError", "Settings", "measure"]

STARTING = 2  # processes that load at a time


class GateError(RuntimeError):
    """Scores of u2a_fast are wrong, so no speed in this run is a result."""


@dataclass(frozen=True)
class Settings:
    """Where, how many rounds over how many examples, on how many CPU threads, and the seconds one run may take."""

    folder: Path
    rounds: int
    timed: int
    threads: int
    patience: float


@dataclass
class Entry:
    """A contestant in a run: its process while it takes part, and what was found."""

    contestant: Contestant
    count: int
    timed: int
    worker: Worker | None = None
    error: str | None = None
    judged: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    units: list[float] = field(default_factory=list)  # seconds of a forward pass in the same rounds
    memory: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, contestant: Contestant, total: int, timed: int) -> "Entry":
        """Its share, at least a batch, of the ``total`` examples to judge and of the ``timed`` ones."""
        judged, timed = (min(total, max(BATCH, round(n * contestant.share))) for n in (total, timed))
        return cls(contestant, judged, timed)

    def retire(self, error: str | None = None) -> None:
        """End its process."""
        self.error = self.error or error
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def _in_this_version(contestant: Contestant) -> bool:
    mode = contestant.mode.removesuffix("_bf16")
    return not contestant.ours or mode == "ghost_norm" or mode in ours.modes()


def _start(entry: Entry, folder: Path, settings: Settings) -> None:
    contestant = entry.contestant
    environment = prepare(contestant.environment, settings.folder)
    if environment.error is not None or not contestant.adapter:
        entry.error = environment.error or "installs here, but where this was written it did not: no adapter"
        return
    log = folder / f"{contestant.name}.log"
    try:
        entry.worker = Worker(
            contestant, environment.python, folder, log, threads=settings.threads, patience=settings.patience
        )
    except WorkerError as error:
        entry.retire(str(error))


def _turn(entry: Entry, count: int) -> dict[str, Any] | None:
    assert entry.worker is not None
    try:
        answer = entry.worker.run(count)
    except WorkerError as error:
        entry.retire(str(error))
        return None
    for key in ("peak_mib", "rise_mib", "device_mib"):
        values = [v for v in (answer[key], entry.memory.get(key)) if v is not None]
        entry.memory[key] = max(values, default=None)
    return answer


def _judge(entry: Entry, scores: list[float], truth: dict[str, Tensor]) -> None:
    """Take what the first scores are worth; GateError where exact ones of u2a_fast are wrong."""
    contestant = entry.contestant
    try:
        entry.judged = judge(contestant, scores, truth)
    except ValueError as error:
        entry.retire(str(error))
        return
    if not entry.judged:
        return
    error, ranking = entry.judged["relative_error"], entry.judged["spearman"][contestant.truth]
    wrong = f"scores differ from float64 autograd ({contestant.truth}) by {error:.1e} (relative)"
    if contestant.exact and not error <= AGREEMENT:
        if contestant.ours:
            raise GateError(f"{contestant.name}: {wrong}")
        entry.retire(wrong)
    elif not ranking >= contestant.ranking:
        entry.retire(f"Spearman against float64 autograd {ranking:.4f}, below {contestant.ranking}")


def _forward(unit: Entry, counts: set[int]) -> dict[int, float]:
    """Seconds of a forward pass over each number of examples, the largest first."""
    seconds = {}
    for count in sorted(counts, reverse=True):
        answer = _turn(unit, count)
        if answer is None:
            raise GateError(f"the forward pass failed: {unit.error}")
        seconds[count] = answer["seconds"]
    return seconds


def _round(entries: Sequence[Entry], size: Callable[[Entry], int]) -> dict[str, list[float]]:
    """One run of everybody: first scores by name, and the times beside those of as many examples' forward pass."""
    scores = {}
    counts = {size(entry) for entry in entries}
    forward: dict[int, float] = {}
    for entry in entries:
        if entry.contestant.name == "forward":
            forward = _forward(entry, counts)
            entry.seconds.append(forward[size(entry)])
            entry.units.append(forward[size(entry)])
        elif (answer := _turn(entry, size(entry))) is not None:
            scores[entry.contestant.name] = answer["scores"]
            entry.seconds.append(answer["seconds"] - answer["query_seconds"])
    for entry in entries:
        if len(entry.seconds) > len(entry.units):
            entry.units.append(forward[size(entry)])
    return scores


def _first(entries: Sequence[Entry], truth: dict[str, Tensor]) -> None:
    """Everybody scores all examples: scores are judged, and the time counts only for those that take no more turns."""
    active = [entry for entry in entries if entry.worker is not None]
    scores = _round(active, lambda entry: entry.count)
    for entry in active:
        if entry.contestant.name in scores:
            _judge(entry, scores[entry.contestant.name], truth)
        if entry.contestant.rounds == 0:
            entry.timed = entry.count
            entry.retire()
        else:
            entry.seconds, entry.units = [], []


def measure(name: str, task: Task, contestants: Sequence[Contestant], settings: Settings) -> list[Row]:
    """A row for every contestant that this version of u2a_fast has, errors included.

    Raises:
        GateError: exact scores of u2a_fast, or the forward pass, are wrong.
    """
    folder = settings.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    task.save(folder)
    truth = truths(task)
    entries = [Entry.of(c, len(task.examples), settings.timed) for c in contestants if _in_this_version(c)]
    with ExitStack() as stack:
        for entry in entries:
            stack.callback(entry.retire)
        with ThreadPoolExecutor(STARTING) as pool:
            list(pool.map(lambda entry: _start(entry, folder, settings), entries))
        _first(entries, truth)
        for number in range(settings.rounds):
            active = [e for e in entries if e.worker is not None and number < e.contestant.rounds]
            _round(active[:: 1 if number % 2 == 0 else -1], lambda entry: entry.timed)
    passed = [e.judged["relative_error"] for e in entries if e.contestant.ours and e.contestant.exact and e.judged]
    if not passed:
        raise GateError("no exact mode of u2a_fast took part")
    gate = f"exact float32 scores of u2a_fast within {max(passed):.1e} (relative) of float64 autograd in this run"
    return [_row(name, task, entry, gate) for entry in entries]


def _row(workload: str, task: Task, entry: Entry, gate: str) -> Row:
    contestant = entry.contestant
    values: dict[str, Any] = {
        "workload": workload,
        "label": contestant.label,
        "error": entry.error,
        "package": PACKAGES[contestant.environment][0] if contestant.environment else None,
        "parameters": sum(p.numel() for p in task.model.parameters()),
    }
    if entry.error is None:
        seconds = float(np.median(entry.seconds))
        values |= {
            "judged_examples": entry.count,
            "examples": entry.timed,
            "tokens": sum(len(example["input_ids"]) for example in task.examples[: entry.timed]),
            "rounds": len(entry.seconds),
            "seconds": seconds,
            "examples_per_second": entry.timed / seconds,
            "units": ratios(entry.seconds, entry.units).to_list(),
            "lines": user_code_lines(contestant),
        }
        values |= entry.memory | entry.judged
    return make_row("peers", f"{workload}-{contestant.name}", values, gate=gate)
