"""What a run measures of itself on a few of its own negatives: 16 bits against float32, the price of equal bits."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from u2a_fast.data.packing import Example
from u2a_fast.influence.routes import BatchPass, run_batches
from u2a_fast.influence.scores import Scores
from u2a_fast.models.memory import Room, TokenBudget, is_out_of_memory
from u2a_fast.statistics import spearman

if TYPE_CHECKING:
    from u2a_fast.influence.modes import Rows, Run

__all__ = ["LEAST_RANKED", "against_float32", "checked", "invariance_cost", "ranked"]

LEAST_RANKED = 8  # negatives from which on a rank correlation says something
FLOAT32_MOST = 64  # negatives of a sample
FLOAT32_SHARE = 20  # of the negatives at most, where there are many: a float32 score costs four of 16 bits
TIMED_MOST = 64  # negatives timed, enough to fill a batch or two
TIMED_SHARE = 50  # of the negatives at most, where there are many: each is run three times both ways
TIMED_ROUNDS = 3

Evaluate = Callable[[np.ndarray], np.ndarray]  # positions (m) -> scores (m)


def against_float32(scored: np.ndarray, narrow: Evaluate, wide: Evaluate, n: int) -> dict[str, Any]:
    """The report's ``float32_spearman``, or a ``note`` that says why there is none.

    Scores that are NaN are left out; they are counted elsewhere.

    Args:
        scored: positions that have a score in 16 bits; the sample is drawn from these, and beside them from the others
            where they are too few to be ranked.
        narrow: scores in 16 bits, wide: in float32, of given positions.
        n: negatives in all.
    """
    if n < LEAST_RANKED:
        return {"note": f"fewer than {LEAST_RANKED} negatives: their ranks in 16 bits were not held against float32"}
    rng = np.random.default_rng(0)
    if len(scored) < LEAST_RANKED:
        others = rng.permutation(np.setdiff1d(np.arange(n), scored))
        scored = np.concatenate([scored, others[: LEAST_RANKED - len(scored)]])
    size = min(len(scored), max(LEAST_RANKED, min(FLOAT32_MOST, n // FLOAT32_SHARE)))
    sample = np.sort(rng.choice(scored, size, replace=False))
    try:
        both = np.stack([narrow(sample), wide(sample)])
        return {"float32_spearman": spearman(*both[:, ~np.isnan(both).any(0)])}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"note": "no sample was scored in float32: it did not fit in memory"}


def invariance_cost(passes: BatchPass, items: Sequence[Example], alone: TokenBudget, together: TokenBudget) -> float:
    """How many times as long ``passes`` takes with the first budget, one example at a time, as with the second.

    Median of a few rounds in alternation on neighbours of ``items`` (n >= 1), so that prompts are shared as they are
    among all. The negatives timed are run apart from those scored: nothing of a score depends on it.
    """
    n = len(items)
    size = min(n, max(LEAST_RANKED, min(TIMED_MOST, n // TIMED_SHARE)))
    first = int(np.random.default_rng(0).integers(n - size + 1))
    some = items[first : first + size]
    ratios = []
    with passes.running(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory, which the scores themselves have met or will
        for _ in range(TIMED_ROUNDS):
            one_by_one, batched = (_seconds(passes, some, budget) for budget in (alone, together))
            ratios.append(one_by_one / batched)
    return median(ratios)


def checked(
    run: "Run", found: Scores, passes: BatchPass, scored: np.ndarray, narrow: Evaluate, *, once: bool = False
) -> Scores:
    """``found``, its report with what is measured on samples: 16 bits against float32, the price of equal bits.

    ``scored``, ``narrow``: as ``against_float32`` takes them. ``passes`` saw all negatives. ``once``: a scorer, so that
    windows after the first cost nothing.
    """
    assert found.report is not None
    n, measured, make = len(run.items), {}, run.float32
    if make is not None and (not once or "float32" not in run.memo):
        measured = against_float32(
            scored, narrow, lambda sample: run.evaluate(make(), sample, "float32 sample").score, n
        )
        if once and n >= LEAST_RANKED:
            run.memo["float32"] = measured
    elif make is not None:
        measured = run.memo["float32"]
    notes = [note for note in (found.report.note, measured.get("note")) if note]
    measured = measured | ({"note": "; ".join(notes)} if notes else {})
    if run.batched_budget is not None and n:
        if "invariance" not in run.memo:
            together = TokenBudget(run.batched_budget)
            run.memo["invariance"] = invariance_cost(passes, run.items, run.budget.apart(), together)
        measured |= {"batch_invariant_cost": run.memo["invariance"]}
    return replace(found, report=replace(found.report, token_budget=dict(run.budget.found), **measured))


def ranked(run: "Run", found: Scores, passes: BatchPass, rows: "Rows", scored: np.ndarray) -> Scores:
    """``checked`` for the best of the rows, of which those at ``scored`` are exact."""

    def narrow(sample: np.ndarray) -> np.ndarray:
        if len(unknown := np.setdiff1d(sample, scored)):
            run.rescore(rows, unknown)
        return rows.score[sample]

    return checked(run, found, passes, np.sort(scored), narrow)


def _seconds(passes: BatchPass, items: Sequence[Example], budget: TokenBudget) -> float:
    device = passes.decoder.device

    def attempt(room: Room) -> None:
        for _ in run_batches(passes, items, room):
            pass

    _wait(device)
    begin = perf_counter()
    budget.fit(passes.kind, attempt)
    _wait(device)
    return perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
