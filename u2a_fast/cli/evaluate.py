"""``u2a-fast evaluate``: preference, forgetting and utility of one model, against a reference if there is one."""

import json
from collections.abc import Mapping
from typing import Any

import typer

from u2a_fast.cli import inputs
from u2a_fast.cli import options as o
from u2a_fast.cli.session import (
    claim_folder,
    note_skipped,
    refuse_existing,
    run_options,
    show_result,
    verb,
    write_skipped,
)
from u2a_fast.data import Negatives, Rows, read_negatives, read_positives, read_preferences
from u2a_fast.evaluation import evaluate as measure
from u2a_fast.manifest import RunRecord
from u2a_fast.models.loading import load_model, model_files, resolve_device
from u2a_fast.store import sha256_of_files, write_text

RESULTS = ("metrics.json",)

SETS: o.Group = {
    "reference": (o.option(str | None, "The model before unlearning: for implicit rewards and rises."), None),
    "preferences": (o.option(str | None, "Preference pairs: how well the model prefers."), None),
    "negatives": (o.option(str | None, "Negatives: how much the model has forgotten."), None),
    "positives": (o.option(str | None, "Good answers: how useful the model still is."), None),
    "beta": o.OBJECTIVE["beta"],
}


@verb(
    *(o.MODEL, o.LOADING, SETS, o.OUT, o.READING, o.RUN),
    resume="nothing was written but run.yaml; run the same command again",
)
def evaluate(context: typer.Context) -> None:
    """Measure a model: preference on pairs, forgetting on negatives, utility on positives, with intervals."""
    p, out = context.params, context.params["out"]
    refuse_existing(context, RESULTS)
    place, dtype = resolve_device(p["device"]), str(p["dtype"])
    tokenizer, settings = inputs.tokenization(p)
    sets = _read_sets(p, tokenizer, settings)
    model, tokenizer = load_model(p["model"], device=place, dtype=dtype, adapter=p["adapter"])
    reference = load_model(p["reference"], device=place, dtype=dtype)[0] if p["reference"] is not None else None
    folders = [*model_files(p["model"], p["adapter"]), *model_files(p["reference"])]
    used = run_options(context, device=str(place), max_length=settings["max_length"])
    hashes = sha256_of_files([*folders, *inputs.data_files(*sets.values())])
    claim_folder(context, RESULTS)
    record = RunRecord.start("evaluate", used, out, device=str(place), hashes=hashes)
    options = {name: p[name] for name in ("beta", "token_budget", "seed")}
    metrics: dict[str, Any] = measure(model, tokenizer, **sets, reference=reference, **options)  # type: ignore[arg-type]
    write_skipped(out, *sets.values())
    write_text(out / "metrics.json", json.dumps(metrics, indent=2), before_rename=lambda: record.finish(metrics))
    note_skipped(*sets.values())
    show_result(metrics, as_json=p["json_output"])


def _read_sets(p: Mapping[str, Any], tokenizer: Any, settings: Mapping[str, Any]) -> dict[str, Negatives | Rows]:
    readers = {"preferences": read_preferences, "negatives": read_negatives, "positives": read_positives}
    sets = {name: read(p[name], tokenizer, **settings) for name, read in readers.items() if p[name] is not None}
    if not sets:
        raise ValueError("[evaluate] expected --preferences, --negatives or --positives, got none of them")
    return sets  # type: ignore[return-value]
