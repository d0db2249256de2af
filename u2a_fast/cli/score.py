"""``u2a-fast score``: the gain of unlearning each negative, in windows that survive interruption.

A shortlist and a certified top k rank all negatives at once: they hold them in memory.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import typer

from u2a_fast import __version__
from u2a_fast.cli import inputs
from u2a_fast.cli import options as o
from u2a_fast.cli.explain import explain_scoring
from u2a_fast.cli.session import (
    claim_folder,
    note,
    progress,
    refuse_existing,
    remove_results,
    run_options,
    show_result,
    verb,
    write_skipped,
)
from u2a_fast.cli.signal import check_signal
from u2a_fast.data import Negatives, Rows
from u2a_fast.influence.derivatives import resolve_token_budget
from u2a_fast.influence.modes import EXACT_MODES
from u2a_fast.influence.scorer import InfluenceScorer, Scores, ScoringReport
from u2a_fast.manifest import RunRecord
from u2a_fast.models.loading import load_model, model_files, resolve_device
from u2a_fast.store import Journal, ScoreSummary, check_target, score_to_parquet, sha256_of_files, write_scores

RESULTS = ("scores.parquet",)
NOT_IN_FINGERPRINT = {"out", "signal_check"}
RESUME = "run the same command again (without --overwrite) to resume at the first unfinished window"

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
    p, out = context.params, context.params["out"]
    _check_options(p)
    if p["explain"]:
        explain_scoring(p)
        return
    refuse_existing(context, RESULTS)
    place = resolve_device(p["device"])
    tokenizer, settings = inputs.tokenization(p)
    rows = inputs.read_objective_rows(p, tokenizer, settings)
    negatives = inputs.read_the_negatives(p, tokenizer, settings)
    objective = inputs.make_objective(p, rows)
    used = run_options(
        context,
        device=str(place),
        token_budget=resolve_token_budget(p["token_budget"], place),
        max_length=settings["max_length"],
        objective=inputs.objective_kind(p),
        objective_reduction=objective.reduction,
    )
    files = [*model_files(p["model"], p["adapter"]), *inputs.data_files(rows, negatives)]
    fingerprint = scores_fingerprint(used, files)
    if not p["overwrite"]:
        check_target(out, fingerprint, window=p["window"])
    model, tokenizer = load_model(p["model"], device=place, adapter=p["adapter"])
    scorer = inputs.make_scorer(p, model, tokenizer, objective)
    inputs.check_topk(scorer, p)
    claim_folder(context, RESULTS)
    if p["overwrite"]:
        remove_results(out, ("signal.json", *RESULTS, "parts"))
    record = RunRecord.start("score", used, out, device=str(place), hashes=fingerprint["inputs"])
    resumed = (out / "parts" / "manifest.json").exists()
    signal = check_signal(scorer, negatives, out, seed=p["seed"], resumed=resumed) if p["signal_check"] else None
    made = _score_at_once if _at_once(p) else _score
    summary = made(scorer, negatives, fingerprint, p)
    write_skipped(out, rows, negatives)
    result = score_result(summary, rows, negatives, at_once=_at_once(p))
    full = result | ({"signal": signal} if signal else {})
    if summary.report and summary.report.energy_by_parameter:
        full["energy_by_parameter"] = dict(summary.report.energy_by_parameter)
    record.finish(full)
    warn_of_rows(summary, p["top_k"])
    show_result(full if p["json_output"] else result, as_json=p["json_output"])


def _at_once(p: Mapping[str, Any]) -> bool:
    """Whether all negatives are ranked together, not a window at a time."""
    return p["top_k"] is not None or p["mode"] == o.ModeKind.shortlist


def _check_options(p: Mapping[str, Any]) -> None:
    if p["top_k"] is not None and p["mode"] not in EXACT_MODES:
        raise ValueError(f"[score] expected --mode out of {list(EXACT_MODES)} with --top-k, got {str(p['mode'])!r}")


def _score_at_once(
    scorer: InfluenceScorer, negatives: Negatives, fingerprint: Mapping[str, Any], p: Mapping[str, Any]
) -> ScoreSummary:
    """A shortlist of all negatives, or the best k of them."""
    if p["top_k"] is None:
        return rank_all(partial(scorer.score, negatives), fingerprint, p)
    return rank_all(partial(scorer.topk, negatives, p["top_k"], rank=p["rank"]), fingerprint, p)


def rank_all(rank: Callable[..., Scores], fingerprint: Mapping[str, Any], p: Mapping[str, Any]) -> ScoreSummary:
    """Write what ``rank(on_progress=, journal=)`` gives; windows that an interrupted run has finished are read."""
    journal = Journal(p["out"], fingerprint, window=p["window"])
    with progress("scoring") as bar:
        scores = rank(on_progress=lambda stage, done, total: bar(done, total, stage), journal=journal)
    summary = write_scores(p["out"] / RESULTS[0], scores, resumed_rows=journal.resumed_rows)
    journal.remove()
    return summary


def _score(
    scorer: InfluenceScorer, negatives: Negatives, fingerprint: Mapping[str, Any], p: Mapping[str, Any]
) -> ScoreSummary:
    with progress("scoring") as update:
        return score_to_parquet(
            scorer,
            negatives,
            p["out"],
            window=p["window"],
            on_progress=update,
            fingerprint=fingerprint,
            overwrite=p["overwrite"],
        )


def scores_fingerprint(used: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    """Everything that determines the scores, in JSON's types."""
    kept = {name: value for name, value in used.items() if name not in NOT_IN_FINGERPRINT}
    return {"version": __version__, "options": json.loads(json.dumps(kept)), "inputs": sha256_of_files(files)}


def score_result(summary: ScoreSummary, rows: Rows, negatives: Negatives, *, at_once: bool) -> dict[str, Any]:
    """What is printed of scores; those made ``at_once`` have one report, others that of their last window."""
    return {
        "scores": str(summary.path),
        "rows": summary.rows,
        "nonfinite": summary.nonfinite,
        **({"unfit": summary.unfit} if summary.unfit else {}),
        "skipped": rows.report.bad_count + negatives.report.bad_count,
        "truncated": rows.report.truncated + negatives.report.truncated,
        "resumed_rows": summary.resumed_rows,
        "token_budget": dict(summary.token_budget),
        **({"scoring": _of_the_run(summary.report, at_once)} if summary.report else {}),
    }


def _of_the_run(report: ScoringReport, at_once: bool) -> dict[str, Any]:
    """What holds of the whole run, not of its last window, in a few lines."""
    left_out = {"energy_by_parameter", "token_budget", "unfit"} | (set() if at_once else {"rows", "rescored"})
    return {name: value for name, value in report.to_dict().items() if name not in left_out}


def warn_of_rows(summary: ScoreSummary, wanted: int | None) -> None:
    """Say on stderr which scores are not finite, and where fewer than ``wanted`` negatives are there."""
    if wanted is not None and wanted > summary.rows:
        note(f"warning: --top-k {wanted} of {summary.rows} negatives: all of them, sorted")
    if summary.unfit:
        note(f"warning: {summary.unfit} negatives do not fit in memory even alone and have no score (NaN): select "
             "leaves them out; a lower --max-length or --dtype bfloat16 may let them fit")  # fmt: skip
    if summary.nonfinite > summary.unfit:
        shown = ", ".join(summary.nonfinite_ids)
        more = ", ..." if summary.nonfinite > len(summary.nonfinite_ids) else ""
        note(f"warning: {summary.nonfinite - summary.unfit} scores are NaN or infinite and stay so: {shown}{more}")
