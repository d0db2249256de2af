"""``u2a-fast bench``: how fast the ops are here, against what this machine can do, and whether that changed."""

import os
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from u2a_fast.bench.compare import compare as compare_rows
from u2a_fast.bench.measure import Settings, measure
from u2a_fast.bench.models import layers, model_config
from u2a_fast.bench.roofline import draw_roofline, roofline_format
from u2a_fast.bench.rows import Row, read_rows, require_rows, write_rows
from u2a_fast.bench.shapes import MAX_SIZE, choose, parse_lengths, parse_shape, sized
from u2a_fast.bench.table import case_table, comparison_table, row_table
from u2a_fast.cli import options as o
from u2a_fast.cli.session import REQUIRED, note, progress, show_result, verb
from u2a_fast.testing import Case, cost

__all__ = ["bench"]

bench = typer.Typer(
    name="bench",
    help="Time the ops on this machine, gated on right answers: list, run, compare, roofline.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class BenchDtype(StrEnum):
    """Floating-point formats that have kernels."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class BenchDevice(StrEnum):
    """Where ops are timed."""

    cpu = "cpu"
    cuda = "cuda"


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_QUIET: o.Group = {name: o.RUN[name] for name in ("json_output", "debug")}
_CASES: o.Group = {
    "op": (o.option(list[str] | None, "An op, e.g. ghost_dot; repeatable; default all."), None),
    "shape": (o.option(list[str] | None, "Sizes by letter, e.g. N=4096,I=1024,O=4096,K=1; repeatable."), None),
    "like": (o.option(str | None, "Sizes of a model, e.g. meta-llama/Llama-3.2-1B, or of a config.json."), None),
    "tokens": (
        o.option(int | None, "N; default 512 on the CPU, 4096 on a GPU, less for a large head.", min=1, max=MAX_SIZE),
        None,
    ),
    "lengths": (o.option(str | None, "Tokens of every example (default 128), or of each: 64,128,7."), None),
    "dtype": (o.option(list[BenchDtype] | None, "Format; repeatable; default fp32 and bf16."), None),
    "device": (o.option(BenchDevice | None, "Default CUDA where there is one."), None),
}
_RUN: o.Group = {
    "threads": (o.option(int | None, "CPU threads; default PyTorch's own choice.", min=1), None),
    "rounds": (o.option(int | None, "Samples of every case; default 5 on the CPU, 11 on a GPU.", min=2), None),
    "quick": (o.option(bool, "3 rounds and small ceilings: a first look.", "--quick"), False),
    "out": (o.option(Path | None, "Merge the rows into this JSON Lines file, case by case."), None),
    "plot": (o.option(Path | None, "Roofline of the rows, PNG or SVG."), None),
}


def _device(p: dict[str, Any]) -> str:
    return str(p["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))


def _cases(p: dict[str, Any]) -> list[Case]:
    names, device = p["op"] or [], _device(p)
    dtypes = [_DTYPES[str(name)] for name in p["dtype"] or ("fp32", "bf16")]
    lengths = parse_lengths(p["lengths"]) if p["lengths"] is not None else ()
    if p["shape"] or p["like"] is not None:
        shapes = [parse_shape(text) for text in p["shape"] or []]
        model = layers(model_config(p["like"])) if p["like"] is not None else []
        return sized(names, dtypes, device, shapes=shapes, model=model, tokens=p["tokens"], lengths=lengths)
    if p["tokens"] or lengths:
        raise ValueError("[bench] expected --tokens and --lengths with --shape or --like, got neither")
    return choose(names, dtypes, device)


def _show(table: Table) -> None:
    console = Console(soft_wrap=False)
    # A file or a pipe has no width to fold lines to.
    (console if console.is_terminal else Console(width=240)).print(table)


@verb(_CASES, _QUIET, resume="nothing was changed")
def list_cases(context: typer.Context) -> None:
    """List the cases that the same options of "run" would time."""
    cases = _cases(context.params)
    if context.params["json_output"]:
        found = [{"case": case.id, **dict(zip(("flops", "bytes"), cost(case), strict=True))} for case in cases]
        show_result({"cases": found}, as_json=True)
    else:
        _show(case_table(cases))


@verb(_CASES, _RUN, _QUIET, resume="the rows measured so far are in --out; the same command replaces them")
def run(context: typer.Context) -> None:
    """Time cases, each only once its result is right; exit code 1 if one is wrong."""
    p = context.params
    cases = _cases(p)
    _check_targets(p)
    settings = _settings(p)
    rows: list[Row] = []
    try:
        wrong = _measure(cases, settings, p["out"], rows)
    finally:  # an interrupted run shows what it has
        if rows and not p["json_output"]:
            _show(row_table(rows))
    if p["plot"] and rows:
        draw_roofline(rows, p["plot"])
    if p["json_output"]:
        show_result({"rows": rows, "wrong": wrong}, as_json=True)
    raise typer.Exit(1 if wrong else 0)


def _check_targets(p: dict[str, Any]) -> None:
    """Refuse, before any work, what could not be written afterwards."""
    if p["plot"]:
        roofline_format(p["plot"])
    for name in ("out", "plot"):
        if p[name] and p[name].is_dir():
            raise ValueError(f"[bench] expected --{name} to be a file, got the folder {p[name]}")
        if p[name]:
            p[name].parent.mkdir(parents=True, exist_ok=True)
    if p["out"]:
        read_rows(p["out"])


def _settings(p: dict[str, Any]) -> Settings:
    device = _device(p)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("[bench] expected a CUDA device for --device cuda, got a machine without one")
    if p["threads"]:
        # OpenMP ends the process where it cannot start as many
        if p["threads"] > (os.cpu_count() or 1):
            raise ValueError(f"[bench] expected at most {os.cpu_count()} --threads, the machine's, got {p['threads']}")
        torch.set_num_threads(p["threads"])
    settings = Settings.of(device, p["quick"])
    return replace(settings, rounds=p["rounds"]) if p["rounds"] else settings


def _measure(cases: Sequence[Case], settings: Settings, out: Path | None, rows: list[Row]) -> dict[str, list[str]]:
    """Append a row to ``rows`` for every case that is right; what is wrong with the others, by case."""
    wrong = {}
    with progress("bench") as update:
        for done, case in enumerate(cases):
            update(done, len(cases))
            found = measure(case, settings)
            if isinstance(found, list):
                wrong[case.id] = found
                note(f"{case.id}: wrong, not timed: {'; '.join(found)}")
                continue
            rows.append(found)
            if out:
                write_rows(out, [found])
        update(len(cases), len(cases))
    return wrong


def _rows_file(text: str) -> Any:
    return Annotated[Path, typer.Argument(help=text)]


_FILES: o.Group = {
    "old": (_rows_file("Rows before: a file, or a folder of them."), REQUIRED),
    "new": (_rows_file("Rows now."), REQUIRED),
    "threshold": (o.option(float, "Least change to count, as a fraction, however small the noise."), 0.05),
}


@verb(_FILES, _QUIET, resume="nothing was changed")
def compare(context: typer.Context) -> None:
    """Compare two files of rows; exit code 1 if a case became slower beyond the noise of both."""
    p = context.params
    found = compare_rows(require_rows(p["old"]), require_rows(p["new"]), threshold=p["threshold"])
    if p["json_output"]:
        show_result(found.to_dict(), as_json=True)
    else:
        _show(comparison_table(found))
        for case, reason in found.apart:
            print(f"not comparable: {case}: {reason}")
        print(f"{len(found.regressions)} of {len(found.changes)} cases became slower beyond noise")
    raise typer.Exit(1 if found.regressions else 0)


_PLOT: o.Group = {
    "rows": (_rows_file("Rows of a run: a file, or a folder of them."), REQUIRED),
    "image": (_rows_file("The plot, PNG or SVG."), REQUIRED),
}


@verb(_PLOT, _QUIET, resume="run the same command again")
def roofline(context: typer.Context) -> None:
    """Draw rows under the roofs that they measured."""
    p = context.params
    draw_roofline(require_rows(p["rows"]), p["image"])
    show_result({"roofline": str(p["image"])}, as_json=p["json_output"])


for name, command in (("list", list_cases), ("run", run), ("compare", compare), ("roofline", roofline)):
    bench.command(name)(command)
