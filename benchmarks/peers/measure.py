"""Rounds in which contestants take turns, and the rows that come of them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.baselines import GateError
from benchmarks.peers.adapters import u2a_fast as ours
from benchmarks.peers.contestants import Contestant, user_code_lines
from benchmarks.peers.environments import PACKAGES, Environment, prepare
from benchmarks.peers.process import Worker, WorkerError
from benchmarks.peers.task import BATCH, Task
from benchmarks.peers.truth import AGREEMENT, HALF_AGREEMENT, judge, truths
from u2a_fast.bench.rows import Row, make_row
from u2a_fast.bench.timing import ratios

__all__ = [
    "CLOCKS",
    "Entry",
    "GateError",
    "Settings",
    "begin",
    "in_this_version",
    "judge_entry",
    "load",
    "make_peer_row",
    "measure",
    "turn",
]

CLOCKS = ("seconds", "cpu_seconds")
STARTING = 2  # processes that load at a time


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
    times: dict[str, list[float]] = field(default_factory=lambda: {clock: [] for clock in CLOCKS})
    units: dict[str, list[float]] = field(default_factory=lambda: {clock: [] for clock in CLOCKS})  # of a forward pass
    memory: dict[str, float | None] = field(default_factory=dict)
    batch: int | None = None  # examples a batch in its last run

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


def in_this_version(contestant: Contestant) -> bool:
    """Whether it is another library, or a mode that this version of u2a_fast has."""
    mode = contestant.mode.removesuffix("_bf16")
    return not contestant.ours or mode == "ghost_norm" or mode in ours.modes()


def begin(entry: Entry, environment: Environment, folder: Path, *, threads: int, patience: float) -> bool:
    """Begin the process of an entry, which waits; False and the entry's error where it has no environment."""
    contestant = entry.contestant
    if environment.error is not None or not contestant.adapter:
        entry.error = environment.error or "installs here, but where this was written it did not: no adapter"
        return False
    log = folder / f"{contestant.name}.log"
    entry.worker = Worker(contestant, environment.python, folder, log, threads=threads, patience=patience)
    return True


def load(entry: Entry) -> None:
    """Have the process of an entry load the task; one that fails is retired."""
    assert entry.worker is not None
    try:
        entry.worker.load()
    except WorkerError as error:
        entry.retire(str(error))


def _start(entry: Entry, environment: Environment, folder: Path, settings: Settings) -> None:
    if begin(entry, environment, folder, threads=settings.threads, patience=settings.patience):
        load(entry)


def _start_all(entries: Sequence[Entry], task: Task, folder: Path, settings: Settings) -> None:
    environments = {name: prepare(name, settings.folder) for name in {e.contestant.environment for e in entries}}
    size = sum(p.numel() for p in task.model.parameters())
    able = []
    for entry in entries:
        if size > entry.contestant.largest:
            entry.error = f"not run: minutes a batch above {entry.contestant.largest / 1e6:g} M parameters"
        else:
            able.append(entry)
    with ThreadPoolExecutor(STARTING) as pool:
        list(pool.map(lambda entry: _start(entry, environments[entry.contestant.environment], folder, settings), able))


def turn(entry: Entry, count: int) -> dict[str, Any] | None:
    """A run over ``count`` examples; None where it fails, which retires the entry."""
    assert entry.worker is not None
    try:
        answer = entry.worker.run(count)
    except WorkerError as error:
        entry.retire(str(error))
        return None
    for key in ("peak_mib", "rise_mib", "device_mib"):
        values = [v for v in (answer[key], entry.memory.get(key)) if v is not None]
        entry.memory[key] = max(values, default=None)
    entry.batch = answer["batch"]
    return answer


def judge_entry(entry: Entry, scores: list[float], truth: dict[str, Tensor], half: bool = False) -> None:
    """Take what the first scores are worth; GateError where exact ones of u2a_fast are wrong.

    With ``half`` the model is in half precision: only u2a_fast is held to an error, of the norm. That of the others is
    reported, since nobody promised their rounding.
    """
    contestant = entry.contestant
    try:
        entry.judged = judge(contestant, scores, truth)
    except ValueError as error:
        entry.retire(str(error))
        return
    if not entry.judged:
        return
    error, ranking = (
        entry.judged["norm_error" if half else "relative_error"],
        entry.judged["spearman"][contestant.truth],
    )
    kind = "of their norm" if half else "(relative)"
    wrong = f"scores differ from {'' if half else 'float64 '}autograd ({contestant.truth}) by {error:.1e} {kind}"
    if contestant.exact and (contestant.ours or not half) and not error <= (HALF_AGREEMENT if half else AGREEMENT):
        if contestant.ours:
            raise GateError(f"{contestant.name}: {wrong}")
        entry.retire(wrong)
    elif not ranking >= contestant.ranking:
        entry.retire(f"Spearman against float64 autograd {ranking:.4f}, below {contestant.ranking}")


