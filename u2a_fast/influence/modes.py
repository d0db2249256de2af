"""How a scorer's modes turn negatives into scores: exactly, by low rank, by a shortlist, by some layers; the best k.

Costs in units of a forward pass: exact 3 by arithmetic and less as measured (``ranks.exact_units``), ``lowrank`` 2 and
a little, ``layers`` 1 + 2 fraction, ``shortlist`` and ``topk`` a low-rank pass and an exact score for each rescored.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from u2a_fast.data.packing import Example, longest_examples
from u2a_fast.influence.checks import LEAST_RANKED, checked, ranked
from u2a_fast.influence.derivatives import Approximate, DerivativeBatch, DerivativePass
from u2a_fast.influence.layers import choose_layers, keep_layers
from u2a_fast.influence.lowrank import truncate
from u2a_fast.influence.profiles import profile_ranks
from u2a_fast.influence.ranks import RankPlan, exact_units, plan_ranks
from u2a_fast.influence.routes import Choice, Pass, preflight, run_batches, run_parts
from u2a_fast.influence.scores import Scores, ScoringReport
from u2a_fast.influence.shares import EXACT_MODES, check_shares, score_with_shares
from u2a_fast.influence.topk import (
    best,
    certify,
    listed_positions,
    recall_of_shortlist,
    shortlist_positions,
    unlisted_sample,
)
from u2a_fast.models.memory import Room, TokenBudget
from u2a_fast.statistics import spearman
from u2a_fast.store.journal import Journal

__all__ = [
    "EXACT_MODES",
    "FRACTIONS",
    "MODES",
    "PLAN_SAMPLE",
    "Progress",
    "Run",
    "check_mode",
    "plan",
    "probe",
    "score",
    "topk",
    "topk_by_estimate",
]

Progress = Callable[[str, int, int], None]  # stage, negatives done, of how many
Keep = Callable[[np.ndarray, DerivativeBatch], None]  # positions (b) and their batch

MODES = (*EXACT_MODES, "lowrank", "shortlist", "layers")
FRACTIONS = {"shortlist": 0.1, "layers": 0.5}  # where none is given
PLAN_SAMPLE = 64  # negatives that ranks are planned on: as costly as scoring them twice
LAYER_SAMPLE = 128  # negatives, the first ones, so that a resumed run chooses the same layers
NO_PLAN = 4  # below this many samples of negatives, planning costs more than it can save


@dataclass(frozen=True)
class Rows:
    """Scores, NLLs and scored tokens of n negatives, which of them fit in memory, and bounds of the scores' errors.

    (n) each. What does not fit even alone has NaN; bounds are there where the pass has them.
    """

    score: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    fits: np.ndarray
    bound: np.ndarray | None = None


@dataclass(frozen=True)
class Run:
    """One call's negatives, and how the scorer at hand evaluates them.

    Attributes:
        items: n token examples.
        exact: its exact pass, by whichever route, and why by that.
        make: builds the reverse pass of an approximation (None: of the direction itself).
        slope: d loss / d NLL_i from the NLLs of given positions.
        budget: most tokens a batch, kept by the scorer from call to call.
        memo: what later calls of the same scorer use again.
        forward: its exact pass by the forward route.
        float32: its exact pass in float32, where it scores in 16 bits.
        batched_budget: most tokens a batch were it not batch-invariant; None where it is not.
        on_progress: called after every batch.
        journal: keeps what is evaluated, a window of negatives at a time; batches are then planned within a window, so
            that they do not depend on where a run was interrupted.
    """

    items: Sequence[Example]
    exact: Callable[[], tuple[Pass, Choice]]
    make: Callable[[Approximate | None], DerivativePass]
    slope: Callable[[Tensor, np.ndarray], Tensor]
    budget: TokenBudget
    memo: dict[Any, Any]
    forward: Callable[[], Pass]
    float32: Callable[[], Pass] | None = None
    batched_budget: int | None = None
    on_progress: Progress | None = None
    journal: Journal | None = None

    def evaluate(
        self,
        passes: Pass,
        positions: np.ndarray | None = None,
        stage: str = "exact pass",
        *,
        before: int = 0,
        keep: Keep | None = None,
    ) -> Rows:
        """Rows of the negatives at ``positions``, all by default, in that order.

        ``before``: how many the stage has seen, for its progress. ``keep`` sees every batch, without a journal.
        """
        positions = np.arange(len(self.items)) if positions is None else positions
        tell = partial(self._tell, stage, before + len(positions))
        if self.journal is None:
            return Rows(**self._columns(passes, positions, before, tell, keep))
        windows = []
        if len(positions) > self.journal.window and passes.kind not in self.budget.found:
            with passes.running():
                preflight(passes, longest_examples(self.items[int(i)] for i in positions), self.budget)
        for at in range(0, max(len(positions), 1), self.journal.window):
            some = positions[at : at + self.journal.window]
            windows.append(self.journal.rows(stage, some, partial(self._columns, passes, some, before + at, tell)))
            tell(before + at + len(some))
        return Rows(**{name: np.concatenate([window[name] for window in windows]) for name in windows[0]})

    def _tell(self, stage: str, total: int, done: int) -> None:
        if self.on_progress:
            self.on_progress(stage, done, total)

    def _columns(
        self,
        passes: Pass,
        positions: np.ndarray,
        done: int,
        tell: Callable[[int], None],
        keep: Keep | None = None,
    ) -> dict[str, np.ndarray]:
        """The columns of ``Rows``, by name; ``tell`` hears of every batch, counted from ``done``."""
        n, items = len(positions), [self.items[int(i)] for i in positions]

        def attempt(room: Room) -> list[tuple[list[int], DerivativeBatch]]:
            # Results stay where they are until all are there: waiting for each would leave a GPU idle in between.
            found, seen = [], done
            for at, out in run_batches(passes, items, room):
                if keep is not None:
                    keep(positions[at], out)
                found.append((at, replace(out, parts={}, by_token=None)))
                seen += len(at)
                tell(seen)
            return found

        with passes.running():
            found = self.budget.fit(passes.kind, attempt)
        derivative, nll, bound = torch.full((3, n), torch.nan, dtype=torch.float64)
        tokens, fits = torch.empty(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool)
        for at, out in found:
            derivative[at], nll[at] = out.derivatives[0].double().cpu(), out.nll.double().cpu()
            tokens[at], fits[at] = out.tokens, out.fits
            if out.bound is not None:
                bound[at] = out.bound[0].cpu()
        slope = self.slope(nll, positions)
        made = {"score": slope * derivative, "nll": nll, "tokens": tokens, "fits": fits}
        # NaN promises nothing: where an example did not fit, its exact score is asked for
        made |= {"bound": slope.abs() * bound} if _is_bounded(passes) else {}
        return {name: column.numpy() for name, column in made.items()}

    def rescore(self, rows: Rows, positions: np.ndarray, *, before: int = 0) -> np.ndarray:
        """Exact scores at ``positions``, written into ``rows`` too."""
        again = self.evaluate(self.exact()[0], positions, "rescoring", before=before)
        rows.score[positions], rows.fits[positions] = again.score, again.fits
        # an approximate pass, which keeps more, may have had no memory for what now fits
        lost = np.isnan(rows.nll[positions])
        rows.nll[positions[lost]] = again.nll[lost]
        return again.score

    def scores(self, rows: Rows, exact: np.ndarray, report: ScoringReport, order: np.ndarray | None = None) -> Scores:
        """The rows as ``Scores``, all of them or those at ``order``."""
        ids = np.array([str(item.get("id", i)) for i, item in enumerate(self.items)], dtype=object)
        columns = {"id": ids, "score": rows.score, "nll": rows.nll, "tokens": rows.tokens, "exact": exact}
        columns |= {"fits": rows.fits}
        order = np.arange(len(self.items)) if order is None else order
        unfit = int((~rows.fits).sum())
        report = replace(report, token_budget=dict(self.budget.found), unfit=unfit or None)
        return Scores.from_columns({name: column[order] for name, column in columns.items()}, report)


def _is_bounded(passes: Pass) -> bool:
    return isinstance(passes, DerivativePass) and passes.approximation.bounded


def check_mode(mode: str, fraction: float | None) -> None:
    """Raise ValueError for an unknown mode, or a fraction outside of (0, 1]."""
    if mode not in MODES:
        raise ValueError(f"[InfluenceScorer] expected a mode out of {list(MODES)}, got {mode!r}")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"[InfluenceScorer] expected a fraction in (0, 1], got {fraction}")


def score(
    run: Run, mode: str, *, rank: int, fraction: float | None, per_token: bool = False, per_module: bool = False
) -> Scores:
    """Every negative by ``mode``, a sample of them in float32 too where scores are made in 16 bits."""
    if per_token or per_module:
        check_shares(mode)  # before any work
    if mode == "lowrank":
        found = _low_rank(run, rank)
    elif mode == "shortlist":
        found = _shortlist(run, rank, fraction or FRACTIONS[mode])
    elif mode == "layers":
        found = _layers(run, fraction or FRACTIONS[mode])
    else:
        found = score_with_shares(run, per_token=per_token, per_module=per_module)
    return checked(
        run,
        found,
        _pass_over_all(run, mode, rank, fraction),
        np.arange(len(run.items)),
        lambda sample: found.score[sample],
        once=True,
    )


def probe(run: Run, mode: str, rank: int) -> None:
    """Halve the budget until the largest batch of ``run`` that is no lone example too large fits."""
    approximate = {"lowrank": partial(_low_rank_pass, run, rank), "layers": partial(run.make, None)}
    passes: Pass = approximate[mode]() if mode in approximate else run.exact()[0]
    with passes.running():
        preflight(passes, run.items, run.budget)


def _pass_over_all(run: Run, mode: str, rank: int, fraction: float | None) -> Pass:
    """What ``score`` ran all negatives through."""
    if mode in ("lowrank", "shortlist"):
        return _low_rank_pass(run, rank)
    return run.memo[mode, fraction or FRACTIONS[mode]][1] if mode == "layers" else run.exact()[0]


def _route(choice: Choice) -> dict[str, Any]:
    return {"route": choice.mode, "reason": choice.reason}


def _low_rank_pass(run: Run, ranks: int) -> DerivativePass:
    if ("lowrank", ranks) not in run.memo:
        run.memo["lowrank", ranks] = run.make(partial(truncate, ranks=ranks))
    return run.memo["lowrank", ranks]


def _energy(passes: DerivativePass) -> dict[str, Any]:
    found = passes.approximation
    return {"energy": found.total_energy, "energy_by_parameter": dict(found.energy)}


def _low_rank(run: Run, rank: int) -> Scores:
    n, passes = len(run.items), _low_rank_pass(run, rank)
    report = ScoringReport("lowrank", n, rescored=0, rank=rank, **_energy(passes))
    return run.scores(run.evaluate(passes, stage="low-rank pass"), np.zeros(n, dtype=bool), report)


def _agreement(estimates: np.ndarray, rows: Rows, sampled: np.ndarray) -> float:
    """Rank correlation of estimates with exact scores on those of a sample that fit in memory."""
    known = sampled[rows.fits[sampled]]
    return spearman(estimates[known], rows.score[known])


def _shortlist(run: Run, rank: int, fraction: float) -> Scores:
    n, passes = len(run.items), _low_rank_pass(run, rank)
    rows = run.evaluate(passes, stage="low-rank pass")
    approximate = rows.score.copy()
    listed = shortlist_positions(approximate, fraction)
    sampled = unlisted_sample(n, listed)
    run.rescore(rows, np.concatenate([listed, sampled]))
    exact = np.zeros(n, dtype=bool)
    exact[listed] = exact[sampled] = True
    recall, interval = recall_of_shortlist(rows.score[listed], rows.score[sampled], n - len(listed))
    report = ScoringReport(
        "shortlist",
        n,
        rescored=int(exact.sum()),
        **_route(run.exact()[1]),
        rank=rank,
        recall=recall,
        recall_interval=interval,
        spearman=_agreement(approximate, rows, sampled),
        **_energy(passes),
    )
    return run.scores(rows, exact, report)


def _layers(run: Run, fraction: float) -> Scores:
    n = len(run.items)
    if ("layers", fraction) not in run.memo:
        # a budget of its own, so that a resumed run, which may know a smaller one for the rest, chooses alike
        parts, unfit = run_parts(run.make(None), run.items[:LAYER_SAMPLE], run.budget, "sample for layers")
        known = {path: np.delete(part.cpu().numpy(), unfit) for path, part in parts.items()}
        chosen = choose_layers(known, fraction)
        run.memo["layers", fraction] = chosen, run.make(partial(keep_layers, choice=chosen))
    choice, passes = run.memo["layers", fraction]
    report = ScoringReport("layers", n, layers=choice.blocks, share=choice.share, spearman=choice.spearman)
    return run.scores(run.evaluate(passes, stage="some layers"), np.zeros(n, dtype=bool), report)


def topk(run: Run, k: int, *, rank: int | None, certified: bool) -> Scores:
    """The best k by exact score: of all where ``certified``, else of the best 2k by low-rank score."""
    n = len(run.items)
    planned = plan(run, k) if certified and rank is None else None
    if planned is not None and not planned.pays:
        rows = run.evaluate(run.exact()[0])
        note = f"{planned.note}; all were scored exactly"
        report = ScoringReport("topk", n, rescored=n, **_route(run.exact()[1]), certified=True, note=note)
        found = run.scores(rows, np.ones(n, dtype=bool), report, best(rows.score, k))
        return ranked(run, found, run.exact()[0], rows, np.arange(n))
    ranks = planned.ranks if planned is not None else (rank or 16)
    passes = run.make(partial(truncate, ranks=ranks, bounded=certified))
    rows = run.evaluate(passes, stage="low-rank pass")
    bound = rows.bound if rows.bound is not None else np.zeros(n)
    rescored = np.empty(0, dtype=np.int64)

    def exact(positions: np.ndarray) -> np.ndarray:
        nonlocal rescored
        before, rescored = len(rescored), np.concatenate([rescored, positions])
        return run.rescore(rows, positions, before=before)

    if certified:
        order, _ = certify(rows.score.copy(), bound, exact, k)
    else:
        candidates = best(rows.score, 2 * k)
        exact(candidates)
        order = candidates[best(rows.score[candidates], k)]
    uniform = ranks if isinstance(ranks, int) else None
    made = {**_route(run.exact()[1]), "rank": uniform, "certified": certified, **_energy(passes)}
    report = ScoringReport("topk", n, rescored=len(rescored), **made)
    found = run.scores(rows, np.ones(n, dtype=bool), report, order)
    return ranked(run, found, passes, rows, rescored)


def topk_by_estimate(run: Run, estimates: np.ndarray, k: int, *, candidates: int, coverage: float) -> Scores:
    """The best k by exact score among the best ``candidates`` of estimates (n), with the recall of those.

    A random sample of the other negatives is scored exactly too, so that recall is measured, and takes part.
    """
    n, (passes, choice) = len(run.items), run.exact()
    listed = listed_positions(estimates, candidates)
    sampled = unlisted_sample(n, listed)
    positions = np.concatenate([listed, sampled])
    found = run.evaluate(passes, positions, "rescoring")
    recall, interval = recall_of_shortlist(found.score[: len(listed)], found.score[len(listed) :], n - len(listed))
    rows = Rows(np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, dtype=np.int64), np.ones(n, dtype=bool))
    for name in ("score", "nll", "tokens", "fits"):
        getattr(rows, name)[positions] = getattr(found, name)
    report = ScoringReport(
        "index",
        n,
        rescored=len(positions),
        **_route(choice),
        coverage=coverage,
        certified=False,
        recall=recall,
        recall_interval=interval,
        spearman=_agreement(estimates, rows, sampled) if len(sampled) >= LEAST_RANKED else None,
    )
    positions = np.sort(positions)  # equal scores in the order given
    kept = run.scores(rows, np.ones(n, dtype=bool), report, positions[best(rows.score[positions], k)])
    return ranked(run, kept, passes, rows, positions)


def plan(run: Run, k: int) -> RankPlan:
    """Ranks by the cost model, from a random sample; everything exactly where there are too few to sample."""
    if run.journal is None:
        return _plan(run, k)
    # Kept whole: it costs more than the sample's scores, and windows of one pass need the same ranks.
    return RankPlan(**run.journal.value("rank plan", lambda: asdict(_plan(run, k))))


def _plan(run: Run, k: int) -> RankPlan:
    n, (passes, choice) = len(run.items), run.exact()
    everything = RankPlan({}, exact := exact_units(choice.mode, passes.decoder.device.type), 1.0, exact)
    if n < NO_PLAN * PLAN_SAMPLE or k >= n:
        return everything
    try:
        bounding = run.make(None)
    except NotImplementedError as error:  # bounds are of gradients: a model may run forward only
        return replace(everything, note=f"no bound: {error}")
    positions = np.sort(np.random.default_rng(0).choice(n, PLAN_SAMPLE, replace=False))
    rows = run.evaluate(passes, positions, "sample")
    slope = run.slope(torch.from_numpy(rows.nll), positions).abs().numpy()
    profiles, profiled = profile_ranks(bounding, [run.items[int(i)] for i in positions], slope, run.budget)
    known = profiled & rows.fits
    if not known.any():
        return everything
    shown = {name: replace(profile, bounds=profile.bounds[:, known]) for name, profile in profiles.items()}
    return plan_ranks(shown, rows.score[known], k / n, exact)
