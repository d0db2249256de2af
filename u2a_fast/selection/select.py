"""Which negatives to unlearn, and how strongly."""

from dataclasses import dataclass
from math import isnan
from typing import Protocol

import numpy as np

from u2a_fast.selection.weights import (
    WeightUpdate,
    effective_sample_size,
    exponentiated_gradient,
    released_exponentiated_gradient,
)

__all__ = ["STRATEGIES", "WEIGHTS", "Selection", "select"]

STRATEGIES = ("top-k", "threshold", "budget", "as-released")
WEIGHTS = ("uniform", "eg", "eg-released")


class ScoreTable(Protocol):
    """What ``select`` reads: one row a negative, as ``InfluenceScorer.score`` returns."""

    @property
    def id(self) -> np.ndarray: ...
    @property
    def score(self) -> np.ndarray: ...
    @property
    def tokens(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Selection:
    """The chosen negatives, highest gain first, ties in the order of the scores.

    Attributes:
        index: (n) int64 positions in the scores.
        id: (n) their ids.
        score: (n) their gains s_i.
        weight: (n) unlearning weights of mean 1.
        dropped_nonfinite: negatives left out because their score is NaN or infinite.
        dropped_approximate: negatives left out because their score is an approximation and others' are exact.
        dropped_unfit: negatives left out because they have no score: they did not fit in memory even alone.
        temper: factor on the log-weights that the floor of the effective sample size asked for (1: none).
    """

    index: np.ndarray
    id: np.ndarray
    score: np.ndarray
    weight: np.ndarray
    dropped_nonfinite: int = 0
    temper: float = 1.0
    dropped_approximate: int = 0
    dropped_unfit: int = 0

    def __len__(self) -> int:
        return len(self.index)

    @property
    def effective_sample_size(self) -> float:
        """(sum w)^2 / sum w^2, in examples."""
        return effective_sample_size(self.weight)


def _check_count(name: str, value: int | None, strategy: str) -> int:
    if value is None or value < 1:
        raise ValueError(f"[select] expected {name} >= 1 for strategy {strategy!r}, got {value}")
    return value


def _greedy(order: np.ndarray, tokens: np.ndarray, room: int) -> list[int]:
    taken = []
    for i in order:
        if tokens[i] <= room:
            taken.append(int(i))
            room -= int(tokens[i])
    return taken


def _within_budget(score: np.ndarray, tokens: np.ndarray, budget: int) -> np.ndarray:
    """Positions of high total gain within ``budget`` tokens: greedy by gain per token, or the best single first.

    Gain per token is the fractional knapsack's optimal order; the better of that and of the best single example (filled
    up in the same order) reaches at least half of the best possible total (Dantzig 1957; Lai 2006).
    """
    order = np.argsort(-score / tokens, kind="stable")
    dense = _greedy(order, tokens, budget)
    fits = np.flatnonzero(tokens <= budget)
    if not len(fits):
        return fits
    best = fits[np.argmax(score[fits])]
    led = [int(best), *_greedy(order[order != best], tokens, budget - int(tokens[best]))]
    return np.array(max((dense, led), key=lambda taken: score[taken].sum()), dtype=np.int64)


def _choose(
    score: np.ndarray, tokens: np.ndarray, strategy: str, k: int | None, threshold: float | None, budget: int | None
) -> np.ndarray:
    """Positions, highest score first; everything but "as-released" wants a positive gain."""
    ranked = np.argsort(-score, kind="stable")
    if strategy == "as-released":
        return ranked[: _check_count("k", k, strategy)]
    positive = ranked[score[ranked] > 0]
    if strategy == "top-k":
        return positive[: _check_count("k", k, strategy)]
    if strategy == "threshold":
        bound = 0.0 if threshold is None else threshold
        if isnan(bound):
            raise ValueError(f"[select] expected a number as threshold, got {threshold}")
        return ranked[score[ranked] > bound]
    chosen = _within_budget(score[positive], tokens[positive], _check_count("token_budget", budget, strategy))
    return positive[np.sort(chosen)]


def _weigh(
    score: np.ndarray, weights: str, eta: float | None, transform: str, clip: float, min_ess: float, cap: float | None
) -> WeightUpdate:
    start = np.ones(len(score))
    if weights == "uniform":
        return WeightUpdate(start, float(len(score)), 1.0)
    if weights == "eg-released":
        return released_exponentiated_gradient(start, score, eta=0.01 if eta is None else eta)
    step = 1.0 if eta is None else eta
    return exponentiated_gradient(start, score, eta=step, transform=transform, clip=clip, min_ess=min_ess, cap=cap)


def _comparable(scores: ScoreTable, count: int, approximate: str) -> np.ndarray:
    """Positions whose scores are of one kind: the exact ones where there are any, unless all are to be kept."""
    exact = getattr(scores, "exact", None)
    if approximate == "keep" or exact is None or not np.any(exact):
        return np.arange(count)
    return np.flatnonzero(exact)


def _fitting(scores: ScoreTable, positions: np.ndarray) -> np.ndarray:
    """Which of the positions have a score, as far as memory goes, (m) bool."""
    fits = getattr(scores, "fits", None)
    return np.ones(len(positions), dtype=bool) if fits is None else np.asarray(fits, dtype=bool)[positions]


def select(
    scores: ScoreTable,
    *,
    strategy: str = "top-k",
    k: int | None = None,
    threshold: float | None = None,
    token_budget: int | None = None,
    weights: str = "uniform",
    eta: float | None = None,
    transform: str = "rank",
    clip: float = 0.05,
    min_ess: float = 0.5,
    cap: float | None = None,
    nonfinite: str = "error",
    approximate: str = "drop",
) -> Selection:
    """Choose negatives by gain and weigh them.

    Args:
        scores: table with ``id``, ``score`` (gain, positive: unlearning helps) and ``tokens``; where it has ``exact``,
            False marks approximations, and where it has ``fits``, False marks those that did not fit in memory even
            alone. They have no score, are left out whatever ``nonfinite`` says, and counted.
        strategy: ``"top-k"`` (the k highest positive gains), ``"threshold"`` (gains above ``threshold``), ``"budget"``
            (high total gain within ``token_budget`` scored tokens, from positive gains, greedy by gain per token) or
            ``"as-released"`` (the k highest, positive or not: the public U2A release).
        k: most examples, for ``"top-k"`` and ``"as-released"``.
        threshold: strict lower bound of the gain; None: 0. A negative one takes examples whose unlearning hurts.
        token_budget: most scored tokens in all, for ``"budget"``.
        weights: ``"uniform"``, ``"eg"`` (one ``exponentiated_gradient`` step from equal weights) or ``"eg-released"``
            (the release's step, of the wrong sign: a baseline).
        eta: step size of the weights; None: 1 for ``"eg"``, 0.01 for ``"eg-released"``.
        transform, clip, min_ess, cap: as ``exponentiated_gradient`` takes them, for ``"eg"``.
        nonfinite: what a NaN or infinite score does: ``"error"``, or ``"drop"`` that negative and count it.
        approximate: what approximations beside exact scores (of a shortlist) do: ``"drop"`` them and count them, or
            ``"keep"``. The largest of many approximations are too large, those rescored are not, so a common ranking
            would prefer what is known least. Where no score is exact, they are ranked among themselves.

    Raises:
        ValueError: an argument is out of its range, a score is not finite, or nothing qualifies.
    """
    for name, value, known in (("strategy", strategy, STRATEGIES), ("weights", weights, WEIGHTS)):
        if value not in known:
            raise ValueError(f"[select] expected {name} out of {list(known)}, got {value!r}")
    if nonfinite not in ("error", "drop"):
        raise ValueError(f'[select] expected nonfinite "error" or "drop", got {nonfinite!r}')
    if approximate not in ("drop", "keep"):
        raise ValueError(f'[select] expected approximate "drop" or "keep", got {approximate!r}')
    score = np.asarray(scores.score, dtype=np.float64)
    comparable = _comparable(scores, len(score), approximate)
    usable = comparable[_fitting(scores, comparable)]
    finite = usable[np.isfinite(score[usable])]
    dropped = len(usable) - len(finite)
    if dropped and nonfinite == "error":
        first = scores.id[usable[~np.isfinite(score[usable])][0]]
        raise ValueError(
            f"[select] expected finite scores, {dropped} of {len(usable)} are not (first: id {first!r}); "
            'nonfinite="drop" leaves them out'
        )
    tokens = np.asarray(scores.tokens, dtype=np.int64)[finite]
    if len(tokens) and tokens.min() < 1:
        raise ValueError(f"[select] expected tokens >= 1 for every negative, got {tokens.min()}")
    index = finite[_choose(score[finite], tokens, strategy, k, threshold, token_budget)]
    if not len(index):
        unfit = len(comparable) - len(usable)
        more = f" ({unfit} more have no score: they did not fit in memory)" if unfit else ""
        raise ValueError(
            f"[select] none of {len(usable)} negatives qualifies: no gain is large enough, or none fits{more}"
        )
    left_out = len(score) - len(comparable)
    update = _weigh(score[index], weights, eta, transform, clip, min_ess, cap)
    return Selection(
        index,
        np.asarray(scores.id)[index],
        score[index],
        update.weight,
        dropped,
        update.temper,
        left_out,
        len(comparable) - len(usable),
    )
