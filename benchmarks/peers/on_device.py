"""Contestants one after another on a device, each beside the forward pass, within a limit of time.

A device's memory does not hold everybody's model at once. So processes import ahead of their turn, and wait; then one
at a time loads, scores everything once, which is judged and not timed, takes turns with the forward pass, and ends.
Only the process of the forward pass stays. Nothing is written before exact scores of u2a_fast were right in this run.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.contestants import CONTESTANTS, Contestant
from benchmarks.peers.environments import prepare
from benchmarks.peers.measure import CLOCKS, Entry, GateError, begin, judge_entry, load, make_peer_row, turn
from benchmarks.peers.task import Recipe, Task
from benchmarks.peers.truth import truths
from benchmarks.workloads import random_examples
from u2a_fast.bench.models import MODELS
from u2a_fast.bench.rows import Row

__all__ = ["ORDER", "WORKLOADS", "Limits", "Sizes", "entrants", "make_task", "measure_on_device"]

AHEAD = max(2, (os.cpu_count() or 2) // 2)  # processes that import before they are needed
OTHERS = 8  # examples whose mean answer NLL the direction is the gradient of
FIRST = ("forward", "u2a_fast-forward", "u2a_fast-reverse")  # the unit and the gate
# Whom the time runs out for comes last.
ORDER = (
    *FIRST,
    "public",
    "hooks",
    "bergson-jvp",
    "bergson",
    "kronfluence",
    "torch-vmap",
    "torch-jvp",
    "bergson-16",
    "u2a_fast-lowrank",
    "logra",
    "grass",
    "u2a_fast-forward_bf16",
    "u2a_fast-reverse_bf16",
    "u2a_fast-lowrank_bf16",
)


@dataclass(frozen=True)
class Sizes:
    """A model of random weights by its config, the dtype it is run in and that of its truth, and how it is run.

    Args:
        count: examples, all of them judged and timed.
        batch: examples a batch for those that leave it to their user, halved where they do not fit.
    """

    config: dict[str, Any]
    dtype: str = "float32"
    reference: str = "float64"
    tokens: int = 128
    count: int = 128
    batch: int = 64


LLAMA_19M = {
    "model_type": "llama",
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 16000,
    "tie_word_embeddings": True,
}
WORKLOADS = {
    "llama-19m": Sizes(LLAMA_19M),
    "llama-1b": Sizes(MODELS["meta-llama/Llama-3.2-1B"], "bfloat16", "float32", count=64),
}


@dataclass(frozen=True)
class Limits:
    """Turns at most; CPU threads; seconds for one answer, for the turns of one contestant, and the time that ends all.

    Args:
        until: as ``time.monotonic`` counts.
    """

    rounds: int = 5
    threads: int = 1
    patience: float = 60
    spell: float = 10
    until: float = float("inf")

    def left(self) -> float:
        """Seconds until nothing more is begun."""
        return self.until - time.monotonic()

    def answer(self, imports: bool = False) -> float:
        """Seconds that an answer may take now; twice as many where it waits for the imports before."""
        return max(1.0, min(self.patience * (1 + imports), self.left()))


def make_task(sizes: Sizes, device: str, dtype: str | None = None, count: int | None = None) -> Task:
    """The task of a workload on a device, in another dtype or of other length where asked for."""
    vocabulary = sizes.config["vocab_size"]
    examples, others = (
        random_examples(n, tokens=sizes.tokens, vocabulary=vocabulary, seed=seed)
        for n, seed in ((count or sizes.count, 1), (OTHERS, 2))
    )
    return Recipe(sizes.config, dtype or sizes.dtype, device).task(examples, others, sizes.batch)


def entrants(dtype: str, only: Sequence[str] | None = None) -> list[Contestant]:
    """Contestants for a model in ``dtype``, those that matter most first: the unit, the gate and all or ``only``."""
    by_name = {contestant.name: contestant for contestant in CONTESTANTS}
    wanted = {*FIRST, *(ORDER if only is None else only)}
    return [by_name[n] for n in ORDER if n in wanted and (dtype == "float32" or not n.endswith("_bf16"))]


def measure_on_device(
    name: str,
    task: Task,
    contestants: Sequence[Contestant],
    limits: Limits,
    *,
    folder: Path,
    reference: torch.dtype = torch.float64,
    wheels: Path | None = None,
    report: Callable[[Row], None] = lambda row: None,
    save: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Rows of the contestants that the time was enough for, errors included; ``contestants`` as ``entrants`` has them.

    Args:
        reference: the dtype of the autograd that scores are judged by.
        wheels: a folder to install peers from.
        report: called with the row of every contestant that has finished.
        save: called with all rows so far as soon as u2a_fast has passed, and after every contestant from then on.

    Raises:
        GateError: exact scores of u2a_fast, or the forward pass, are wrong, or the time was not enough for them.
    """
    assert task.recipe is not None
    case = f"{name}-{task.device}-{task.recipe.dtype}"
    home = folder / case
    home.mkdir(parents=True, exist_ok=True)
    task.save(home)
    entries = [Entry.of(c, len(task.examples), len(task.examples)) for c in contestants]
    unit, others = entries[0], entries[1:]
    with ExitStack() as stack:
        for entry in entries:
            stack.callback(entry.retire)
        waiting = _begun(entries, folder, home, limits, wheels)
        for _ in range(AHEAD):
            next(waiting, None)
        judge = partial(judge_entry, truth=truths(task, reference), half=task.recipe.dtype != "float32")
        _forget(task)
        _warm(unit, limits)
        rows: list[Row] = []
        for done, entry in enumerate(others, start=1):
            next(waiting, None)
            if not _spell(entry, unit, judge, limits):
                print(f"  out of time before {', '.join(e.contestant.name for e in others[done - 1 :])}", flush=True)
                break
            gate = _gate(others[:done], task.recipe.dtype, reference)
            rows = [
                make_device_row(case, task, e, gate) for e in [unit, *others[:done]] if e.error or e.times["seconds"]
            ]
            report(rows[-1])
            if not any(_gating(e) for e in others[done:]):
                if not gate:
                    raise GateError("no exact mode of u2a_fast gave scores")
                save(rows)
    if not any(_gating(e) and e.judged for e in others) or any(_gating(e) for e in others[len(rows) - 1 :]):
        raise GateError("the time was not enough for exact scores of u2a_fast")
    report(rows[0])
    return rows


