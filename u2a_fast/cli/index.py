"""``u2a-fast index``: projected gradients on disk, and the best negatives of any later direction by them."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import typer

from u2a_fast.cli import inputs
from u2a_fast.cli import options as o
from u2a_fast.cli.score import SCORING
from u2a_fast.cli.scoring import RESULTS, RESUME, ScoringRun
from u2a_fast.cli.session import (
    REQUIRED,
    claim_folder,
    note,
    note_skipped,
    progress,
    refuse_existing,
    run_options,
    show_result,
    verb,
    write_skipped,
)
from u2a_fast.influence.derivatives import resolve_token_budget
from u2a_fast.influence.index import GradientIndex, check_options, indexed_weights
from u2a_fast.manifest import RunRecord, read_record
from u2a_fast.models.loading import load_model, resolve_device
from u2a_fast.store import GradientShards, read_budget, sha256_of_files, write_text

__all__ = ["index"]

index = typer.Typer(
    name="index",
    help="Keep every negative's projected gradient on disk: build once, score along any later direction.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

GRADIENTS = "gradients"  # the folder of the shards: they lock it while they are written, and a run locks --out
BUILT = ("index.json",)  # written last

_BUILD: o.Group = {
    "dtype": SCORING["dtype"],
    "reduction": o.LOSS["reduction"],
    "projection": (
        o.option(
            o.ProjectionKind,
            "sketch: --dim entries in all. Others, --dim a layer, a square number: random; pca: its principal axes, "
            "measured on --pca-sample; identity: its first outputs and inputs.",
        ),
        o.ProjectionKind.sketch,
    ),
    "dim": (o.option(int, "Entries that a gradient is shortened to; the error falls as their root.", min=1), 4096),
    "pca_sample": (o.option(int, "For pca: negatives, drawn by --seed, that axes are measured on.", min=1), 256),
    "shard_rows": (o.option(int, "Negatives a file, and between two checkpoints.", min=1), 1024),
}


@verb(
    *(o.MODEL, o.NEGATIVES, o.OUT, o.PARAMETERS, _BUILD, o.READING, o.RUN),
    resume="run the same command again (without --overwrite) to resume at the first missing shard",
)
def build(context: typer.Context) -> None:
    """Project the gradient of every negative and keep it; about the cost of scoring them all once."""
    p, out = context.params, context.params["out"]
    refuse_existing(context, BUILT)
    check_options(str(p["projection"]), p["dim"], p["seed"], p["shard_rows"], p["pca_sample"])
    place = resolve_device(p["device"])
    tokenizer, settings = inputs.tokenization(p)
    negatives = inputs.read_the_negatives(p, tokenizer, settings)
    budget = resolve_token_budget(p["token_budget"], place)
    used = run_options(context, device=str(place), token_budget=budget, max_length=settings["max_length"])
    hashes = sha256_of_files(inputs.input_files(p, negatives))
    if not p["overwrite"]:
        _check_unfinished(out, used, hashes)
    model, _ = load_model(p["model"], device=place, adapter=p["adapter"])
    indexed_weights(model, inputs.parameter_selection(p["parameters"]))
    examples = list(negatives)  # a stream's bad rows end here, before any work
    claim_folder(context, BUILT, (GRADIENTS,))
    record = RunRecord.start("index build", used, out, device=str(place), hashes=hashes)
    found, resumed = _build(p, model, examples)
    write_skipped(out, negatives)
    result = _result(out, found.shards, resumed)
    result |= {"skipped": negatives.report.bad_count, "truncated": negatives.report.truncated}
    write_text(out / BUILT[0], json.dumps(result, indent=2), before_rename=lambda: record.finish(result))
    if result["nonfinite"]:
        note(f"warning: the gradients of {result['nonfinite']} negatives are NaN or infinite and stay so")
    note_skipped(negatives)
    show_result(result, as_json=p["json_output"])


def _build(p: Mapping[str, Any], model: Any, examples: list[dict[str, Any]]) -> tuple[GradientIndex, int]:
    """The index, and how many rows an earlier run had written."""
    resumed: list[int] = []
    with progress("projecting") as bar:

        def update(done: int, total: int) -> None:
            resumed.append(done)
            bar(done, total)

        found = GradientIndex.build(
            model,
            examples,
            p["out"] / GRADIENTS,
            projection=str(p["projection"]),
            parameters=inputs.parameter_selection(p["parameters"]),
            reduction=str(p["reduction"]),
            dtype=inputs.scoring_dtype(p),
            on_progress=update,
            **{name: p[name] for name in ("dim", "seed", "pca_sample", "token_budget", "shard_rows")},
        )
    return found, resumed[0]


def _check_unfinished(out: Path, used: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """Raise FileExistsError if ``out`` holds shards of a run with other options or inputs, and say which."""
    record = read_record(out / "run.yaml")
    if not record or not (out / GRADIENTS).exists():
        return
    then, now = record.get("options", {}), json.loads(json.dumps(used))
    changed = [
        f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted({*then, *now} - {"out"})
        if then.get(name) != now.get(name)
    ]
    inputs_then = record.get("inputs_sha256", {})
    changed += [
        f"{file}: changed since"
        for file in sorted({*inputs_then, *hashes})
        if inputs_then.get(file) != hashes.get(file)
    ]
    if changed:
        raise FileExistsError(
            f"[index] {out} holds an unfinished index made with other settings ({'; '.join(changed)}): repeat those "
            "settings to resume, or pass --overwrite to start anew"
        )


def _result(out: Path, shards: GradientShards, resumed: int) -> dict[str, Any]:
    m = shards.manifest
    return {
        "index": str(out),
        "rows": m["rows"],
        "width": m["width"],
        "megabytes": m["rows"] * m["width"] * 4 / 1e6,
        "weights": len(m["weights"]),
        "nonfinite": shards.nonfinite_rows(),
        "token_budget": read_budget(shards.folder),
        "resumed_rows": resumed,
    }


_SCORE: o.Group = {
    "index": (o.option(Path, "Folder of an index build run, or one that Python built."), REQUIRED),
    "top_k": (o.option(int, "How many of the best to find and to score exactly.", min=1), REQUIRED),
    "candidates": (
        o.option(int | None, "How many of the best by estimate to score exactly; default 4 times --top-k.", min=1),
        None,
    ),
    "dtype": SCORING["dtype"],
    "window": SCORING["window"],
}


@verb(
    *(o.MODEL, _SCORE, o.NEGATIVES, o.OBJECTIVE, o.OUT, o.CURVATURE, o.LOSS, o.PARAMETERS, o.READING, o.SIGNAL, o.RUN),
    resume=RESUME,
)
def score(context: typer.Context) -> None:
    """Find the best negatives by an index's estimates and score them exactly; says what that may have missed."""
    p = context.params
    refuse_existing(context, RESULTS)
    if p["candidates"] is not None and p["candidates"] < p["top_k"]:
        raise ValueError(f"[index] expected --candidates of at least --top-k {p['top_k']}, got {p['candidates']}")
    folder = _gradients(p["index"])
    GradientShards(folder)  # one that is missing or unfinished ends here, before any work
    run = ScoringRun(context, [folder / "manifest.json"])
    found = GradientIndex(run.scorer.model, folder)
    examples = list(run.negatives)
    found.check(examples, str(p["reduction"]))
    run.start()
    run.show(run.rank_all(partial(run.scorer.topk_by_index, examples, found, p["top_k"], candidates=p["candidates"])))


def _gradients(folder: Path) -> Path:
    """The shards of an ``index build`` run; the folder itself where Python wrote them."""
    return folder / GRADIENTS if (folder / GRADIENTS).is_dir() else folder


index.command("build")(build)
index.command("score")(score)
