"""``u2a-fast align``: rounds of score, select, weigh, unlearn, until held-out preferences stop gaining."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from torch import nn

from u2a_fast.cli import inputs
from u2a_fast.cli import options as o
from u2a_fast.cli.select import selection_settings
from u2a_fast.cli.session import (
    claim_folder,
    note_skipped,
    progress,
    refuse_existing,
    show_result,
    verb,
    write_skipped,
)
from u2a_fast.cli.signal import check_signal, refuse_few_rows
from u2a_fast.cli.train import load_trainable, read_retain, refuse_input, start_record, unlearn_config
from u2a_fast.data import Negatives
from u2a_fast.influence.objectives import Objective
from u2a_fast.unlearning import AlignConfig, AlignResult
from u2a_fast.unlearning import align as run_align

FINISHED = ("model",)  # written last
MORE = ("metrics.json", "align.json", "signal.json", "round-*")


@verb(
    *(o.MODEL, o.LOADING, o.NEGATIVES, o.OBJECTIVE, o.OUT, o.ROUNDS, o.CURVATURE, o.LOSS, o.PARAMETERS, o.TRAINING),
    *(o.READING, o.SIGNAL, o.RUN),
    resume="run the same command again (without --overwrite) to resume after the last finished round",
)
def align(context: typer.Context) -> None:
    """Score, select, weigh and unlearn in rounds, until the held-out preference loss stops falling."""
    p, out = context.params, context.params["out"]
    refuse_existing(context, FINISHED)
    refuse_input(p)
    config = align_config(p)
    tokenizer, settings = inputs.tokenization(p)
    rows = inputs.read_objective_rows(p, tokenizer, settings)
    if p["signal_check"]:
        refuse_few_rows(rows)
    retain = read_retain(p, tokenizer, settings)
    negatives = inputs.read_the_negatives(p, tokenizer, settings)
    sources = [source for source in (rows, negatives, retain) if source is not None]
    model, tokenizer = load_trainable(p)
    objective = inputs.make_objective(p, rows)
    claim_folder(context, FINISHED, MORE)
    resolved = {"objective": inputs.objective_kind(p), "objective_reduction": objective.reduction}
    record = start_record(context, "align", settings, inputs.data_files(*sources), **resolved)
    if p["signal_check"]:
        _signal(p, model, tokenizer, objective, negatives)
    with _rounds() as update:
        result = run_align(
            model, tokenizer, negatives, objective, config=config, retain=retain, output_dir=out, on_progress=update
        )
    write_skipped(out, *sources)
    shown = _result(result)
    record.finish(shown)
    note_skipped(*sources)
    show_result(shown, as_json=p["json_output"])


def align_config(p: Mapping[str, Any]) -> AlignConfig:
    """The options as ``AlignConfig`` names them."""
    own = ("rounds", "curvature", "damping", "heldout_fraction", "patience", "nll_sample", "seed")
    return AlignConfig(
        unlearn=unlearn_config(p),
        token_budget_per_batch=p["token_budget"],
        **selection_settings(p),
        **{name: o.plain(p[name]) for name in own},
    )


def _signal(p: Mapping[str, Any], model: nn.Module, tokenizer: Any, objective: Objective, negatives: Negatives) -> None:
    scorer = inputs.make_scorer({**p, "dtype": "auto", "parameters": "trainable"}, model, tokenizer, objective)
    check_signal(scorer, negatives, p["out"], seed=p["seed"], resumed=(p["out"] / "round-00").exists())


@contextmanager
def _rounds() -> Iterator[Callable[[int, str, int, int | None], None]]:
    """One bar, which starts again at every stage of every round."""
    with progress("round 0: score") as bar:
        yield lambda number, stage, done, total: bar(done, total, f"round {number}: {stage}")


def _result(result: AlignResult) -> dict[str, Any]:
    losses = [row["preference_loss_heldout"] for row in result.rounds]
    compared = [row["float32_spearman"] for row in result.rounds if "float32_spearman" in row]
    return {
        "model": str(result.model_dir),
        "rounds": len(result.rounds),
        "best_round": result.best_round,
        "stopped": result.stopped,
        "heldout_loss_before": result.rounds[0]["preference_loss_heldout_before"] if losses else None,
        "heldout_loss": losses,
        **({"float32_spearman": compared} if compared else {}),
    }
