"""Does the preference signal generalize? Where two halves of the preference set disagree, no score can be trusted."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from torch import Tensor

from u2a_fast.data.packing import Example
from u2a_fast.influence.objectives import Objective
from u2a_fast.influence.routes import directional_derivatives
from u2a_fast.influence.scorer import InfluenceScorer
from u2a_fast.models.memory import TokenBudget
from u2a_fast.statistics import bootstrap_interval, spearman

__all__ = ["SignalReport", "check_rows", "signal_check"]

_LEAST_ROWS = 4  # halves of two have a spread


@dataclass(frozen=True)
class SignalReport:
    """Agreement of two random halves of the preference set.

    Attributes:
        cosine: of the objective's gradients on the halves; cosine_ci: its 95 % interval over preference rows.
        spearman: of the scores that the halves give the sampled negatives; spearman_ci: its 95 % interval over them.
        pairs, negatives: rows that each stands on.
        generalizes: the whole of cosine_ci lies above zero.
        warning: what to tell the user where it does not, else None.
    """

    cosine: float
    cosine_ci: tuple[float, float]
    spearman: float
    spearman_ci: tuple[float, float]
    pairs: int
    negatives: int
    generalizes: bool
    warning: str | None

    def to_dict(self) -> dict[str, Any]:
        """The attributes, as signal.json has them."""
        return asdict(self)


def _dot(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    return sum((x[name].double() * y[name].double()).sum().item() for name in x)


def _derivatives(
    scorer: InfluenceScorer,
    directions: list[dict[str, Tensor]],
    examples: Sequence[Example],
    reduction: str,
    budget: TokenBudget,
) -> Tensor:
    """<direction_k, grad NLL_i>, (K, B) float64 on the host, in the scorer's precision and batches."""
    found = directional_derivatives(
        scorer.model,
        examples,
        directions,
        reduction=reduction,
        token_budget=budget,
        dtype=scorer.dtype,
    )
    return found.double().cpu()


def _row_derivatives(
    scorer: InfluenceScorer, half: Objective, direction: dict[str, Tensor], budget: TokenBudget
) -> np.ndarray:
    """<direction, grad of row loss> for every row of ``half``; their mean is <direction, grad of half>."""
    coefficients = half.coefficients(half.logprobs(scorer.model, token_budget=budget)).double().cpu()
    nll = _derivatives(scorer, [direction], half.sequences(), half.reduction, budget)[0]
    return -(coefficients * nll.view_as(coefficients)).sum(1).numpy()


def check_rows(rows: Sequence[Any]) -> None:
    """Raise ValueError where a preference set has too few rows for halves with a spread."""
    if len(rows) < _LEAST_ROWS:
        raise ValueError(f"[signal_check] expected at least {_LEAST_ROWS} preference rows, got {len(rows)}")


def signal_check(scorer: InfluenceScorer, negatives: Sequence[Example], *, seed: int = 0) -> SignalReport:
    """Compare what two random halves of the preference set ask for, before any scoring.

    The inner product of the halves' gradients is the mean over rows j of one half of <gradient of the other half,
    gradient of row j>; its variance adds both halves' variances over rows (two-sample delta method, norms held fixed).

    Args:
        scorer: its objective is prepared if it was not yet; it is left as it was otherwise, its curvature too.
        negatives: a random sample, at least two token examples (a few hundred serve).
        seed: of the halves and of the bootstrap over negatives.

    Returns:
        A report; ``warning`` says plainly that scores will not generalize where the cosine cannot be told from zero.

    Raises:
        ValueError: the preference set has fewer than 4 rows, too few for halves with a spread.
    """
    check_rows(scorer.objective.rows)
    # What is found here is forgotten, so that a resumed run, which skips this check, finds what the first run found.
    budget = scorer.budget.apart()
    objective = scorer.objective.prepare(scorer.model, token_budget=budget)
    halves = objective.split(0.5, seed)
    gradients = [half.gradient(scorer.model, scorer.names, token_budget=budget) for half in halves]
    across = [_row_derivatives(scorer, halves[i], gradients[1 - i], budget) for i in (0, 1)]
    norm = float(np.sqrt(_dot(gradients[0], gradients[0]) * _dot(gradients[1], gradients[1])))
    cosine = _dot(gradients[0], gradients[1]) / norm if norm > 0 else float("nan")
    error = float(np.sqrt(sum(rows.var(ddof=1) / len(rows) for rows in across))) / norm if norm > 0 else float("nan")
    margin = NormalDist().inv_cdf(0.975) * error

    with scorer.curvature_of(negatives):
        directions = [scorer.solve(gradient) for gradient in gradients]
    scores = _derivatives(scorer, directions, negatives, scorer.reduction, budget).numpy()
    scores = scores[:, ~np.isnan(scores).all(axis=0)]  # without those that do not fit in memory
    generalizes = cosine - margin > 0
    return SignalReport(
        cosine=cosine,
        cosine_ci=(cosine - margin, cosine + margin),
        spearman=spearman(scores[0], scores[1]),
        spearman_ci=bootstrap_interval(spearman, scores[0], scores[1], seed=seed),
        pairs=len(objective.rows),
        negatives=scores.shape[1],
        generalizes=generalizes,
        warning=None if generalizes else _warning(cosine, margin, len(objective.rows)),
    )


def _warning(cosine: float, margin: float, pairs: int) -> str:
    return (
        f"the gradients of two random halves of the {pairs} preference rows have cosine {cosine:.3f} +- {margin:.3f}, "
        "which cannot be told from zero (or lies below it): scores from this preference set will raise performance on "
        "the set itself and will not generalize to other prompts; use more preference rows, or rows closer to the "
        "negatives"
    )
