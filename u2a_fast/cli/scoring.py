"""What every run that scores negatives does before and after: ``score`` and ``index score``."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from u2a_fast import __version__
from u2a_fast.cli import inputs
from u2a_fast.cli.session import (
    claim_folder,
    command_name,
    note,
    note_skipped,
    progress,
    run_options,
    show_result,
    write_skipped,
)
from u2a_fast.cli.signal import check_signal, refuse_few_rows
from u2a_fast.influence.derivatives import resolve_token_budget
from u2a_fast.influence.scorer import Scores, ScoringReport
from u2a_fast.manifest import RunRecord
from u2a_fast.models.loading import load_model, resolve_device
from u2a_fast.store import Journal, ScoreSummary, check_target, sha256_of_files, write_scores

__all__ = ["RESULTS", "RESUME", "ScoringRun"]

RESULTS = ("scores.parquet",)
AT_ONCE = {"shortlist", "topk", "index"}  # modes whose report is of all negatives
NOT_IN_FINGERPRINT = {"out", "signal_check"}
RESUME = "run the same command again (without --overwrite) to resume at the first unfinished window"


class ScoringRun:
    """The inputs of a run, refused before any work if they are wrong; what it has found, once it has scored.

    Args:
        context: of the verb.
        more_files: what determines the scores beside the model and the data.

    Attributes:
        negatives: as they are read.
        scorer: of the options.
        fingerprint: everything that determines the scores, in JSON's types.
    """

    def __init__(self, context: typer.Context, more_files: Iterable[Path] = ()) -> None:
        self._context, p = context, context.params
        place = resolve_device(p["device"])
        tokenizer, settings = inputs.tokenization(p)
        self._rows = inputs.read_objective_rows(p, tokenizer, settings)
        self.negatives = inputs.read_the_negatives(p, tokenizer, settings)
        objective = inputs.make_objective(p, self._rows)
        if p["signal_check"]:
            refuse_few_rows(self._rows)
        self._used = run_options(
            context,
            device=str(place),
            token_budget=resolve_token_budget(p["token_budget"], place),
            max_length=settings["max_length"],
            objective=inputs.objective_kind(p),
            objective_reduction=objective.reduction,
        )
        files = [*inputs.input_files(p, self._rows, self.negatives), *more_files]
        self.fingerprint = _fingerprint(self._used, files)
        if not p["overwrite"]:
            check_target(p["out"], self.fingerprint, window=p["window"])
        model, tokenizer = load_model(p["model"], device=place, adapter=p["adapter"])
        self.scorer = inputs.make_scorer(p, model, tokenizer, objective)

    def start(self) -> None:
        """Claim the folder, clear it for ``--overwrite``, begin run.yaml and check the signal."""
        p, out = self._context.params, self._context.params["out"]
        claim_folder(self._context, RESULTS, ("signal.json", "parts"))
        self._record = RunRecord.start(
            command_name(self._context),
            self._used,
            out,
            device=self._used["device"],
            hashes=self.fingerprint["inputs"],
        )
        resumed = (out / "parts" / "manifest.json").exists()
        self._signal = (
            check_signal(self.scorer, self.negatives, out, seed=p["seed"], resumed=resumed)
            if p["signal_check"]
            else None
        )

    def rank_all(self, rank: Callable[..., Scores]) -> ScoreSummary:
        """Write what ``rank(on_progress=, journal=)`` gives; windows that an interrupted run has finished are read."""
        p = self._context.params
        journal = Journal(p["out"], self.fingerprint, window=p["window"])
        with progress("scoring") as bar:
            scores = rank(on_progress=lambda stage, done, total: bar(done, total, stage), journal=journal)
        path = p["out"] / RESULTS[0]
        summary = write_scores(path, scores, resumed_rows=journal.resumed_rows, before_rename=self.finish)
        journal.remove()
        return summary

    def finish(self, summary: ScoreSummary) -> None:
        """End run.yaml and list what was skipped; before the scores get their name, which says that all is done."""
        write_skipped(self._context.params["out"], self._rows, self.negatives)
        self._record.finish(self._full(summary))

    def show(self, summary: ScoreSummary) -> None:
        """The outcome on stdout, what to beware of on stderr."""
        p = self._context.params
        note_skipped(self._rows, self.negatives)
        _warn_of_rows(summary, p["top_k"])
        show_result(self._full(summary) if p["json_output"] else self._result(summary), as_json=p["json_output"])

    def _full(self, summary: ScoreSummary) -> dict[str, Any]:
        full = self._result(summary) | ({"signal": self._signal} if self._signal else {})
        if summary.report and summary.report.energy_by_parameter:
            full["energy_by_parameter"] = dict(summary.report.energy_by_parameter)
        return full

    def _result(self, summary: ScoreSummary) -> dict[str, Any]:
        reports = (self._rows.report, self.negatives.report)
        return {
            "scores": str(summary.path),
            "rows": summary.rows,
            "nonfinite": summary.nonfinite,
            **({"unfit": unfit} if (unfit := _unfit(summary)) else {}),
            "skipped": sum(report.bad_count for report in reports),
            "truncated": sum(report.truncated for report in reports),
            "resumed_rows": summary.resumed_rows,
            "token_budget": dict(summary.token_budget),
            **({"scoring": _of_the_run(summary.report)} if summary.report else {}),
        }


def _fingerprint(used: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    kept = {name: value for name, value in used.items() if name not in NOT_IN_FINGERPRINT}
    return {"version": __version__, "options": json.loads(json.dumps(kept)), "inputs": sha256_of_files(files)}


def _of_the_run(report: ScoringReport) -> dict[str, Any]:
    """What holds of the whole run in a few lines: of windows, the report of the last one is all there is."""
    windows = report.mode not in AT_ONCE
    left_out = {"energy_by_parameter", "token_budget", "unfit", *(("rows", "rescored") if windows else ())}
    return {name: value for name, value in report.to_dict().items() if name not in left_out}


def _unfit(summary: ScoreSummary) -> int:
    """Negatives that do not fit in memory, those that a ranking does not write among them."""
    of_all = summary.report.unfit if summary.report and summary.report.mode in AT_ONCE else None
    return max(summary.unfit, of_all or 0)


def _warn_of_rows(summary: ScoreSummary, wanted: int | None) -> None:
    """Say on stderr which scores are not finite, and where fewer than ``wanted`` negatives are there."""
    if wanted is not None and wanted > summary.rows:
        note(f"warning: --top-k {wanted} of {summary.rows} negatives: all of them, sorted")
    if unfit := _unfit(summary):
        note(f"warning: {unfit} negatives do not fit in memory even alone and have no score (NaN): select "
             "leaves them out; a lower --max-length or --dtype bfloat16 may let them fit")  # fmt: skip
    if summary.nonfinite > summary.unfit:
        shown = ", ".join(summary.nonfinite_ids)
        more = ", ..." if summary.nonfinite > len(summary.nonfinite_ids) else ""
        note(f"warning: {summary.nonfinite - summary.unfit} scores are NaN or infinite and stay so: {shown}{more}")
