"""The few statistics that reports are made of, on NumPy arrays."""

from collections.abc import Callable

import numpy as np

__all__ = ["auc", "bootstrap_interval", "ranks", "spearman"]


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs, (n) -> (n) float64."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of two arrays (n), ties by mean ranks; NaN where either is constant or has a NaN, or n < 2."""
    if len(x) < 2 or np.isnan(x).any() or np.isnan(y).any() or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a random member of ``positive`` exceeds one of ``negative``, ties half.

    NaN if one is empty or has a NaN.
    """
    n, m = len(positive), len(negative)
    if not n or not m or np.isnan(positive).any() or np.isnan(negative).any():
        return float("nan")
    above = ranks(np.concatenate([positive, negative]))[:n].sum() - n * (n - 1) / 2
    return float(above / (n * m))


def bootstrap_interval(
    statistic: Callable[..., float], *samples: np.ndarray, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of ``statistic(*samples)``, rows of all samples resampled together.

    Args:
        statistic: takes arrays of the samples' shapes; resamples on which it is NaN are left out.
        samples: arrays that share their first axis (n).
        level: coverage, 0.95 for a 95 % interval.

    Returns:
        (low, high); NaN twice where no resample gave a number.
    """
    rng = np.random.default_rng(seed)
    n = len(samples[0])
    draws = (rng.integers(n, size=n) for _ in range(resamples if n else 0))
    values = np.array([statistic(*(sample[draw] for sample in samples)) for draw in draws])
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
