"""What every verb shares: errors as one line, results on stdout, progress on stderr, options from a file."""

import inspect
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError

from u2a_fast.data import Negatives, Rows
from u2a_fast.manifest import read_options, recorded_command
from u2a_fast.models.memory import is_out_of_memory
from u2a_fast.store import lock_folder, write_text

__all__ = [
    "REQUIRED",
    "claim_folder",
    "command_name",
    "load_config",
    "note",
    "note_skipped",
    "progress",
    "refuse_existing",
    "run_options",
    "show_result",
    "verb",
    "write_skipped",
]

REQUIRED = inspect.Parameter.empty  # the default of an option that must be given
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
USER_ERROR = 2
SHORT_LIST = 64  # items that are printed, the chosen blocks of a large model for one; JSON and files have all
OUTSIDE = (SafetensorError, torch.OutOfMemoryError, MemoryError)  # a full disk, a full device, a full machine
NOT_RECORDED = {"config", "json_output", "debug", "overwrite", "explain"}
COLUMN_OPTIONS = {"columns", "objective_columns"}
PATHS_OR_NAMES = {"model", "negatives", "preferences", "rewards", "positives", "retain"}


def verb(*groups: Mapping[str, tuple[Any, Any]], resume: str) -> Callable[[Callable[[typer.Context], None]], Any]:
    """Make a Typer command of a function that reads its options, those of ``groups``, from ``context.params``.

    A user's mistake ends in one line and exit code 2, Ctrl-C in exit code 130 and the line ``resume``.
    """
    declared = {name: entry for group in groups for name, entry in group.items()}

    def decorate(run: Callable[[typer.Context], None]) -> Any:
        def command(context: typer.Context, **_: Any) -> None:
            try:
                run(context)
            except KeyboardInterrupt:
                note(f"interrupted: {resume}")
                raise typer.Exit(INTERRUPTED) from None
            except (ValueError, TypeError, OSError, FloatingPointError, RuntimeError, *OUTSIDE) as error:
                if context.params["debug"] or not _is_expected(error):
                    raise
                note(f"error: {error}")
                raise typer.Exit(USER_ERROR) from None

        # Typer reads both the signature and the annotations.
        kinds = {"context": typer.Context, **{name: kind for name, (kind, _) in declared.items()}}
        parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
        for name, (kind, default) in declared.items():
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = kinds
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        return command

    return decorate


def _is_expected(error: Exception) -> bool:
    """Whether an error is the user's or the machine's: of RuntimeErrors, what PyTorch says where memory is full."""
    known = (NotImplementedError, *OUTSIDE)
    return not isinstance(error, RuntimeError) or isinstance(error, known) or is_out_of_memory(error)


def command_name(context: typer.Context) -> str:
    """The verb as it is typed and recorded: "score", "index build"."""
    names, parent = [str(context.info_name)], context.parent
    while parent is not None and parent.parent is not None:
        names.append(str(parent.info_name))
        parent = parent.parent
    return " ".join(reversed(names))


def load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the options of a YAML file as defaults, so that the command line wins. An eager option's callback."""
    if path is None or context.resilient_parsing:
        return path
    command = command_name(context)
    try:
        options = {str(name).replace("-", "_"): value for name, value in read_options(path, command).items()}
        known = {str(parameter.name) for parameter in context.command.params} - NOT_RECORDED
        if unknown := sorted(set(options) - known):
            raise ValueError(f"[config] {path} holds options that {command} does not have: {', '.join(unknown)}")
    except (OSError, ValueError) as error:
        note(f"error: {error}")
        raise typer.Exit(USER_ERROR) from None
    context.default_map = {name: _as_given(value) for name, value in options.items() if value is not None}
    return path


def _as_given(value: Any) -> Any:
    """A recorded value as the command line gives it: a mapping is a list of field=column."""
    return [f"{field}={column}" for field, column in value.items()] if isinstance(value, Mapping) else value


def run_options(context: typer.Context, **resolved: Any) -> dict[str, Any]:
    """Every option of this run as it was used, to be written to run.yaml: paths absolute, defaults filled in."""
    options = {name: value for name, value in context.params.items() if name not in NOT_RECORDED}
    return {name: _recorded(name, value) for name, value in (options | resolved).items()}


