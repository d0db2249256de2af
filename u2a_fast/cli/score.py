"""``u2a-fast score``: the gain of unlearning each negative, in windows that survive interruption."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from u2a_fast import __version__
from u2a_fast.cli import inputs
from u2a_fast.cli import options as o
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
from u2a_fast.influence.scorer import InfluenceScorer, ScoringReport
from u2a_fast.manifest import RunRecord
from u2a_fast.models.loading import load_model, model_files, resolve_device
from u2a_fast.store import ScoreSummary, check_target, score_to_parquet, sha256_of_files

RESULTS = ("scores.parquet",)
NOT_IN_FINGERPRINT = {"out", "signal_check"}


SCORING: o.Group = {
    "dtype": (o.option(o.DtypeKind, "Precision of the scoring passes."), o.DtypeKind.auto),
    "mode": (o.option(o.ModeKind, "auto, forward, reverse: exact. lowrank, layers: approximate."), o.ModeKind.auto),
    "rank": (o.option(int, "Singular vectors kept of a matrix, for lowrank.", min=1), 16),
    "fraction": (o.option(float | None, "Cost beyond a forward pass that layers may spend; default 0.5."), None),
    "window": (o.option(int, "Negatives between two checkpoints.", min=1), 2048),
}


@verb(
    *(o.MODEL, o.NEGATIVES, o.OBJECTIVE, o.OUT, o.CURVATURE, o.LOSS, o.PARAMETERS, o.READING, SCORING, o.SIGNAL, o.RUN),
    resume="run the same command again (without --overwrite) to resume at the first unfinished window",
)
def score(context: typer.Context) -> None:
    """Score every negative: how much unlearning it would raise preference performance (positive: it helps)."""
    p, out = context.params, context.params["out"]
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
    fingerprint = _fingerprint(used, [*model_files(p["model"], p["adapter"]), *inputs.data_files(rows, negatives)])
    if not p["overwrite"]:
        check_target(out, fingerprint, window=p["window"])
    model, tokenizer = load_model(p["model"], device=place, adapter=p["adapter"])
    scorer = inputs.make_scorer(p, model, tokenizer, objective)
    claim_folder(context, RESULTS)
    if p["overwrite"]:
        remove_results(out, ("signal.json",))
    record = RunRecord.start("score", used, out, device=str(place), hashes=fingerprint["inputs"])
    resumed = (out / "parts" / "manifest.json").exists()
    signal = check_signal(scorer, negatives, out, seed=p["seed"], resumed=resumed) if p["signal_check"] else None
    summary = _score(scorer, negatives, fingerprint, p)
    write_skipped(out, rows, negatives)
    result = _result(summary, rows, negatives)
    full = result | ({"signal": signal} if signal else {})
    if summary.report and summary.report.energy_by_parameter:
        full["energy_by_parameter"] = dict(summary.report.energy_by_parameter)
    record.finish(full)
    _warn_of_nonfinite(summary)
    show_result(full if p["json_output"] else result, as_json=p["json_output"])


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


def _fingerprint(used: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    """Everything that determines the scores, in JSON's types."""
    kept = {name: value for name, value in used.items() if name not in NOT_IN_FINGERPRINT}
    return {"version": __version__, "options": json.loads(json.dumps(kept)), "inputs": sha256_of_files(files)}


def _result(summary: ScoreSummary, rows: Rows, negatives: Negatives) -> dict[str, Any]:
    return {
        "scores": str(summary.path),
        "rows": summary.rows,
        "nonfinite": summary.nonfinite,
        "skipped": rows.report.bad_count + negatives.report.bad_count,
        "truncated": rows.report.truncated + negatives.report.truncated,
        "resumed_rows": summary.resumed_rows,
        **({"scoring": _of_the_run(summary.report)} if summary.report else {}),
    }


def _of_the_run(report: ScoringReport) -> dict[str, Any]:
    """What holds of the whole run, not of its last window, in a few lines."""
    left_out = ("rows", "rescored", "energy_by_parameter")
    return {name: value for name, value in report.to_dict().items() if name not in left_out}


def _warn_of_nonfinite(summary: ScoreSummary) -> None:
    if summary.nonfinite:
        shown = ", ".join(summary.nonfinite_ids)
        more = ", ..." if summary.nonfinite > len(summary.nonfinite_ids) else ""
        note(f"warning: {summary.nonfinite} scores are NaN or infinite and stay so: {shown}{more}")
