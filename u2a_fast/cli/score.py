"""``u2a-fast score``: the gain of unlearning each negative, in windows that survive interruption.

A shortlist and a certified top k rank all negatives at once: they hold them in memory.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import typer

from u2a_fast.cli import inputs
from u2a_fast.cli import options as o
from u2a_fast.cli.explain import explain_scoring
from u2a_fast.cli.scoring import RESULTS, RESUME, ScoringRun
from u2a_fast.cli.session import progress, refuse_existing, verb
from u2a_fast.influence.modes import EXACT_MODES
from u2a_fast.store import ScoreSummary, score_to_parquet

USED_BY = {
    "rank": (o.ModeKind.lowrank, o.ModeKind.shortlist),
    "fraction": (o.ModeKind.layers, o.ModeKind.shortlist),
}

SCORING: o.Group = {
    "dtype": (o.option(o.DtypeKind, "Precision of the scoring passes."), o.DtypeKind.auto),
    "mode": (
        o.option(
            o.ModeKind,
            "auto, forward, reverse: exact. lowrank, layers: approximate. shortlist: exact for those that lowrank "
            "ranks best, with a measured recall.",
        ),
        o.ModeKind.auto,
    ),
    "top_k": (
        o.option(
            int | None,
            "Only the K best, certified: a low-rank pass with bounds, then exact scores of all that can be among them.",
            min=1,
        ),
        None,
    ),
    "rank": (
        o.option(
            int | None,
            "Singular vectors kept of a matrix; default 16, planned by cost for --top-k.",
            min=1,
        ),
        None,
    ),
    "fraction": (
        o.option(
            float | None,
            "Of the negatives that shortlist scores exactly (default 0.1); of the cost beyond a forward pass that "
            "layers may spend (default 0.5).",
        ),
        None,
    ),
    "batch_invariant": (
        o.option(bool, "Bits that do not depend on what is scored beside: one example at a time.", "--batch-invariant"),
        False,
    ),
    "per_token": (
        o.option(bool, "Every scored token's share of its score too; columns token_ids, token_scores.", "--per-token"),
        False,
    ),
    "per_module": (o.option(bool, "Every module's share too; column module_scores.", "--per-module"), False),
    "window": (o.option(int, "Negatives between two checkpoints.", min=1), 2048),
    "explain": (
        o.option(bool, "Print the route, why, and what it does in every module; write nothing.", "--explain"),
        False,
    ),
}


@verb(
    *(o.MODEL, o.NEGATIVES, o.OBJECTIVE, o.OUT, o.CURVATURE, o.LOSS, o.PARAMETERS, o.READING, SCORING, o.SIGNAL, o.RUN),
    resume=RESUME,
)
def score(context: typer.Context) -> None:
    """Score every negative: how much unlearning it would raise preference performance (positive: it helps)."""
    p = context.params
    _check_options(p)
    if p["explain"]:
        explain_scoring(p)
        return
    refuse_existing(context, RESULTS)
    run = ScoringRun(context)
    inputs.check_topk(run.scorer, p)
    run.start()
    run.show(_score(run, p))


def _check_options(p: Mapping[str, Any]) -> None:
    mode, by_top_k = repr(str(p["mode"])), p["top_k"] is not None
    got = "--top-k" if by_top_k else mode
    if by_top_k and p["mode"] not in EXACT_MODES:
        raise ValueError(f"[score] expected --mode out of {list(EXACT_MODES)} with --top-k, got {mode}")
    for name, modes in USED_BY.items():
        if p[name] is not None and p["mode"] not in modes and not (by_top_k and name == "rank"):
            expected = f"--mode {' or '.join(modes)}{', or --top-k,' if name == 'rank' else ''}"
            raise ValueError(f"[score] expected {expected} with --{name}, got {got}")
    for name in ("per_token", "per_module"):
        if p[name] and (p["mode"] not in EXACT_MODES or by_top_k):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"[score] expected --mode out of {list(EXACT_MODES)} with {option}, got {got}")


def _score(run: ScoringRun, p: Mapping[str, Any]) -> ScoreSummary:
    """The best k of all negatives, a shortlist of them, or every one of them in windows."""
    if p["top_k"] is not None:
        return run.rank_all(partial(run.scorer.topk, run.negatives, p["top_k"], rank=p["rank"]))
    if p["mode"] == o.ModeKind.shortlist:
        return run.rank_all(partial(run.scorer.score, run.negatives))
    with progress("scoring") as update:
        return score_to_parquet(
            run.scorer,
            run.negatives,
            p["out"],
            window=p["window"],
            on_progress=update,
            fingerprint=run.fingerprint,
            overwrite=p["overwrite"],
            before_rename=run.finish,
            per_token=p["per_token"],
            per_module=p["per_module"],
        )
