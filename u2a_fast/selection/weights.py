"""Per-example unlearning weights: exponentiated gradient on the simplex, kept from collapsing onto a few examples.

The gain is s_i = -dL_PA/dw_i, so the mirror-descent step that lowers L_PA multiplies w_i by exp(+eta s_i). Raw gains
have outliers (short answers) that would take all the weight; they are ranked or winsorised first, and the effective
sample size has a floor.
"""

from dataclasses import dataclass

import numpy as np

from u2a_fast.statistics import ranks

__all__ = [
    "TRANSFORMS",
    "WeightUpdate",
    "effective_sample_size",
    "exponentiated_gradient",
    "released_exponentiated_gradient",
]

TRANSFORMS = ("rank", "clip")
_BISECTIONS = 60  # halvings of [0, 1]: below float64's resolution


@dataclass(frozen=True)
class WeightUpdate:
    """New weights (n) of mean 1, their effective sample size in examples, and the temper that its floor asked for.

    ``temper`` is 1 where the step was taken as asked, and less where log-weights had to be scaled down by it.
    """

    weight: np.ndarray
    effective_sample_size: float
    temper: float


def effective_sample_size(weights: np.ndarray) -> float:
    """(sum w)^2 / sum w^2 in examples (Kish 1965): n for equal weights, 1 where one example has them all."""
    w = np.asarray(weights, dtype=np.float64)
    if not len(w) or not w.any():
        return 0.0
    w = w / w.max()
    return float(w.sum() ** 2 / (w**2).sum())


def _standardized(scores: np.ndarray, transform: str, clip: float) -> np.ndarray:
    """Ranks or winsorised scores, centred, over their standard deviation; zeros where all are equal."""
    if transform == "rank":
        values = ranks(scores)
    else:
        # quantiles that are members of the sample, so that a finite sample never interpolates towards its outliers
        low = np.quantile(scores, clip, method="higher")
        high = np.quantile(scores, 1 - clip, method="lower")
        values = np.clip(scores, min(low, high), max(low, high))
    largest = np.abs(values).max()
    values = values / largest if largest > 0 else values
    spread = values.std()
    # equal values leave a spread of rounding errors alone
    if spread <= len(values) * np.finfo(np.float64).eps:
        return np.zeros_like(values)
    return (values - values.mean()) / spread


def _mean_one(log_weights: np.ndarray) -> np.ndarray:
    w = np.exp(log_weights - log_weights.max())
    return w * (len(w) / w.sum())


def _tempered(log_weights: np.ndarray, floor: float) -> tuple[np.ndarray, float]:
    """exp(t log w) of mean 1 with the largest t <= 1 whose effective sample size is at least ``floor`` examples.

    The effective sample size falls with t (it is the exponential of the tempered weights' collision entropy), so
    bisection finds that t; the feasible end is returned.
    """
    weights = _mean_one(log_weights)
    if effective_sample_size(weights) >= floor:
        return weights, 1.0
    low, high = 0.0, 1.0
    finite = np.isfinite(log_weights)
    best = finite * (len(log_weights) / finite.sum())
    for _ in range(_BISECTIONS):
        t = (low + high) / 2
        candidate = _mean_one(np.where(finite, t * log_weights, -np.inf))
        if effective_sample_size(candidate) >= floor:
            low, best = t, candidate
        else:
            high = t
    return best, low


def _capped(weights: np.ndarray, cap: float) -> np.ndarray:
    """min(cap, c w) with c such that the mean stays 1: the closest capped weights in Kullback-Leibler divergence."""
    order = np.argsort(-weights, kind="stable")
    ranked = weights[order]
    rest = np.cumsum(ranked[::-1])[::-1]
    for full in range(np.count_nonzero(weights)):
        scale = (len(weights) - full * cap) / rest[full]
        if scale * ranked[full] <= cap:
            out = scale * weights
            out[order[:full]] = cap
            return out
    return np.where(weights > 0, cap, 0.0)


