"""Exact scores for the negatives that need them: a certified top k, and a shortlist whose recall is measured."""

from collections.abc import Callable, Collection
from math import ceil, sqrt
from statistics import NormalDist

import numpy as np
import torch

__all__ = [
    "Exact",
    "best",
    "certify",
    "check_certifiable",
    "check_k",
    "listed_positions",
    "recall_of_shortlist",
    "shortlist_positions",
    "unlisted_sample",
]

Exact = Callable[[np.ndarray], np.ndarray]  # positions (m) -> exact scores (m)

_CHUNK = 64  # negatives rescored at a time, enough to fill a batch
_SAMPLE = 256  # negatives outside of the shortlist that recall is measured on, at least


def check_k(k: int, candidates: int | None = None) -> None:
    """Raise ValueError for a k below 1, or fewer candidates than that."""
    if k < 1:
        raise ValueError(f"[topk] expected k of at least 1, got {k}")
    if candidates is not None and candidates < k:
        raise ValueError(f"[topk] expected at least as many candidates as k = {k}, got {candidates}")


def check_certifiable(dtypes: Collection[torch.dtype]) -> None:
    """Raise ValueError where a pass computes in a precision whose rounding no bound covers."""
    if narrow := [dtype for dtype in dtypes if dtype not in (torch.float32, torch.float64)]:
        raise ValueError(
            f"[topk] expected float32 or float64 for a certificate, got {narrow[0]}: pass dtype=torch.float32 to the "
            "scorer (and load a quantized base with that compute dtype), or certified=False"
        )


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest scores, best first; NaN last, equal scores in the order given."""
    key = np.where(np.isnan(scores), -np.inf, scores)
    return np.lexsort((np.arange(len(key)), np.isnan(scores), -key))[:k]


def certify(approximate: np.ndarray, bound: np.ndarray, exact: Exact, k: int) -> tuple[np.ndarray, np.ma.MaskedArray]:
    """Find the k best by exact score, where |exact - approximate| <= bound.

    Candidates are rescored in the order of their upper bounds until the k-th best exact score lies above the upper
    bound of every other. A bound or an approximation that is not finite promises nothing, so it is rescored.

    Args:
        approximate: (n) scores.
        bound: (n), at least the error of each.
        exact: scores positions exactly.
        k: how many are wanted.

    Returns:
        (min(k, n)) positions, best first as ``best`` orders them; (n) exact scores, masked where none was asked for.
    """
    n, k = len(approximate), min(k, len(approximate))
    promised = np.isfinite(approximate) & np.isfinite(bound)
    upper = np.where(promised, approximate + bound, np.inf)
    lower = np.where(promised, approximate - bound, -np.inf)  # of what is known: the score itself
    order = np.lexsort((np.arange(n), -upper))
    found = np.ma.masked_all(n, dtype=np.float64)
    done = 0
    while done < n:
        threshold = np.partition(lower, n - k)[n - k]
        reaching = int((upper[order[done:]] >= threshold).sum())
        if not reaching:
            break
        chunk = order[done : done + min(reaching, max(k, _CHUNK))]
        found[chunk] = exact(chunk)
        lower[chunk] = np.where(np.isnan(found.data[chunk]), -np.inf, found.data[chunk])
        done += len(chunk)
    known = np.flatnonzero(~np.ma.getmaskarray(found))
    return known[best(found.data[known], k)], found


def shortlist_positions(approximate: np.ndarray, fraction: float) -> np.ndarray:
    """The best ``fraction`` by approximate score, rounded up, and those without a finite one; increasing positions."""
    return listed_positions(approximate, ceil(fraction * len(approximate)))


def listed_positions(approximate: np.ndarray, count: int) -> np.ndarray:
    """The best ``count`` by approximate score and those without a finite one, increasing positions."""
    unknown = ~np.isfinite(approximate)
    listed = best(np.where(unknown, -np.inf, approximate), count)
    return np.union1d(listed, np.flatnonzero(unknown))


def unlisted_sample(n: int, listed: np.ndarray, seed: int = 0) -> np.ndarray:
    """A uniform sample of the positions that are not listed: a quarter as many as are, 256 at least."""
    others = np.setdiff1d(np.arange(n), listed)
    size = min(len(others), max(_SAMPLE, len(listed) // 4))
    return np.sort(np.random.default_rng(seed).choice(others, size, replace=False))


def recall_of_shortlist(listed: np.ndarray, sampled: np.ndarray, others: int) -> tuple[float, tuple[float, float]]:
    """Of all negatives that score as high as the shortlist's better half, the share that the shortlist holds.

    With tau the median of the shortlist's exact scores, k of them at least tau, and a share p of the others at least
    tau, that is k / (k + p others); p is estimated from the sample, with Wilson's interval (1927).

    Args:
        listed: exact scores of the shortlist; sampled: of a uniform sample of the others.
        others: how many are not listed.

    Returns:
        The recall, and its 95 % interval; without others 1.
    """
    listed = listed[~np.isnan(listed)]
    if others == 0 or not len(listed):
        return 1.0, (1.0, 1.0)
    threshold = np.median(listed)
    k, m = int((listed >= threshold).sum()), len(sampled)
    p, z = float((sampled >= threshold).mean()), NormalDist().inv_cdf(0.975)
    center, width = p + z * z / (2 * m), z * sqrt(p * (1 - p) / m + z * z / (4 * m * m))
    low, high = ((center + sign * width) / (1 + z * z / m) for sign in (-1, 1))
    if m == others:
        low = high = p
    recall, worst, most = (k / (k + share * others) for share in (p, max(high, p), min(max(low, 0.0), p)))
    return recall, (worst, most)
