"""Influence scores: how much unlearning a negative would raise preference performance."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from u2a_fast.curvature.diagonal import Curvature, DiagonalFisher, Identity, check_damping
from u2a_fast.data.packing import Example
from u2a_fast.influence.derivatives import Approximate, DerivativePass, as_budget
from u2a_fast.influence.forward import ForwardPass
from u2a_fast.influence.index import GradientIndex
from u2a_fast.influence.lowrank import check_rank, truncate
from u2a_fast.influence.modes import EXACT_MODES, Progress, Run, check_mode, plan, probe, score, topk, topk_by_estimate
from u2a_fast.influence.objectives import Objective
from u2a_fast.influence.ranks import RankPlan
from u2a_fast.influence.routes import Choice, Pass, make_pass
from u2a_fast.influence.scores import Scores, ScoringReport
from u2a_fast.influence.shares import check_shares, score_with_shares
from u2a_fast.influence.topk import check_certifiable, check_k
from u2a_fast.losses import unlearning_slope
from u2a_fast.models.memory import TokenBudget
from u2a_fast.models.parameters import precisions, selected_parameters
from u2a_fast.store.journal import Journal

__all__ = ["InfluenceScorer", "Scores", "ScoringReport"]

_FISHER_SAMPLE = 256  # examples; the diagonal's relative error falls as 1/sqrt of it, and it costs 3 units each


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
        token_budget: most tokens a batch; None: 2048 on CPU, 16384 on CUDA. Halved, with a warning, where that does not
            fit in memory, for each kind of pass; what was found is kept for later calls (``budget.found``).
        dtype: precision of the scoring passes, e.g. ``torch.bfloat16``; the direction is solved in the model's own.
        mode: ``"auto"``, ``"forward"`` and ``"reverse"`` are exact, routes as ``directional_derivatives`` takes them.
            ``"lowrank"`` truncates the direction, ``"shortlist"`` scores exactly those that a low-rank pass ranks best,
            ``"layers"`` counts the blocks that matter most; what that loses stands in the scores' ``report``.
        rank: singular vectors that ``"lowrank"`` and ``"shortlist"`` keep of a matrix.
        fraction: of the negatives that ``"shortlist"`` scores exactly (default 0.1), or of the cost beyond a forward
            pass that ``"layers"`` may spend (default 0.5).
        batch_invariant: scores of the same bits whatever is scored beside them, as in ``directional_derivatives``; the
            direction too is made one example at a time. What that costs is timed on a few negatives, alone and in
            batches, and stands in the scores' ``report`` (``batch_invariant_cost``).
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
        token_budget: int | TokenBudget | None = None,
        dtype: torch.dtype | None = None,
        mode: str = "auto",
        rank: int = 16,
        fraction: float | None = None,
        batch_invariant: bool = False,
    ) -> None:
        check_mode(mode, fraction)
        check_rank(rank)
        if isinstance(curvature, str) and curvature not in ("identity", "fisher"):
            raise ValueError(
                f'[InfluenceScorer] expected curvature "identity", "fisher" or an object, got {curvature!r}'
            )
        if curvature == "fisher":
            check_damping(damping)
        unlearning_slope(loss, torch.zeros(1), torch.zeros(1), npo_beta)  # an unknown loss ends here, before any work
        self.model, self.tokenizer, self.objective = model, tokenizer, objective
        self.names = list(selected_parameters(model, parameters))
        self.loss, self.npo_beta, self.reduction = loss, npo_beta, reduction
        self.damping, self.dtype = damping, dtype
        self._precision: dict[str, Any] = {"reduction": reduction, "dtype": dtype}
        self.mode, self.rank, self.fraction = mode, rank, fraction
        device = next(model.parameters()).device
        self.budget = as_budget(token_budget, device, batch_invariant=batch_invariant)
        self._batched_budget = as_budget(token_budget, device).start if batch_invariant else None
        self._curvature = curvature
        self._solver: Curvature | None = Identity() if curvature == "identity" else None
        self._direction: dict[str, Tensor] | None = None
        self._memo: dict[Any, Any] = {}

    @property
    def token_budget(self) -> int:
        """Most tokens a batch that every kind of pass has been found to have memory for."""
        return self.budget.least

    def reset(self) -> None:
        """Forget the direction, after the model has changed; the objective's reference stays."""
        self._direction = None
        self._memo = {}
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
            self.objective.prepare(self.model, token_budget=self.budget)
            gradient = self.objective.gradient(self.model, self.names, token_budget=self.budget)
            self._direction = self.solve(gradient)
        return self._direction

    def explain(self) -> dict[str, str]:
        """What the exact route does in every module that holds a selected parameter, by the module's path."""
        return self._exact_pass()[0].explain()

    def choice(self) -> Choice:
        """The exact route that ``explain`` describes, and why it is taken."""
        return self._exact_pass()[1]

    def explain_lowrank(
        self, ranks: int | Mapping[str, int] | None = None, *, bounded: bool = False
    ) -> tuple[dict[str, str], float]:
        """What a truncated pass does in every module that holds a selected parameter, and its energy.

        ``ranks``: of every matrix, or by parameter name; None: ``rank``. ``bounded``: as ``topk`` certifies by it.
        """
        passes = self._reverse_pass(partial(truncate, ranks=self.rank if ranks is None else ranks, bounded=bounded))
        return passes.explain(), passes.approximation.total_energy

    def score(
        self,
        negatives: Iterable[Example],
        *,
        nll_reference: Sequence[float] | None = None,
        on_progress: Progress | None = None,
        journal: Journal | None = None,
        per_token: bool = False,
        per_module: bool = False,
    ) -> Scores:
        """Score every negative.

        Args:
            negatives: token examples, optionally with an ``id``.
            nll_reference: NLL_i at the reference model, for ``loss="npo"`` after the model has moved; None: at the
                reference.
            on_progress: called with (stage, negatives done, of how many) after every batch.
            journal: keeps finished windows on disk, so that the same call after an interruption goes on behind them and
                ends in the same bits (``store.Journal``).
            per_token: with ``Scores.token_scores``, as the method gives them; nothing extra by the forward route.
            per_module: with ``Scores.module_scores``; nothing extra by the reverse route. Neither changes a score.

        Returns:
            ``Scores`` in the order given; a score that is not finite is kept as it is and counted in ``nonfinite``. A
            negative that does not fit in memory even alone gets NaN, with a warning (``fits``).

        Raises:
            ValueError: shares are asked for of a mode that is not exact, or with a journal, which does not keep them.
            NotImplementedError: ``per_token``, and the model does not run in forward mode.
        """
        if journal is not None and (per_token or per_module):
            raise ValueError("[InfluenceScorer] expected no journal with shares: it does not keep them")
        run = self._run(negatives, nll_reference, on_progress, journal)
        shares = {"per_token": per_token, "per_module": per_module}
        return score(run, self.mode, rank=self.rank, fraction=self.fraction, **shares)

    def token_scores(
        self, negatives: Iterable[Example], *, nll_reference: Sequence[float] | None = None
    ) -> list[Tensor]:
        """Every scored token's share of its negative's score: which tokens make it worth unlearning.

        With p_t the model's probability of scored token t of T_i, the share is phi'(NLL_i) <v, grad -log p_t>, over T_i
        where the scorer's reduction is ``"mean"``. A negative's shares sum to its score, to rounding.

        Args:
            negatives, nll_reference: as for ``score``.

        Returns:
            n float64 tensors on the CPU, (T_i) each, in the order of the example's labels; NaN stays NaN.

        Raises:
            ValueError: the scorer's mode is not exact.
            NotImplementedError: the model does not run in forward mode.
        """
        found = self._shares(negatives, nll_reference, per_token=True)
        return [torch.from_numpy(row) for row in found.token_scores or ()]

    def module_scores(
        self, negatives: Iterable[Example], *, nll_reference: Sequence[float] | None = None
    ) -> dict[str, Tensor]:
        """Every module's share of the scores: phi'(NLL_i) times the inner product over the parameters it holds itself.

        The modules' shares of a negative sum to its score, to rounding. A tied embedding has two, its use as an
        embedding and the LM head's.

        Args:
            negatives, nll_reference: as for ``score``.

        Returns:
            (n) float64 on the CPU by module path, the LM head last; NaN stays NaN.

        Raises:
            ValueError: the scorer's mode is not exact.
            NotImplementedError: a selected module is not understood.
        """
        found = self._shares(negatives, nll_reference, per_module=True)
        return {path: torch.from_numpy(row) for path, row in (found.module_scores or {}).items()}

    def _shares(self, negatives: Iterable[Example], nll_reference: Sequence[float] | None, **which: bool) -> Scores:
        check_shares(self.mode)
        return score_with_shares(self._run(negatives, nll_reference), **which)

    def preflight(self, longest: Sequence[Example], first: Sequence[Example]) -> None:
        """Find out how large a batch of ``score`` may be, before the first of several calls.

        Args:
            longest: the longest examples of all calls, as many as ``data.packing.longest_examples`` keeps.
            first: the first call's, to which a curvature is fitted where it was named.
        """
        if longest:
            probe(replace(self._run(first, None), items=longest), self.mode, self.rank)

    def topk(
        self,
        negatives: Iterable[Example],
        k: int,
        *,
        certified: bool = True,
        rank: int | None = None,
        nll_reference: Sequence[float] | None = None,
        on_progress: Progress | None = None,
        journal: Journal | None = None,
    ) -> Scores:
        """The k negatives of the highest exact scores, best first; NaN last, equal scores in the order given.

        A low-rank pass over all gives each score within a bound that holds whatever the data (``models.low_rank``);
        candidates are scored exactly in the order of their upper bounds until none that is left can reach the k-th.
        The bound covers truncation and the rounding of the contractions; scores closer than the rounding of the
        model's own passes may swap, as they may between any two runs that batch them differently.

        Args:
            negatives, nll_reference, on_progress, journal: as for ``score``.
            k: how many, at least 1; all of them, sorted, where there are not more.
            certified: False: no bound; the best 2k by low-rank score are scored exactly.
            rank: of every matrix; None: planned by cost from a sample (16 without a certificate), which scores all
                exactly where the bound is too loose to save anything.

        Returns:
            min(k, n) exact scores; ``report.rescored`` says how many took an exact pass.

        Raises:
            ValueError: k or rank is below 1, or a certificate is asked for in half precision.
        """
        self.check_topk(k, certified=certified, rank=rank)
        run = self._run(negatives, nll_reference, on_progress, journal)
        return topk(run, k, rank=rank, certified=certified)

    def plan_topk(self, negatives: Iterable[Example], k: int) -> RankPlan:
        """The ranks that ``topk`` would choose, and what they should cost; a sample of 64 is scored and bounded."""
        self.check_topk(k)
        return plan(self._run(negatives, None), k)

    def check_topk(self, k: int, *, certified: bool = True, rank: int | None = None) -> None:
        """Raise ValueError as ``topk`` would, before any work."""
        check_k(k)
        check_rank(1 if rank is None else rank)
        if certified:
            check_certifiable(precisions(self.model, self.dtype))

    def topk_by_index(
        self,
        negatives: Iterable[Example],
        index: GradientIndex,
        k: int,
        *,
        candidates: int | None = None,
        on_progress: Progress | None = None,
        journal: Journal | None = None,
    ) -> Scores:
        """The k negatives of the highest exact scores among the best candidates by an index's estimates, best first.

        Whether the candidates hold the true best is not certified but measured: a random sample of the others (256 at
        least) is scored exactly too, takes part, and gives ``report.recall`` and ``report.spearman``.

        Args:
            negatives: those that the index was built from, at the model that it was built with, which is the reference.
            index: their projected gradients.
            k: how many.
            candidates: how many to score exactly; None: 4 k. Those without a finite estimate are scored besides.
            on_progress, journal: as for ``score``.

        Returns:
            min(k, n) exact scores; ``report.coverage`` says which share of the direction the index sees.

        Raises:
            ValueError: k or candidates is out of its range, or the index holds other examples or another reduction.
        """
        check_k(k, candidates)
        items = list(negatives)
        index.check(items, self.reduction)
        run = self._run(items, None, on_progress, journal)
        # at the reference every unlearning loss falls by 1 with each nat: gains are derivatives along -v
        downhill = {name: -v for name, v in self.direction().items()}
        estimates = index.scores(downhill)
        return topk_by_estimate(run, estimates, k, candidates=candidates or 4 * k, coverage=index.coverage(downhill))

    def _run(
        self,
        negatives: Iterable[Example],
        nll_reference: Sequence[float] | None,
        on_progress: Progress | None = None,
        journal: Journal | None = None,
    ) -> Run:
        items = list(negatives)
        if journal is not None:
            journal.follow(self.budget.found)
        if self._curvature == "fisher" and self._solver is None:
            self.fit_curvature(list(islice(items, _FISHER_SAMPLE)))
        reference = None if nll_reference is None else torch.as_tensor(nll_reference, dtype=torch.float64)

        def slope(nll: Tensor, positions: np.ndarray) -> Tensor:
            at_reference = nll if reference is None else reference[torch.from_numpy(positions)]
            return unlearning_slope(self.loss, nll, at_reference, self.npo_beta)

        return Run(
            items,
            self._exact_pass,
            self._reverse_pass,
            slope,
            self.budget,
            self._memo,
            self._forward_pass,
            self._float32_pass(),
            self._batched_budget,
            on_progress,
            journal,
        )

    def _exact_pass(self) -> tuple[Pass, Choice]:
        if "exact" not in self._memo:
            mode = self.mode if self.mode in EXACT_MODES else "auto"
            self._memo["exact"] = make_pass(self.model, [self.direction()], mode=mode, **self._precision)
        return self._memo["exact"]

    def _forward_pass(self) -> Pass:
        if "forward" not in self._memo:
            self._memo["forward"] = ForwardPass(self.model, [self.direction()], **self._precision)
        return self._memo["forward"]

    def _float32_pass(self) -> Callable[[], Pass] | None:
        """What 16-bit scores are held against."""
        if precisions(self.model, self.dtype).isdisjoint({torch.bfloat16, torch.float16}):
            return None
        return lambda: make_pass(self.model, [self.direction()], reduction=self.reduction, dtype=torch.float32)[0]

    def _reverse_pass(self, approximate: Approximate | None) -> DerivativePass:
        return DerivativePass(self.model, [self.direction()], approximate=approximate, **self._precision)
