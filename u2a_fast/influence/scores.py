"""What scoring gives: one row a negative, and how the rows were made."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

__all__ = ["Scores", "ScoringReport"]


@dataclass(frozen=True)
class ScoringReport:
    """How scores were made, and what is known of their error. What does not apply to a mode is None or empty.

    Attributes:
        mode: ``"exact"``, ``"lowrank"``, ``"shortlist"``, ``"topk"``, ``"layers"`` or ``"index"``.
        rows: negatives looked at; rescored: those of them scored exactly after an approximate pass.
        route: ``"forward"`` or ``"reverse"``, and reason: why, of what was scored exactly.
        rank: singular vectors kept of a matrix; None where every matrix has its own.
        energy: ||v_r||^2 / ||v||^2 of the truncated direction; energy_by_parameter: of its truncated matrices.
        coverage: share of ||v||^2 in the weights that the index holds.
        certified: the rows returned are the true best by exact score.
        recall: share of the negatives that score as high as the shortlist's better half which the shortlist holds, with
            its 95 % interval, from a random sample of the others scored exactly.
        layers: blocks that count, from 0.
        share: squared correlation of the scores with the exact ones on a sample (``"layers"``).
        spearman: rank correlation of approximate with exact scores on a random sample.
        float32_spearman: rank correlation of 16-bit scores with float32 scores on a random sample: of the negatives
            that this scorer scored first, or of those that a ranking (``"topk"``, ``"index"``) scored exactly.
        batch_invariant_cost: how many times as long scoring took one example at a time as in batches, timed on a few of
            the negatives that this scorer scored first (``batch_invariant`` alone).
        token_budget: most tokens a batch, as found to fit in memory, by kind of loop.
        unfit: negatives without a score, because they do not fit in memory even alone; None: all fit.
        note: what else the user should know.
    """

    mode: str
    rows: int
    rescored: int | None = None
    route: str | None = None
    reason: str | None = None
    rank: int | None = None
    energy: float | None = None
    energy_by_parameter: Mapping[str, float] = field(default_factory=dict)
    coverage: float | None = None
    certified: bool | None = None
    recall: float | None = None
    recall_interval: tuple[float, float] | None = None
    layers: tuple[int, ...] = ()
    share: float | None = None
    spearman: float | None = None
    float32_spearman: float | None = None
    batch_invariant_cost: float | None = field(default=None, compare=False)  # a time: no two runs have the same
    token_budget: Mapping[str, int] = field(default_factory=dict)
    unfit: int | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The attributes that apply, as run.yaml has them: tuples as lists."""
        applying = {name: value for name, value in asdict(self).items() if value not in (None, {}, ())}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in applying.items()}


@dataclass(frozen=True)
class Scores:
    """One row a negative, in the order given (of ``InfluenceScorer.topk``: best first).

    Attributes:
        id: the negative's own ``id``, else its position, as str.
        score: s_i = -dL_PA/dw_i, gain in L_PA per unit of unlearning weight; positive: unlearning it helps. NaN stays
            NaN.
        nll: NLL_i in nats, reduced as the scorer reduces (per token for ``"mean"``).
        tokens: scored tokens.
        exact: False where a score is an approximation; None at construction means that all are exact.
        fits: False where there is no score, NaN, because the negative does not fit in memory even alone; None at
            construction means that all fit.
        report: how the scores were made; None where they were read from a file.
        token_scores: every scored token's share of its negative's score, (T_i) float64 a negative, and token_ids: the
            tokens' ids; None where they were not asked for (``InfluenceScorer.token_scores``).
        module_scores: every module's share of the scores, (n) float64 by its path; None where they were not asked for
            (``InfluenceScorer.module_scores``).
    """

    id: np.ndarray
    score: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray = None  # type: ignore[assignment]
    report: ScoringReport | None = None
    fits: np.ndarray = None  # type: ignore[assignment]
    token_scores: Sequence[np.ndarray] | None = None
    token_ids: Sequence[np.ndarray] | None = None
    module_scores: Mapping[str, np.ndarray] | None = None

    def __post_init__(self) -> None:
        if self.fits is None:
            object.__setattr__(self, "fits", np.ones(len(self.score), dtype=bool))
        if self.exact is None:
            object.__setattr__(self, "exact", np.ones(len(self.score), dtype=bool))

    @classmethod
    def from_columns(cls, columns: Mapping[str, np.ndarray], report: ScoringReport | None = None) -> "Scores":
        """Of arrays by attribute; ``exact`` and ``fits`` may be absent."""
        kept = {name: columns.get(name) for name in ("id", "score", "nll", "tokens", "exact", "fits")}
        return cls(**kept, report=report)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.score)

    @property
    def nonfinite(self) -> int:
        """How many scores or NLLs are NaN or infinite."""
        return int((~np.isfinite(self.score) | ~np.isfinite(self.nll)).sum())
