"""Result rows: JSON Lines, one line a (machine, benchmark, case), the latest measurement of it."""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, describe, slug
from u2a_fast.store.files import write_text

__all__ = ["RESULTS", "Row", "make_row", "read_rows", "results_file", "write_rows"]

RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


def make_row(benchmark: str, case: str, values: Mapping[str, Any], *, gate: str, device: str = "cpu") -> Row:
    """A row of ``values``; ``gate`` says in words which check this very run passed, and by how much.

    More than one CPU thread makes another case of it, "<case>-<n>threads".
    """
    origin = describe(device)
    if device == "cpu" and origin["threads"] > 1:
        case = f"{case}-{origin['threads']}threads"
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {"benchmark": benchmark, "case": case, "gate": gate, **values, **origin, "utc": when}


def read_rows(path: Path) -> list[Row]:
    """Rows of a file, or of every ``*.jsonl`` in a folder; none where there is no such file."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line]


def _key(row: Row) -> tuple[str, str, str]:
    return row["machine"], row["benchmark"], row["case"]


def results_file(row: Row) -> Path:
    """Where the committed rows of a row's machine live."""
    return RESULTS / f"{slug(row['machine'])}.jsonl"


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Merge ``rows`` into a file: each replaces the row of the same machine, benchmark and case, others stay."""
    merged = {_key(row): row for row in read_rows(path)}
    for row in rows:
        merged[_key(row)] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(merged[key], ensure_ascii=False, allow_nan=False) for key in sorted(merged)]
    write_text(path, "".join(f"{line}\n" for line in lines))
