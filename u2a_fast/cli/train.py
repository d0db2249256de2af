"""``u2a-fast unlearn``: weighted unlearning of a selection."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
from torch import nn

from u2a_fast.cli import inputs
from u2a_fast.cli import options as o
from u2a_fast.cli.session import (
    claim_folder,
    note_skipped,
    progress,
    refuse_existing,
    run_options,
    show_result,
    verb,
    write_skipped,
)
from u2a_fast.data import Negatives, Rows, read_positives
from u2a_fast.manifest import RunRecord
from u2a_fast.models.loading import load_model, model_files, resolve_device
from u2a_fast.models.parameters import selected_parameters
from u2a_fast.store import read_selection, sha256_of_files
from u2a_fast.unlearning import UnlearnConfig
from u2a_fast.unlearning import unlearn as run_unlearn

FINISHED = ("metrics.json",)  # written last

SELECTED: o.Group = {
    "selection": (o.option(Path | None, "Folder of a select run, or its file; default all, weighted alike."), None)
}


@verb(
    *(o.MODEL, o.LOADING, o.NEGATIVES, SELECTED, o.OUT, o.LOSS, o.PARAMETERS, o.TRAINING, o.READING, o.RUN),
    resume="run the same command again; it resumes from the last checkpoint if --save-every was given",
)
def unlearn(context: typer.Context) -> None:
    """Unlearn negatives with the weights of a selection; writes the model, its tokenizer and metrics."""
    p, out = context.params, context.params["out"]
    # a model in a folder that no run has touched is somebody's own
    finished = FINISHED if (out / "run.yaml").exists() else (*FINISHED, "model")
    refuse_existing(context, finished)
    refuse_input(p)
    config = unlearn_config(p)
    tokenizer, settings = inputs.tokenization(p)
    retain = read_retain(p, tokenizer, settings)
    negatives = inputs.read_the_negatives(p, tokenizer, settings)
    rows, weights, files = _weighted(negatives, p["selection"])
    sources = [source for source in (negatives, retain) if source is not None]
    model, tokenizer = load_trainable(p)
    claim_folder(context, finished, ("model", "checkpoints"))
    record = start_record(context, "unlearn", settings, [*files, *inputs.data_files(*sources)])
    with progress("unlearning") as update:
        result = run_unlearn(
            model, tokenizer, rows, weights, config=config, retain=retain, output_dir=out, on_progress=update
        )
    write_skipped(out, *sources)
    shown = {name: getattr(result, name) for name in ("steps", "stopped_by_drift", "nll_before", "nll_after", "drift")}
    shown = {"model": str(result.model_dir), **shown}
    record.finish(shown)
    note_skipped(*sources)
    show_result(shown, as_json=p["json_output"])


def refuse_input(p: Mapping[str, Any]) -> None:
    """Raise ValueError if the folder of the new model is, or holds, that of the model that it is made from."""
    target = (p["out"] / "model").resolve()
    for name in ("model", "adapter"):
        source = Path(p[name]).resolve() if p[name] is not None else None
        if source is not None and source.exists() and source.is_relative_to(target):
            raise ValueError(f"--out: {target} would replace --{name} {p[name]}: choose another folder")


def unlearn_config(p: Mapping[str, Any]) -> UnlearnConfig:
    """The options as ``UnlearnConfig`` names them; a drift bound of 0 means none."""
    settings = {field.name: o.plain(p[field.name]) for field in fields(UnlearnConfig)}
    return UnlearnConfig(**settings | {"max_drift": p["max_drift"] or None})


def load_trainable(p: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """Model and tokenizer, with gradients for the parameters that the options select."""
    place = resolve_device(p["device"])
    model, tokenizer = load_model(p["model"], device=place, dtype=str(p["dtype"]), adapter=p["adapter"])
    chosen = selected_parameters(model, inputs.parameter_selection(p["parameters"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return model, tokenizer


def read_retain(p: Mapping[str, Any], tokenizer: Any, settings: Mapping[str, Any]) -> Rows | None:
    """The answers to keep, None where the options name none."""
    return read_positives(p["retain"], tokenizer, **settings) if p["retain"] is not None else None


def _weighted(negatives: Negatives, selection: Path | None) -> tuple[list[dict[str, Any]], list[float], list[Path]]:
    """The chosen negatives in the selection's order, their weights, and the selection's file."""
    if selection is None:
        rows = list(negatives)
        return rows, [1.0] * len(rows), []
    chosen = read_selection(selection)
    wanted = set(chosen["id"])
    found = {row["id"]: row for row in negatives if row["id"] in wanted}
    if missing := [name for name in chosen["id"] if name not in found]:
        raise ValueError(
            f"[unlearn] expected every id of {selection} among the negatives, {len(missing)} are not "
            f"(first: {missing[0]!r})"
        )
    file = selection / "selection.parquet" if selection.is_dir() else selection
    return [found[name] for name in chosen["id"]], chosen["weight"].tolist(), [file]


def start_record(
    context: typer.Context, command: str, settings: Mapping[str, Any], files: list[Path], **resolved: Any
) -> RunRecord:
    """Begin run.yaml with the hashes of the model's files and of ``files``."""
    p, place = context.params, str(resolve_device(context.params["device"]))
    used = run_options(context, device=place, max_length=settings["max_length"], **resolved)
    hashes = sha256_of_files([*model_files(p["model"], p["adapter"]), *files])
    return RunRecord.start(command, used, p["out"], device=place, hashes=hashes)