def column_map(pairs: Sequence[str] | None) -> dict[str, str] | None:
    """["prompt=question", ...] as a mapping; None for nothing."""
    if not pairs:
        return None
    if bad := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"[columns] expected field=column, got {bad[0]!r}")
    return dict(pair.split("=", 1) for pair in pairs)


def _recorded(name: str, value: Any) -> Any:
    if name in COLUMN_OPTIONS:
        return column_map(value)
    if isinstance(value, Path):
        return str(value.absolute())
    # A model or a source may be a hub name: only what exists here is a path.
    is_path = name in PATHS_OR_NAMES and isinstance(value, str) and Path(value).exists()
    return str(Path(value).absolute()) if is_path else value


def refuse_existing(context: typer.Context, names: tuple[str, ...]) -> None:
    """Raise FileExistsError if ``--out`` is a file, or holds ``names`` or another verb's run to keep."""
    out, overwrite = context.params["out"], context.params["overwrite"]
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out: expected a folder, got the file {out}")
    found = [name for name in names if (out / name).exists()]
    if found and not overwrite:
        raise FileExistsError(f"--out: {out} holds {', '.join(found)}: pass --overwrite to replace it")
    other = recorded_command(out / "run.yaml")
    if other not in (None, command_name(context)) and not overwrite:
        raise FileExistsError(f"--out: {out} holds a run of {other!r}: choose another folder, or pass --overwrite")


def claim_folder(context: typer.Context, names: tuple[str, ...], more: tuple[str, ...] = ()) -> None:
    """Make ``--out`` and keep other runs out of it until the verb ends; refuse what one has written meanwhile.

    ``names`` are the results that nothing but ``--overwrite`` replaces; with it they are removed here, and so is what
    else (``more``, patterns) earlier runs of the verb wrote.
    """
    out = context.params["out"]
    out.mkdir(parents=True, exist_ok=True)
    context.call_on_close(lock_folder(out))
    refuse_existing(context, names)
    if context.params["overwrite"]:
        _remove(out, {*names, *more})


def _remove(out: Path, patterns: set[str]) -> None:
    for path in [path for pattern in patterns for path in out.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def note(text: str) -> None:
    """A line on stderr, as it is."""
    print(text, file=sys.stderr, flush=True)


def show_result(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The outcome on stdout: one JSON object, or a line for each single value, interval and short list in it."""
    if as_json:
        print(json.dumps(_strict(result), ensure_ascii=False, allow_nan=False))
        return
    for name, value in result.items():
        if isinstance(value, Mapping):
            show_result({f"{name} {part}": item for part, item in value.items()}, as_json=False)
        elif name.endswith("_interval"):
            print(f"{name.replace('_', ' ')}: {', '.join(f'{end:.6g}' for end in value)}")
        elif not isinstance(value, (list, tuple)):
            print(f"{name.replace('_', ' ')}: {_in_words(value)}")
        elif 0 < len(value) <= SHORT_LIST and not any(isinstance(item, (list, tuple, Mapping)) for item in value):
            print(f"{name.replace('_', ' ')}: {', '.join(map(_in_words, value))}")


def _in_words(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_skipped(out: Path, *sources: Negatives | Rows) -> None:
    """List the rows that were left out in ``out/skipped.jsonl``, which is empty if none was."""
    bad = [row for source in sources for row in source.report.bad]
    write_text(out / "skipped.jsonl", "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in bad))


def note_skipped(*sources: Negatives | Rows) -> None:
    """Say on stderr how many rows were left out, and how many prompts cut."""
    for report in (source.report for source in sources):
        if report.bad_count:
            note(f"{report.reader}: {report.bad_count} bad rows left out, listed in skipped.jsonl")
        if report.truncated:
            note(f"{report.reader}: {report.truncated} prompts cut from the left to fit max_length")


def _strict(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null here; files keep them."""
    if isinstance(value, Mapping):
        return {str(name): _strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@contextmanager
def progress(label: str) -> Iterator[Callable[..., None]]:
    """A bar with counts and the time left on stderr; yields ``update(done, total, label=label)``.

    A new label starts the bar, its clock included, again.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        current = label

        def update(done: int, total: int | None, label: str = label) -> None:
            nonlocal current
            if label != current:
                current = label
                bar.reset(task, description=label)
            bar.update(task, completed=done, total=total)

        yield update