def _begun(entries: Sequence[Entry], folder: Path, home: Path, limits: Limits, wheels: Path | None) -> Iterator[Entry]:
    """Environments made; then every entry as its process is begun, which imports and waits."""
    names = sorted({entry.contestant.environment for entry in entries})
    with ThreadPoolExecutor(len(names)) as pool:
        environments = dict(zip(names, pool.map(lambda name: prepare(name, folder, wheels), names), strict=True))
    for entry in entries:
        environment = environments[entry.contestant.environment]
        begin(entry, environment, home, threads=limits.threads, patience=limits.patience)
        yield entry


def _forget(task: Task) -> None:
    """Give the device's memory back: from here on only the other processes need it."""
    task.model.to("meta")
    task.direction.clear()
    gc.collect()
    if task.device != "cpu":
        torch.cuda.empty_cache()


def _ask(entry: Entry, limits: Limits) -> dict[str, Any] | None:
    """A run over all examples; None where there is no process or it failed, which retires it."""
    if entry.worker is None:
        return None
    entry.worker.patience = limits.answer()
    return turn(entry, entry.count)


def _load(entry: Entry, limits: Limits) -> None:
    if entry.worker is not None:
        entry.worker.patience = limits.answer(imports=True)
        load(entry)


def _warm(unit: Entry, limits: Limits) -> None:
    _load(unit, limits)
    for _ in range(2):
        if _ask(unit, limits) is None:
            raise GateError(f"the forward pass failed: {unit.error}")


def _spell(entry: Entry, unit: Entry, judge: Callable[[Entry, list[float]], None], limits: Limits) -> bool:
    """A contestant's time on the device; False where the time of all ran out over it, and it has no result."""
    if limits.left() <= 0:
        return False
    try:
        _load(entry, limits)
        answer = _ask(entry, limits)
        if answer is not None:
            judge(entry, answer["scores"])
            _turns(entry, unit, limits)
    finally:
        entry.retire()
    return bool(entry.times["seconds"]) or (entry.error is not None and limits.left() > 0)


def _turns(entry: Entry, unit: Entry, limits: Limits) -> None:
    """Turns of a contestant and the forward pass, in reversed order every second time."""
    end = min(time.monotonic() + limits.spell, limits.until)
    for number in range(min(limits.rounds, entry.contestant.rounds)):
        if entry.worker is None or time.monotonic() > end:
            return
        pair = (entry, unit) if number % 2 == 0 else (unit, entry)
        answers = {e.contestant.name: _ask(e, limits) for e in pair}
        forward, own = answers[unit.contestant.name], answers[entry.contestant.name]
        if forward is None and limits.left() > 0:
            raise GateError(f"the forward pass failed: {unit.error}")
        if forward is None or own is None:
            return
        for clock in CLOCKS:
            for e, answer in ((entry, own), (unit, forward)):
                e.times[clock].append(answer[clock])
                e.units[clock].append(forward[clock])


def _gating(entry: Entry) -> bool:
    return entry.contestant.ours and entry.contestant.exact


def _gate(entries: Sequence[Entry], dtype: str, reference: torch.dtype) -> str:
    """What the exact scores of u2a_fast were worth; nothing where there are none."""
    half = dtype != "float32"
    errors = [e.judged["norm_error" if half else "relative_error"] for e in entries if _gating(e) and e.judged]
    if not errors:
        return ""
    kind = "of their norm" if half else "(relative)"
    precision = str(reference).removeprefix("torch.")
    return f"exact {dtype} scores of u2a_fast within {max(errors):.1e} {kind} of {precision} autograd in this run"


def make_device_row(case: str, task: Task, entry: Entry, gate: str) -> Row:
    """The row of an entry, with the examples of its batch where the batch was left to us."""
    assert task.recipe is not None
    own = entry.contestant
    batch = None if own.ours else 1 if own.mode == "public" else entry.batch
    return make_peer_row(case, task, entry, gate, device=task.device, dtype=task.recipe.dtype, batch=batch)
