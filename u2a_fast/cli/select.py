"""``u2a-fast select``: from scores to a weighted set of negatives."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from u2a_fast.cli import options as o
from u2a_fast.cli.session import REQUIRED, claim_folder, note, refuse_existing, run_options, show_result, verb
from u2a_fast.influence.scorer import Scores
from u2a_fast.manifest import RunRecord
from u2a_fast.selection import Selection
from u2a_fast.selection import select as choose
from u2a_fast.store import read_scores, sha256_of_files, write_selection

SCORES: o.Group = {
    "scores": (o.option(Path, "Folder of a score run, or its scores.parquet."), REQUIRED),
    "approximate": (
        o.option(
            o.ApproximatePolicy,
            "What approximate scores beside exact ones (of a shortlist) do: drop, or keep. Where none is exact, they "
            "are ranked among themselves.",
        ),
        o.ApproximatePolicy.drop,
    ),
}

RESULTS = ("selection.parquet",)


def selection_settings(p: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the group SELECTION under the names of the Python API."""
    renamed = {"select_tokens": "token_budget"}
    return {renamed.get(name, name): o.plain(p[name]) for name in o.SELECTION}


@verb(SCORES, o.OUT, o.SELECTION, o.RUN, resume="nothing was written; run the same command again")
def select(context: typer.Context) -> None:
    """Choose negatives by their scores and weigh them; weights have mean 1."""
    p, out = context.params, context.params["out"]
    refuse_existing(context, RESULTS)
    scores = Scores.from_columns(read_scores(p["scores"]))
    chosen = choose(scores, approximate=str(p["approximate"]), **selection_settings(p))
    file = p["scores"] / "scores.parquet" if p["scores"].is_dir() else p["scores"]
    claim_folder(context, RESULTS)
    record = RunRecord.start("select", run_options(context), out, device="cpu", hashes=sha256_of_files([file]))
    result = _result(chosen, len(scores), out)
    write_selection(out / "selection.parquet", chosen, before_rename=lambda: record.finish(result))
    if chosen.dropped_approximate:
        note(f"{chosen.dropped_approximate} of {len(scores)} negatives left out: their scores are approximations, the "
             "others' are exact (--approximate keep ranks them together)")  # fmt: skip
    elif not scores.exact.all():
        note(f"warning: {int((~scores.exact).sum())} of {len(scores)} scores are approximations")
    if chosen.dropped_unfit:
        note(f"warning: {chosen.dropped_unfit} negatives left out: they do not fit in memory and have no score")
    if chosen.dropped_nonfinite:
        note(f"warning: {chosen.dropped_nonfinite} negatives dropped, their scores are NaN or infinite")
    show_result(result, as_json=p["json_output"])


def _result(chosen: Selection, scored: int, out: Path) -> dict[str, Any]:
    return {
        "selection": str(out / "selection.parquet"),
        "selected": len(chosen),
        "of": scored,
        "effective_sample_size": chosen.effective_sample_size,
        "temper": chosen.temper,
        "largest_weight": float(chosen.weight.max()),
        "dropped_nonfinite": chosen.dropped_nonfinite,
        "dropped_approximate": chosen.dropped_approximate,
        "dropped_unfit": chosen.dropped_unfit,
    }