def _check(weights: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w, s = np.asarray(weights, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if w.ndim != 1 or w.shape != s.shape or not len(w):
        raise ValueError(
            f"[exponentiated gradient] expected weights and scores of one shape (n), n > 0, got {w.shape}, {s.shape}"
        )
    if not np.isfinite(s).all():
        raise ValueError(f"[exponentiated gradient] expected finite scores, {int((~np.isfinite(s)).sum())} are not")
    if not np.isfinite(w).all() or (w < 0).any() or not w.any():
        raise ValueError("[exponentiated gradient] expected finite weights >= 0, not all 0")
    return w, s


def exponentiated_gradient(
    weights: np.ndarray,
    scores: np.ndarray,
    *,
    eta: float = 1.0,
    transform: str = "rank",
    clip: float = 0.05,
    sparsity: float = 0.0,
    min_ess: float = 0.5,
    cap: float | None = None,
) -> WeightUpdate:
    """w <- n * normalize(w * exp(+eta z - eta reg)), z the gains, ranked or winsorised, over their standard deviation.

    The sign is that of descent on L_PA (u2a_fast docs/unlearning.md). Where the effective sample size would fall below
    its floor, all log-weights are scaled down by one factor (from equal weights this is a smaller eta).

    Args:
        weights: (n) current weights, >= 0; a weight of 0 stays 0.
        scores: (n) finite gains s_i.
        eta: step size, in log-weight per standard deviation of z.
        transform: ``"rank"`` (z from the ranks of the gains) or ``"clip"`` (from gains winsorised at their quantiles).
        clip: fraction of the gains winsorised at each end by ``"clip"``, in [0, 0.5).
        sparsity: b of the regulariser b * sum_i sqrt(w_i), in standard deviations of z; reg_i = (b / 2) w_i^(-1/2).
        min_ess: floor of the effective sample size, as a fraction of the weights that are not 0, in [0, 1].
        cap: largest weight that is allowed, in multiples of the mean; None: no cap.

    Raises:
        ValueError: an argument is out of its range.
    """
    w, s = _check(weights, scores)
    support = int((w > 0).sum())
    if transform not in TRANSFORMS:
        raise ValueError(f"[exponentiated gradient] expected transform out of {list(TRANSFORMS)}, got {transform!r}")
    if not (eta >= 0 and sparsity >= 0 and 0 <= min_ess <= 1 and 0 <= clip < 0.5):
        raise ValueError(
            "[exponentiated gradient] expected eta >= 0, sparsity >= 0, 0 <= min_ess <= 1 and 0 <= clip < 0.5, got "
            f"eta={eta}, sparsity={sparsity}, min_ess={min_ess}, clip={clip}"
        )
    if cap is not None and not cap * support >= len(w):
        raise ValueError(
            f"[exponentiated gradient] expected cap >= {len(w) / support:g} (weights have mean 1), got {cap}"
        )
    w = w * (len(w) / w.sum())
    with np.errstate(divide="ignore"):
        log_w = np.log(w)
        penalty = np.where(w > 0, 0.5 * sparsity / np.sqrt(w), 0.0) if sparsity else 0.0
    step = eta * (_standardized(s, transform, clip) - penalty)
    new, temper = _tempered(log_w + step, min_ess * support)
    new = new if cap is None else _capped(new, cap)
    return WeightUpdate(new, effective_sample_size(new), temper)


def released_exponentiated_gradient(weights: np.ndarray, scores: np.ndarray, *, eta: float = 0.01) -> WeightUpdate:
    """w <- n * normalize(w * exp(-eta s)), the public U2A release's update: its sign raises L_PA. A baseline, no more.

    Gains are used as they come, without scaling, clipping or a floor, as there.
    """
    w, s = _check(weights, scores)
    with np.errstate(divide="ignore"):
        new = _mean_one(np.log(w) - eta * s)
    return WeightUpdate(new, effective_sample_size(new), 1.0)