def _forward(unit: Entry, counts: set[int]) -> dict[int, dict[str, Any]]:
    """A forward pass over each number of examples, the largest first."""
    answers = {}
    for count in sorted(counts, reverse=True):
        answer = turn(unit, count)
        if answer is None:
            raise GateError(f"the forward pass failed: {unit.error}")
        answers[count] = answer
    return answers


def _round(entries: Sequence[Entry], size: Callable[[Entry], int]) -> dict[str, list[float]]:
    """One run of everybody: scores by name; times go beside those of a forward pass over as many examples."""
    answers: dict[str, dict[str, Any] | None] = {}
    forward: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if entry.contestant.name == "forward":
            forward = _forward(entry, {size(e) for e in entries})
            answers["forward"] = forward[size(entry)]
        else:
            answers[entry.contestant.name] = turn(entry, size(entry))
    for entry in entries:
        if (answer := answers[entry.contestant.name]) is not None:
            for clock in CLOCKS:
                entry.times[clock].append(answer[clock])
                entry.units[clock].append(forward[size(entry)][clock])
    return {name: answer["scores"] for name, answer in answers.items() if answer is not None}


def _first(entries: Sequence[Entry], truth: dict[str, Tensor]) -> None:
    """Everybody scores all examples: scores are judged, and the time counts only for those that take no more turns."""
    active = [entry for entry in entries if entry.worker is not None]
    scores = _round(active, lambda entry: entry.count)
    for entry in active:
        if entry.contestant.name in scores:
            judge_entry(entry, scores[entry.contestant.name], truth)
        if entry.contestant.rounds == 0:
            entry.timed = entry.count
            entry.retire()
        else:
            for clock in CLOCKS:
                entry.times[clock], entry.units[clock] = [], []


def measure(name: str, task: Task, contestants: Sequence[Contestant], settings: Settings) -> list[Row]:
    """A row for every contestant that this version of u2a_fast has, errors included.

    Raises:
        GateError: exact scores of u2a_fast, or the forward pass, are wrong.
    """
    folder = settings.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    task.save(folder)
    truth = truths(task)
    entries = [Entry.of(c, len(task.examples), settings.timed) for c in contestants if in_this_version(c)]
    with ExitStack() as stack:
        for entry in entries:
            stack.callback(entry.retire)
        _start_all(entries, task, folder, settings)
        _first(entries, truth)
        for number in range(settings.rounds):
            active = [e for e in entries if e.worker is not None and number < e.contestant.rounds]
            _round(active[:: 1 if number % 2 == 0 else -1], lambda entry: entry.timed)
    passed = [e.judged["relative_error"] for e in entries if e.contestant.ours and e.contestant.exact and e.judged]
    if not passed:
        raise GateError("no exact mode of u2a_fast took part")
    gate = f"exact float32 scores of u2a_fast within {max(passed):.1e} (relative) of float64 autograd in this run"
    return [make_peer_row(name, task, entry, gate) for entry in entries]


def make_peer_row(workload: str, task: Task, entry: Entry, gate: str, *, device: str = "cpu", **more: Any) -> Row:
    """The row of an entry: its error, or times and what its scores are worth."""
    contestant = entry.contestant
    values: dict[str, Any] = {
        "workload": workload,
        "label": contestant.label,
        "error": entry.error,
        "package": PACKAGES[contestant.environment][0] if contestant.environment else None,
        "parameters": sum(p.numel() for p in task.model.parameters()),
    }
    if entry.error is None:
        seconds = float(np.median(entry.times["seconds"]))
        values |= {
            "judged_examples": entry.count,
            "examples": entry.timed,
            "tokens": sum(len(example["input_ids"]) for example in task.examples[: entry.timed]),
            "rounds": len(entry.times["seconds"]),
            "seconds": seconds,
            "examples_per_second": entry.timed / seconds,
            "units": ratios(entry.times["seconds"], entry.units["seconds"]).to_list(),
            "cpu_units": ratios(entry.times["cpu_seconds"], entry.units["cpu_seconds"]).to_list(),
            "lines": user_code_lines(contestant),
        }
        values |= entry.memory | entry.judged | more
    return make_row("peers", f"{workload}-{contestant.name}", values, gate=gate, device=device)
