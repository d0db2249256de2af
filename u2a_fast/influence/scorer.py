"""Influence scores: how much unlearning a negative would raise preference performance."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from u2a_fast.curvature.diagonal import Curvature, DiagonalFisher, Identity
from u2a_fast.data.packing import Example
from u2a_fast.influence.derivatives import resolve_token_budget
from u2a_fast.influence.objectives import Objective
from u2a_fast.influence.routes import MODES, Choice, Pass, make_pass, run_batches
from u2a_fast.losses import unlearning_slope
from u2a_fast.models.parameters import selected_parameters

__all__ = ["InfluenceScorer", "Scores"]

_FISHER_SAMPLE = 256  # examples; the diagonal's relative error falls as 1/sqrt of it, and it costs 3 units each


@dataclass(frozen=True)
class Scores:
    """One row a negative, in the order given.

    Attributes:
        id: the negative's own ``id``, else its position, as str.
        score: s_i = -dL_PA/dw_i, gain in L_PA per unit of unlearning weight; positive: unlearning it helps. NaN stays
            NaN.
        nll: NLL_i in nats, reduced as the scorer reduces (per token for ``"mean"``).
        tokens: scored tokens.
    """

    id: np.ndarray
    score: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.score)

    @property
    def nonfinite(self) -> int:
        """How many scores or NLLs are NaN or infinite."""
        return int((~np.isfinite(self.score) | ~np.isfinite(self.nll)).sum())


class InfluenceScorer:
    """Scores negatives against a preference objective at the model as it is now.

    The gain of one more unit of weight on example i is s_i = phi'(NLL_i) <v, grad NLL_i>, with v = (H + mu I)^-1 grad
    L_PA solved once (u2a_fast docs/design.md, section 2); phi is the unlearning loss's dependence on NLL_i.

    Args:
        model: a transformers causal LM or a PEFT model around one.
        tokenizer: kept for callers that score text; None where only token examples are scored.
        objective: ``DPO``, ``Reward`` or ``SFT``; prepared at this model if it was not yet.
        curvature: ``"identity"``, ``"fisher"`` (diagonal, from the first 256 negatives scored) or an object with
            ``solve(gradient) -> direction``.
        parameters: which parameters count, as ``models.selected_parameters`` takes it.
        loss: the unlearning loss, ``"ga"``, ``"npo"`` or ``"graddiff"``.
        npo_beta: NPO's inverse temperature, 1/nats.
        reduction: NLL_i is the ``"mean"`` or ``"sum"`` over example i's scored tokens.
        damping: mu over the mean of the curvature's diagonal (not used by ``"identity"``).
        token_budget: most tokens a batch; None: 2048 on CPU, 16384 on CUDA.
        dtype: precision of the scoring passes, e.g. ``torch.bfloat16``; the direction is solved in the model's own.
        mode: the route, as ``directional_derivatives`` takes it.

    Attributes:
        choice: the route that ``score`` took and why; None before the first call.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        objective: Objective,
        curvature: str | Curvature = "identity",
        *,
        parameters: str | Sequence[str] = "trainable",
        loss: str = "ga",
        npo_beta: float = 0.1,
        reduction: str = "mean",
        damping: float = 0.1,
        token_budget: int | None = None,
        dtype: torch.dtype | None = None,
        mode: str = "auto",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"[InfluenceScorer] expected mode to be one of {list(MODES)}, got {mode!r}")
        if isinstance(curvature, str) and curvature not in ("identity", "fisher"):
            raise ValueError(
                f'[InfluenceScorer] expected curvature "identity", "fisher" or an object, got {curvature!r}'
            )
        unlearning_slope(loss, torch.zeros(1), torch.zeros(1), npo_beta)  # an unknown loss ends here, before any work
        self.model, self.tokenizer, self.objective = model, tokenizer, objective
        self.names = list(selected_parameters(model, parameters))
        self.loss, self.npo_beta, self.reduction = loss, npo_beta, reduction
        self.damping, self.dtype, self.mode = damping, dtype, mode
        self.token_budget = resolve_token_budget(token_budget, next(model.parameters()).device)
        self._curvature = curvature
        self._solver: Curvature | None = Identity() if curvature == "identity" else None
        self._direction: dict[str, Tensor] | None = None
        self._pass: Pass | None = None
        self.choice: Choice | None = None

    def reset(self) -> None:
        """Forget the direction, after the model has changed; the objective's reference stays."""
        self._direction = self._pass = None
        if self._curvature == "fisher":
            self._solver = None

    def fit_curvature(self, examples: Sequence[Example]) -> None:
        """Estimate the curvature that was named, on these examples (all of them)."""
        if self._curvature == "fisher":
            self._solver = DiagonalFisher(
                self.model, examples, self.names, damping=self.damping, reduction=self.reduction
            )

    @contextmanager
    def curvature_of(self, examples: Sequence[Example]) -> Iterator[None]:
        """The curvature that was named, estimated on these examples for the duration of the block."""
        before = self._solver
        try:
            self.fit_curvature(examples)
            yield
        finally:
            self._solver = before

    def solve(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(H + mu I)^-1 gradient with this scorer's curvature."""
        if not isinstance(self._curvature, str):
            return self._curvature.solve(gradient)
        if self._solver is None:
            raise RuntimeError('[InfluenceScorer] expected fit_curvature(examples) before curvature "fisher" is used')
        return self._solver.solve(gradient)

    def direction(self) -> dict[str, Tensor]:
        """v = (H + mu I)^-1 grad L_PA by parameter name, solved once and kept until ``reset``."""
        if self._direction is None:
            self.objective.prepare(self.model, token_budget=self.token_budget)
            gradient = self.objective.gradient(self.model, self.names, token_budget=self.token_budget)
            self._direction = self.solve(gradient)
        return self._direction

    def score(self, negatives: Iterable[Example], *, nll_reference: Sequence[float] | None = None) -> Scores:
        """Score every negative.

        Args:
            negatives: token examples, optionally with an ``id``.
            nll_reference: NLL_i at the reference model, for ``loss="npo"`` after the model has moved; None: at the
                reference.

        Returns:
            ``Scores`` in the order given; a score that is not finite is kept as it is and counted in ``nonfinite``.
        """
        items = list(negatives)
        if self._curvature == "fisher" and self._solver is None:
            self.fit_curvature(list(islice(items, _FISHER_SAMPLE)))
        if self._pass is None:
            self._pass, self.choice = make_pass(
                self.model, [self.direction()], mode=self.mode, reduction=self.reduction, dtype=self.dtype
            )
        derivative = torch.empty(len(items), dtype=torch.float64)
        nll, tokens = torch.empty_like(derivative), torch.empty(len(items), dtype=torch.int64)
        with self._pass.running():
            for positions, out in run_batches(self._pass, items, self.token_budget):
                derivative[positions] = out.derivatives[0].double().cpu()
                nll[positions] = out.nll.double().cpu()
                tokens[positions] = out.tokens
        reference = nll if nll_reference is None else torch.as_tensor(nll_reference, dtype=torch.float64)
        slope = unlearning_slope(self.loss, nll, reference, self.npo_beta)
        ids = np.array([str(item.get("id", i)) for i, item in enumerate(items)], dtype=object)
        return Scores(ids, (slope * derivative).numpy(), nll.numpy(), tokens.numpy())
