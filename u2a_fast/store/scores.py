"""Scoring that survives interruption: a window of negatives at a time, each window one whole file on disk.

While it runs, ``<out>/parts`` holds ``manifest.json`` (what determines the scores) and one Parquet file a finished
window. At the end the parts become ``<out>/scores.parquet`` and the folder goes.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from u2a_fast.data.packing import longest_examples
from u2a_fast.store.budget import read_budget, write_budget
from u2a_fast.store.files import read_json, write_atomically, write_text

__all__ = [
    "SCHEMA",
    "ScoreSummary",
    "Scorer",
    "check_target",
    "claim_parts",
    "read_part",
    "read_scores",
    "read_table",
    "score_to_parquet",
    "write_scores",
]

_REQUIRED = pa.schema([("id", pa.string()), ("score", pa.float64()), ("nll", pa.float64()), ("tokens", pa.int64())])
SCHEMA = _REQUIRED.append(pa.field("exact", pa.bool_()))
UNFIT_SCHEMA = SCHEMA.append(pa.field("fits", pa.bool_()))  # of files with a negative that does not fit in memory
SHARES = {"per_token": "token_scores", "per_module": "module_scores"}  # option -> a column that it alone adds
NONFINITE_SHOWN = 20
CALIBRATION = 256  # at least as many as a scorer fits its curvature to

Progress = Callable[[int, int | None], None]
Finish = Callable[["ScoreSummary"], object]


class Scorer(Protocol):
    """What is asked of a scorer: arrays id, score, nll, tokens, exact and a report for token examples.

    One with a ``budget`` (``TokenBudget``) and a method ``preflight`` is asked to find its budget before the first
    window, on the longest negatives of all where these are known.
    """

    @property
    def score(self) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class ScoreSummary:
    """What a finished run wrote, and how much of it an earlier run had done already."""

    path: Path
    rows: int
    nonfinite: int
    nonfinite_ids: tuple[str, ...]  # the first ones that have a score
    resumed_rows: int
    report: Any = None  # of the last scores that were made
    unfit: int = 0  # of the nonfinite, those that do not fit in memory even alone
    token_budget: Mapping[str, int] = field(default_factory=dict)  # most tokens a batch by kind of loop, as found


def check_target(out_dir: Path | str, fingerprint: Mapping[str, Any], *, window: int = 2048) -> None:
    """Raise FileExistsError if ``out_dir`` holds finished scores, or a part of scores made from something else.

    ``fingerprint`` is anything that JSON can hold and that determines the scores: model and data hashes, options.
    """
    out = Path(out_dir)
    if (out / "scores.parquet").exists():
        raise FileExistsError(f"[score] {out / 'scores.parquet'} exists: pass overwrite to replace it")
    path = out / "parts" / "manifest.json"
    if not path.exists():
        return
    stored = read_json(path, ("key", "content"))
    wanted = _manifest(fingerprint, window)
    if stored["key"] != wanted["key"]:
        raise FileExistsError(
            f"[score] {out} holds unfinished scores made with other settings ({_differences(stored, wanted)}): "
            "repeat those settings to resume, or pass overwrite to start anew"
        )


def claim_parts(out: Path, fingerprint: Mapping[str, Any], window: int) -> Path:
    """The folder ``out/parts`` of unfinished results, made where it was not, with what ``check_target`` compares."""
    parts = out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    write_text(parts / "manifest.json", json.dumps(_manifest(fingerprint, window), indent=2))
    return parts


def score_to_parquet(
    scorer: Scorer,
    negatives: Iterable[Mapping[str, Any]],
    out_dir: Path | str,
    *,
    window: int = 2048,
    on_progress: Progress | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    before_rename: Finish | None = None,
    per_token: bool = False,
    per_module: bool = False,
) -> ScoreSummary:
    """Score ``negatives`` in order into ``out_dir/scores.parquet``, resuming a broken-off run.

    Columns are those of ``SCHEMA``, and ``fits`` (``UNFIT_SCHEMA``) where a negative does not fit in memory.
    The windows are the same in every run, so a resumed run writes the same bytes as an uninterrupted one. Memory is
    that of one window. NaN and infinite scores are kept and counted. ``on_progress(done, total)`` is called at the
    start and after each window; total is None for a stream. ``before_rename(summary)`` is called once all scores are
    on disk, before the file is there: a run that is killed until then goes on where it was. ``per_token`` adds the
    columns ``token_ids`` and ``token_scores`` (lists), ``per_module`` the column ``module_scores`` (a struct of the
    modules' paths): shares of each score, as ``InfluenceScorer.score`` gives them. ``fingerprint`` should tell them.
    Raises FileExistsError as ``check_target`` does, unless ``overwrite``, which removes what was there, and where the
    finished windows hold other negatives than these; ValueError for a scorer whose rows depend on all negatives, and
    for a damaged window.
    """
    if getattr(scorer, "mode", None) == "shortlist":
        raise ValueError(
            '[score] mode "shortlist" ranks all negatives at once, not a window at a time: call scorer.score on all of '
            'them and write_scores, or take "lowrank" here'
        )
    if window < 1:
        raise ValueError(f"[score] expected a window of at least 1, got {window}")
    out = Path(out_dir)
    total = _length(negatives)
    if overwrite:
        _clear(out)
    check_target(out, fingerprint or {}, window=window)
    parts = claim_parts(out, fingerprint or {}, window)
    budget: dict[str, int] = getattr(getattr(scorer, "budget", None), "found", {})
    budget.update(read_budget(parts))
    shares = {name: True for name, wanted in zip(SHARES, (per_token, per_module), strict=True) if wanted}
    report = on_progress or _no_progress
    done = finished = _finished_rows(parts)
    report(done, total)
    made: Any = None
    for index, rows in enumerate(_windows(negatives, window)):
        part = parts / f"part-{index:06d}.parquet"
        if part.exists():
            _check_part(part, rows, shares)
            if index == 0:
                # A scorer may fit its curvature to the first negatives that it sees: let it see them again.
                made = scorer.score(rows[:CALIBRATION])
            continue
        if index == 0 and total is not None and total > window and hasattr(scorer, "preflight"):
            scorer.preflight(_longest(negatives), rows)
        made = scorer.score(rows, **shares)
        write_budget(parts, budget)
        _write_part(part, made, rows)
        done += len(rows)
        report(done, total)
    return _merge(out, finished, getattr(made, "report", None), dict(budget), before_rename)


def write_scores(
    path: Path, scores: Any, *, resumed_rows: int = 0, before_rename: Finish | None = None
) -> ScoreSummary:
    """Write ``Scores`` that were made at once into the Parquet file ``path``, whole; columns as ``score_to_parquet``'s.

    ``before_rename`` is called as in ``score_to_parquet``.
    """
    table = _table(scores, [str(i) for i in scores.id])
    bad, shown = _nonfinite(table), tuple(_scored_nonfinite_ids(table)[:NONFINITE_SHOWN])
    budget = getattr(scores.report, "token_budget", {})
    summary = ScoreSummary(path, len(scores), len(bad), shown, resumed_rows, scores.report, _unfit(table), budget)
    finish = None if before_rename is None else partial(before_rename, summary)
    write_atomically(path, lambda temporary: pq.write_table(table, temporary), before_rename=finish)
    return summary


def read_scores(path: Path | str) -> dict[str, np.ndarray]:
    """The columns of a scores file as arrays. ``path`` is the file or the folder that holds ``scores.parquet``.

    Without a column ``exact``, all scores are; without ``fits``, all negatives fit in memory.
    """
    columns = read_table(path, "scores.parquet", _REQUIRED, optional=UNFIT_SCHEMA)
    return {name: np.ones(len(columns["id"]), dtype=bool) for name in ("exact", "fits")} | columns


def read_table(
    path: Path | str, name: str, schema: pa.Schema, *, optional: pa.Schema | None = None
) -> dict[str, np.ndarray]:
    """The columns of ``schema`` in a Parquet file, or in the file ``name`` of a folder; of ``optional`` what is there.

    Raises FileNotFoundError where there is none, ValueError where it is no Parquet file, lacks a column or holds other
    values in it than the schema says.
    """
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"[store] no such file: {file}")
    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"[store] expected a Parquet file, got {file}: {error}") from error
    if not set(schema.names) <= set(table.column_names):
        raise ValueError(f"[store] expected the columns {schema.names} in {file}, got {table.column_names}")
    others = [field for field in optional or () if field.name not in schema.names and field.name in table.column_names]
    return {field.name: _column(table.column(field.name), field, file) for field in (*schema, *others)}


def _column(column: pa.ChunkedArray, field: pa.Field, file: Path) -> np.ndarray:
    """The column in the type of ``field``; a missing number is NaN, as pandas writes it, and nothing else may miss."""
    try:
        found = column.cast(field.type)
    except pa.ArrowException as error:
        raise ValueError(f"[store] expected {field.type} in the column {field.name} of {file}: {error}") from error
    if found.null_count and not pa.types.is_floating(field.type):
        raise ValueError(f"[store] expected no nulls in the column {field.name} of {file}, got {found.null_count}")
    return found.to_numpy()


def _no_progress(done: int, total: int | None) -> None:
    pass


def _length(negatives: Any) -> int | None:
    try:
        return len(negatives)
    except TypeError:
        return None


def _manifest(fingerprint: Mapping[str, Any], window: int) -> dict[str, Any]:
    content = json.loads(json.dumps({"window": window, **fingerprint}, sort_keys=True))
    return {"key": sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(), "content": content}


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    old, new = _flat(stored["content"]), _flat(wanted["content"])
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name)!r} then, {new.get(name)!r} now" for name in names)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _clear(out: Path) -> None:
    (out / "scores.parquet").unlink(missing_ok=True)
    shutil.rmtree(out / "parts", ignore_errors=True)


def _part_files(parts: Path) -> list[Path]:
    return sorted(parts.glob("part-*.parquet"))


def _finished_rows(parts: Path) -> int:
    return sum(_undamaged(part, partial(pq.read_metadata, part)).num_rows for part in _part_files(parts))


def read_part(path: Path, **options: Any) -> pa.Table:
    """A finished window; ValueError, with the file's name and the way out, where it is damaged."""
    return _undamaged(path, lambda: pq.read_table(path, **options))


def _schema(part: Path) -> pa.Schema:
    return _undamaged(part, lambda: pq.read_schema(part))


def _with_column(schema: pa.Schema, fits: bool) -> pa.Schema:
    """``schema`` with the column ``fits`` behind those of every run, or without it."""
    others = [field for field in schema if field.name != "fits"]
    column = [UNFIT_SCHEMA.field("fits")] if fits else []
    return pa.schema([*others[: len(SCHEMA)], *column, *others[len(SCHEMA) :]])


def _undamaged(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"[score] expected a finished window, got {path}: {error}; without this file its window is scored again"
        ) from error


def _windows(negatives: Iterable[Mapping[str, Any]], window: int) -> Iterator[list[Mapping[str, Any]]]:
    stream = iter(negatives)
    while rows := list(islice(stream, min(window, sys.maxsize))):
        yield rows


def _check_part(part: Path, rows: list[Mapping[str, Any]], shares: Mapping[str, bool]) -> None:
    stored = read_part(part, columns=["id"]).column("id").to_pylist()
    if stored != [str(row["id"]) for row in rows]:
        raise FileExistsError(f"[score] {part} holds scores of other negatives: pass overwrite to start anew")
    held = {option for option, column in SHARES.items() if column in _schema(part).names}
    if held != set(shares):
        raise FileExistsError(f"[score] {part} holds shares {sorted(held)}, not {sorted(shares)}: pass overwrite")


def _write_part(part: Path, scores: Any, rows: list[Mapping[str, Any]]) -> None:
    ids = [str(row["id"]) for row in rows]
    assert [str(i) for i in scores.id] == ids, "the scorer keeps ids and order"
    table = _table(scores, ids)
    write_atomically(part, lambda temporary: pq.write_table(table, temporary))


def _table(scores: Any, ids: list[str]) -> pa.Table:
    columns = [
        pa.array(ids, pa.string()),
        pa.array(np.asarray(scores.score, dtype=np.float64)),
        pa.array(np.asarray(scores.nll, dtype=np.float64)),
        pa.array(np.asarray(scores.tokens, dtype=np.int64)),
        pa.array(np.asarray(scores.exact, dtype=bool)),
    ]
    fits = np.asarray(getattr(scores, "fits", True), dtype=bool)
    if fits.all():
        return _with_shares(pa.table(columns, schema=SCHEMA), scores)
    return _with_shares(pa.table([*columns, pa.array(fits)], schema=UNFIT_SCHEMA), scores)


def _fits(table: pa.Table) -> np.ndarray:
    rows = np.ones(table.num_rows, dtype=bool)
    return table.column("fits").to_numpy() if "fits" in table.column_names else rows


def _unfit(table: pa.Table) -> int:
    return int((~_fits(table)).sum())


def _scored_nonfinite_ids(table: pa.Table) -> list[str]:
    """Ids of the rows that fit in memory and still have a NaN or infinite score or NLL."""
    fits, ids = _fits(table), table.column("id")
    return [ids[int(i)].as_py() for i in _nonfinite(table) if fits[i]]


def _longest(negatives: Any) -> list[Mapping[str, Any]]:
    """The longest negatives: those that the source knows, or all where they are in memory."""
    known = getattr(negatives, "longest", None)
    return longest_examples(negatives) if known is None and isinstance(negatives, Sequence) else list(known or ())


def _with_shares(table: pa.Table, scores: Any) -> pa.Table:
    """The table, with columns of the tokens' and the modules' shares where ``scores`` has them."""
    if getattr(scores, "token_scores", None) is not None:
        table = table.append_column("token_ids", pa.array(scores.token_ids, pa.list_(pa.int64())))
        table = table.append_column("token_scores", pa.array(scores.token_scores, pa.list_(pa.float64())))
    if getattr(scores, "module_scores", None) is not None:
        parts = [pa.array(part) for part in scores.module_scores.values()]
        shares = pa.StructArray.from_arrays(parts, names=list(scores.module_scores))
        table = table.append_column("module_scores", shares)
    return table


def _nonfinite(table: pa.Table) -> np.ndarray:
    """Positions of rows whose score or NLL is NaN or infinite."""
    finite = np.isfinite(table.column("score").to_numpy()) & np.isfinite(table.column("nll").to_numpy())
    return np.flatnonzero(~finite)


def _merge(
    out: Path, resumed_rows: int, report: Any, budget: Mapping[str, int], before_rename: Finish | None
) -> ScoreSummary:
    parts = _part_files(out / "parts")
    if not parts:
        shutil.rmtree(out / "parts")
        raise ValueError("[score] expected at least one negative, got none")
    rows, nonfinite, unfit = 0, 0, 0
    ids: list[str] = []
    with_fits = {part for part in parts if "fits" in _schema(part).names}

    def write(temporary: Path) -> None:
        nonlocal rows, nonfinite, unfit
        # But for that column every part has the same: _check_part sees to it.
        schema = _with_column(_schema(parts[0]), bool(with_fits))
        with pq.ParquetWriter(temporary, schema) as writer:
            for part in parts:
                table = read_part(part, schema=_with_column(schema, part in with_fits))
                if with_fits and part not in with_fits:
                    table = table.append_column("fits", pa.array(_fits(table))).select(schema.names)
                writer.write_table(table)
                bad = _nonfinite(table)
                rows, nonfinite, unfit = rows + table.num_rows, nonfinite + len(bad), unfit + _unfit(table)
                ids.extend(_scored_nonfinite_ids(table)[: NONFINITE_SHOWN - len(ids)])

    def summary() -> ScoreSummary:
        path = out / "scores.parquet"
        return ScoreSummary(path, rows, nonfinite, tuple(ids), resumed_rows, report, unfit, budget)

    write_atomically(out / "scores.parquet", write, before_rename=lambda: before_rename and before_rename(summary()))
    shutil.rmtree(out / "parts")
    return summary()
