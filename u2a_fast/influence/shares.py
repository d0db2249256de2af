"""What each scored token and each module contributes to the scores of a run, collected from its own batches."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from u2a_fast.data.packing import IGNORE_INDEX, Example
from u2a_fast.influence.derivatives import DerivativeBatch, DerivativePass
from u2a_fast.influence.scores import Scores, ScoringReport

if TYPE_CHECKING:
    from u2a_fast.influence.modes import Run

__all__ = ["EXACT_MODES", "check_shares", "score_with_shares"]

EXACT_MODES = ("auto", "forward", "reverse")  # of a scorer


@dataclass
class _TokenShares:
    """Takes the batches of a forward pass; a batch that comes again replaces what it was."""

    _found: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, positions: np.ndarray, out: DerivativeBatch) -> None:
        """Keep what the batch of the negatives at ``positions`` says of their tokens."""
        assert out.by_token is not None
        rows = out.by_token[0].split(out.tokens.tolist())
        self._found |= dict(zip(positions.tolist(), rows, strict=True))

    def scores(self, slope: Tensor, reduction: str) -> list[np.ndarray]:
        """(T_i) float64 of every negative, from d loss / d NLL_i (n): they sum to its score."""
        shares = []
        for i, weight in enumerate(slope.tolist()):
            row = self._found[i].double().cpu()
            shares.append((row * (weight / len(row) if reduction == "mean" else weight)).numpy())
        return shares


@dataclass
class _ModuleShares:
    """Takes the batches of a reverse pass over n negatives, for the modules at ``paths``."""

    paths: Iterable[str]
    n: int
    _found: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, positions: np.ndarray, out: DerivativeBatch) -> None:
        """Keep what the batch of the negatives at ``positions`` says of the modules."""
        at = torch.from_numpy(positions).to(out.derivatives.device)
        # a module that was not called contributes nothing, unless nothing is known
        silent = torch.zeros_like(out.derivatives[0]) * out.derivatives[0]
        for path in self.paths:
            row = out.parts[path][0] if path in out.parts else silent
            self._found.setdefault(path, row.new_empty(self.n, dtype=torch.float64))[at] = row.double()

    def scores(self, slope: Tensor) -> dict[str, np.ndarray]:
        """(n) float64 by module path, from d loss / d NLL_i (n): they sum to the scores."""
        return {
            path: (slope * self._found[path].cpu()).numpy() if self.n else np.empty(0, dtype=np.float64)
            for path in self.paths
        }


def _scored_tokens(example: Example) -> np.ndarray:
    """Ids of the tokens whose shares ``_TokenShares`` gives, (T) int64 in their order."""
    pairs = zip(example["input_ids"][1:], example["labels"][1:], strict=True)
    return np.array([int(x) for x, y in pairs if int(y) != IGNORE_INDEX], dtype=np.int64)


def check_shares(mode: str) -> None:
    """Raise ValueError for a mode whose scores have no shares of tokens and modules."""
    if mode not in EXACT_MODES:
        raise ValueError(f"[InfluenceScorer] expected a mode out of {list(EXACT_MODES)} for shares, got {mode!r}")


def score_with_shares(run: "Run", *, per_token: bool = False, per_module: bool = False) -> Scores:
    """Every negative of a run exactly, with its tokens' and its modules' shares where they are asked for.

    The route that scores gives one kind of share for nothing; the scores' bits do not depend on what is asked for.
    """
    n, (passes, choice) = len(run.items), run.exact()
    tokens, modules = _TokenShares() if per_token else None, None
    # Made here: a model without forward mode is refused before any work.
    by_token = run.forward() if per_token and choice.mode != "forward" else passes
    if per_module:
        reverse = passes if isinstance(passes, DerivativePass) else _reverse_pass(run)
        modules = _ModuleShares(reverse.module_paths, n)
    own = tokens if choice.mode == "forward" else modules
    rows = run.evaluate(passes, keep=own.keep if own is not None else None)
    report = ScoringReport("exact", n, route=choice.mode, reason=choice.reason)
    found = run.scores(rows, np.ones(n, dtype=bool), report)
    slope = run.slope(torch.from_numpy(rows.nll), np.arange(n))
    if tokens is not None:
        if tokens is not own:
            run.evaluate(by_token, stage="tokens' shares", keep=tokens.keep)
        ids = [_scored_tokens(item) for item in run.items]
        found = replace(found, token_scores=tokens.scores(slope, passes.reduction), token_ids=ids)
    if modules is not None:
        if modules is not own:
            run.evaluate(reverse, stage="modules' shares", keep=modules.keep)
        found = replace(found, module_scores=modules.scores(slope))
    return found


def _reverse_pass(run: "Run") -> DerivativePass:
    if "reverse" not in run.memo:
        run.memo["reverse"] = run.make(None)
    return run.memo["reverse"]
