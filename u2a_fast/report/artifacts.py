"""What lies in a run's folder, whichever verbs wrote it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from u2a_fast.data.columns import KINDS, choose_layout
from u2a_fast.data.parsing import RowProblem, parse_row, plain_text
from u2a_fast.data.sources import open_source

__all__ = ["Artifacts", "Text", "collect"]

_LAYOUT_SAMPLE = 256  # rows whose columns decide how a file is read, as the readers do it


@dataclass(frozen=True)
class Text:
    """A negative as a person reads it; ``kind`` is its planted truth where the file has such a column."""

    prompt: str
    response: str
    kind: str | None


@dataclass
class Artifacts:
    """Everything found below a folder; what was not there is None or empty."""

    scores: dict[str, np.ndarray] | None = None
    selection: dict[str, np.ndarray] | None = None
    signal: dict[str, Any] | None = None
    skipped: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    realized: list[dict[str, Any]] = field(default_factory=list)
    demo: dict[str, Any] | None = None
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    texts: dict[str, Text] = field(default_factory=dict)

    @property
    def kinds(self) -> np.ndarray | None:
        """The planted truth of every scored negative, None unless all of them have one."""
        if self.scores is None:
            return None
        known = [self.texts[name].kind if name in self.texts else None for name in self.scores["id"]]
        return np.array(known, dtype=object) if known and None not in known else None


def _candidates(folder: Path, name: str) -> list[Path]:
    """Files of that name in the folder, in its subfolders, in an alignment's first round; the shallowest first."""
    patterns = (name, f"*/{name}", f"round-00/{name}", f"*/round-00/{name}")
    return list(dict.fromkeys(chain.from_iterable(sorted(folder.glob(pattern)) for pattern in patterns)))


def _table(folder: Path, name: str) -> dict[str, np.ndarray] | None:
    for path in _candidates(folder, name):
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"[report] expected a Parquet file, got {path}: {error}") from error
        return {column: table.column(column).to_numpy() for column in table.column_names}
    return None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"[report] expected JSON, got {path}: {error}") from error


def _first_json(folder: Path, name: str) -> Any:
    return next((_json(path) for path in _candidates(folder, name)), None)


def _json_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    for path in _candidates(folder, name):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return []


def _place(folder: Path, path: Path) -> str:
    relative = path.parent.relative_to(folder).as_posix()
    return folder.name if relative == "." else relative


def _add_metrics(found: Artifacts, folder: Path) -> None:
    for path in [*folder.glob("metrics.json"), *sorted(folder.glob("*/metrics.json"))]:
        content = _json(path)
        if isinstance(content, list):
            found.rounds = found.rounds or content
        elif not path.parent.name.startswith("round-"):  # a round's own figures are in the list beside it
            found.metrics[_place(folder, path)] = content


def _add_runs(found: Artifacts, folder: Path) -> None:
    for path in [*folder.glob("run.yaml"), *sorted(folder.glob("*/run.yaml"))]:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(content, Mapping):
            found.runs[_place(folder, path)] = dict(content)


def _read_texts(options: Mapping[str, Any], wanted: set[str]) -> dict[str, Text]:
    """The wanted rows of a run's negatives, {} where the file is no longer there (or is a name on a hub)."""
    source = options.get("negatives")
    if not isinstance(source, str) or not Path(source).exists():
        return {}
    kind, rows = KINDS["negatives"], open_source(source, split=options.get("split"))
    first = [row.columns for row, _ in zip(rows, range(_LAYOUT_SAMPLE), strict=False) if row.columns is not None]
    columns = options.get("columns")
    mapping = columns if isinstance(columns, Mapping) and columns else None
    layout = choose_layout(kind, chain.from_iterable(first), source, mapping)
    texts = {}
    for row in rows:
        if row.columns is None:
            continue
        try:
            parsed = parse_row(kind, layout, row.columns)
        except RowProblem:
            continue
        name = parsed.id if parsed.id is not None else f"row-{row.line}"
        if name in wanted:
            truth = row.columns.get("kind")
            texts[name] = Text(
                plain_text(parsed.prompt), plain_text(parsed.answers[0]), truth if isinstance(truth, str) else None
            )
    return texts


def collect(folder: Path) -> Artifacts:
    """Read what is there.

    Raises:
        FileNotFoundError: the folder does not exist, or holds nothing that a verb writes.
        ValueError: a file in it is not what its name says.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"[report] no such folder: {folder}")
    found = Artifacts(
        scores=_table(folder, "scores.parquet"),
        selection=_table(folder, "selection.parquet"),
        signal=_first_json(folder, "signal.json"),
        skipped=_json_lines(folder, "skipped.jsonl"),
        realized=_json_lines(folder, "realized.jsonl"),
        demo=_first_json(folder, "demo.json"),
    )
    _add_metrics(found, folder)
    _add_runs(found, folder)
    if not any((found.scores, found.selection, found.signal, found.rounds, found.metrics, found.demo)):
        raise FileNotFoundError(
            f"[report] expected a folder written by score, select, unlearn, align, evaluate or demo, {folder} holds "
            "no scores.parquet, selection.parquet, signal.json, metrics.json or demo.json"
        )
    wanted = {str(name) for name in found.scores["id"]} if found.scores is not None else set()
    for run in found.runs.values():
        if not found.texts and isinstance(run.get("options"), Mapping):
            found.texts = _read_texts(run["options"], wanted)
    return found
