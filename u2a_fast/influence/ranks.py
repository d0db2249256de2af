"""Ranks for a certified top k: where the bound falls most for its cost, and whether the certificate pays at all."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["GRID", "Profile", "RankPlan", "exact_units", "plan_ranks"]

# Forward passes that an exact score takes on the CPU, by route (docs/benchmarks.md): less than the arithmetic's 3, as
# the head sees answers alone. A GPU is believed to take what the arithmetic says.
CPU_UNITS = {"forward": 2.2, "reverse": 2.5}
EXACT_UNITS = 3.0

GRID = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Profile:
    """One (O, I) weight on a sample of m negatives.

    Attributes:
        shape: (O, I).
        ranks: G increasing ranks.
        bounds: (G, m), how far truncation to each rank can move each score.
    """

    shape: tuple[int, int]
    ranks: tuple[int, ...]
    bounds: np.ndarray


@dataclass(frozen=True)
class RankPlan:
    """Ranks by parameter name (absent: exact), the units a negative expected of them, the share to be rescored.

    ``exact``: the units of an exact score. ``note``: why nothing is gained where the plan does not pay.
    """

    ranks: dict[str, int]
    units: float
    rescored: float
    exact: float = EXACT_UNITS
    note: str = "the bound would leave too many to rescore"

    @property
    def pays(self) -> bool:
        """Whether that is less than an exact score of everything."""
        return self.units < self.exact


def exact_units(route: str, device: str) -> float:
    """Forward passes that an exact score takes by that route ("forward", "reverse") on a type of device."""
    return CPU_UNITS[route] if device == "cpu" else EXACT_UNITS


def plan_ranks(
    profiles: Mapping[str, Profile], scores: np.ndarray, share: float, exact: float = EXACT_UNITS
) -> RankPlan:
    """The cheapest ranks by the cost model: 2 units and the contractions for all, ``exact`` for what is rescored.

    Weights start at their lowest rank and are raised along the lower convex hull of (cost, mean bound), steepest step
    first, up to exact ones; on that path the cheapest point is taken. What must be rescored is read off the sample:
    scores whose bound reaches the sample's own best ``share``.

    Args:
        profiles: by parameter name.
        scores: (m) of the sample.
        share: k / n of the top k that is wanted.
        exact: units of an exact score (``exact_units``).
    """
    whole = sum(p.shape[0] * p.shape[1] for p in profiles.values())
    threshold = np.quantile(scores, 1 - share)
    at = dict.fromkeys(profiles, 0)
    plans = []
    for name, index in [(None, 0), *_steps(profiles)]:
        if name is not None:
            at[name] = index
        bound = sum((p.bounds[at[n]] for n, p in profiles.items() if at[n] < len(p.ranks)), np.zeros(len(scores)))
        rescored = max(share, float((scores + bound >= threshold).mean()))
        units = 2 + sum(_cost(p, at[n]) for n, p in profiles.items()) / max(whole, 1) + exact * rescored
        ranks = {n: p.ranks[at[n]] for n, p in profiles.items() if at[n] < len(p.ranks)}
        plans.append(RankPlan(ranks, units, rescored, exact))
    return min(plans, key=lambda plan: plan.units)


def _cost(profile: Profile, index: int) -> int:
    """Multiply-adds a token at the rank of that index, or of the exact contraction behind the last."""
    o, i = profile.shape
    return profile.ranks[index] * (o + i) if index < len(profile.ranks) else o * i


def _steps(profiles: Mapping[str, Profile]) -> list[tuple[str, int]]:
    """Steps along each weight's lower convex hull of (cost, mean bound), of all weights the steepest first."""
    found = []
    for name, profile in profiles.items():
        costs = [_cost(profile, i) for i in range(len(profile.ranks) + 1)]
        means = [*profile.bounds.mean(1).tolist(), 0.0]
        at = 0
        while at < len(profile.ranks):
            slopes = [(means[j] - means[at]) / (costs[j] - costs[at]) for j in range(at + 1, len(costs))]
            steepest = int(np.argmin(slopes))
            at += 1 + steepest
            found.append((slopes[steepest], name, at))
    return [(name, index) for _, name, index in sorted(found)]
