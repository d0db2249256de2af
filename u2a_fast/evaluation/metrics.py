"""What a run of unlearning is judged by: preference on pairs, forgetting on negatives, utility on positives.

Intervals are percentile bootstraps over rows (95 %): they say how far other rows of the same sort could move the
figure, not how far another training run could.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch import nn

from u2a_fast.data.packing import Example
from u2a_fast.influence.derivatives import as_budget
from u2a_fast.influence.objectives import DPO, SFT
from u2a_fast.models.memory import TokenBudget
from u2a_fast.statistics import bootstrap_interval

__all__ = ["evaluate", "mean_nll"]

Row = Mapping[str, Any]

_WINDOW = 2048  # rows held at once, so that a stream of negatives costs its figures alone


def evaluate(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    preferences: Sequence[Row] | None = None,
    negatives: Iterable[Row] | None = None,
    positives: Iterable[Row] | None = None,
    reference: nn.Module | None = None,
    beta: float = 0.1,
    token_budget: int | TokenBudget | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a model on whatever sets are given.

    Args:
        model: a transformers causal LM or a PEFT model around one.
        tokenizer: unused for token examples; accepted so that callers may pass model and tokenizer as they were loaded.
        preferences: rows with token examples ``chosen`` and ``rejected``.
        negatives, positives: token examples, or rows that hold one as ``example``; read once, never held.
        reference: the model before unlearning; without it the implicit reward has nothing to be measured against, and
            the DPO figures and the rises are left out.
        beta: DPO's inverse temperature, 1/nats.
        token_budget: most tokens a batch.
        seed: of the bootstrap.

    Returns:
        A mapping that JSON can hold, with a part for each set given: ``preference`` (``pairs``; ``logprob_accuracy``,
        the share of pairs whose chosen answer is likelier; with a reference also ``loss`` in nats,
        ``reward_accuracy``, ties counting half, and ``reward_margin``), ``forgetting`` and ``utility`` (``rows``,
        ``tokens``, ``nll``, the mean over rows of the NLL in nats a token, ``perplexity`` exp(nll); with a reference
        also ``nll_rise``). Every figure ``x`` comes with its interval ``x_ci``. Figures that are not finite stay so,
        and ``nonfinite`` counts the rows at fault.

    Raises:
        ValueError: no set was given, or one of them is empty.
    """
    if preferences is None and negatives is None and positives is None:
        raise ValueError("[evaluate] expected preferences, negatives or positives, got none of them")
    token_budget = as_budget(token_budget, next(model.parameters()).device)
    out: dict[str, Any] = {}
    if preferences is not None:
        out["preference"] = _preference(model, reference, preferences, beta, token_budget, seed)
    for name, rows in (("forgetting", negatives), ("utility", positives)):
        if rows is not None:
            out[name] = _likelihood(model, reference, rows, token_budget, seed, name)
    return out


def mean_nll(
    model: nn.Module, examples: Sequence[Example], *, token_budget: int | TokenBudget | None = None
) -> np.ndarray:
    """NLL of every token example in nats a scored token, (n) float64; NaN where one does not fit in memory."""
    rows = SFT([{"example": example} for example in examples], reduction="mean")
    return -rows.logprobs_that_fit(model, token_budget=token_budget)[:, 0].double().cpu().numpy()


def _with_interval(name: str, values: np.ndarray, seed: int) -> dict[str, Any]:
    """The mean of a row-wise figure and its interval."""
    return {name: float(values.mean()), f"{name}_ci": list(bootstrap_interval(np.mean, values, seed=seed))}


def _share(margins: np.ndarray) -> np.ndarray:
    """1 where the margin is positive, 0 where negative, 1/2 at a tie; NaN stays NaN."""
    return np.where(np.isnan(margins), np.nan, (np.sign(margins) + 1) / 2)


def _preference(
    model: nn.Module,
    reference: nn.Module | None,
    pairs: Sequence[Row],
    beta: float,
    token_budget: int | TokenBudget | None,
    seed: int,
) -> dict[str, Any]:
    objective = DPO(pairs, beta=beta)
    logprobs = objective.logprobs(model, token_budget=token_budget).cpu()
    margins = (logprobs[:, 0] - logprobs[:, 1]).double().numpy()
    out: dict[str, Any] = {"pairs": len(pairs), "nonfinite": int((~np.isfinite(margins)).sum())}
    out |= _with_interval("logprob_accuracy", _share(margins), seed)
    if reference is not None:
        objective.prepare(reference, token_budget=token_budget)
        rewards = objective.margins(logprobs).double().numpy()
        out |= _with_interval("loss", objective.row_losses(logprobs).double().numpy(), seed)
        out |= _with_interval("reward_accuracy", _share(rewards), seed)
        out |= _with_interval("reward_margin", rewards, seed)
    return out


def _windows(rows: Iterable[Row]) -> Iterator[list[Example]]:
    iterator = iter(rows)
    while window := [row.get("example", row) for row in islice(iterator, _WINDOW)]:
        yield window


def _likelihood(
    model: nn.Module,
    reference: nn.Module | None,
    rows: Iterable[Row],
    token_budget: int | TokenBudget | None,
    seed: int,
    name: str,
) -> dict[str, Any]:
    now: list[np.ndarray] = []
    before: list[np.ndarray] = []
    tokens = 0
    for window in _windows(rows):
        now.append(mean_nll(model, window, token_budget=token_budget))
        tokens += sum(label != -100 for example in window for label in example["labels"][1:])
        if reference is not None:
            before.append(mean_nll(reference, window, token_budget=token_budget))
    if not now:
        raise ValueError(f"[evaluate] expected at least one row for {name}, got none")
    nll = np.concatenate(now)
    out: dict[str, Any] = {"rows": len(nll), "tokens": tokens, "nonfinite": int((~np.isfinite(nll)).sum())}
    out |= _with_interval("nll", nll, seed)
    out["perplexity"] = _exp(out["nll"])
    out["perplexity_ci"] = [_exp(end) for end in out["nll_ci"]]
    if before:
        out |= _with_interval("nll_rise", nll - np.concatenate(before), seed)
    return out


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf  # exp(710) overflows a double
