"""Result rows: JSON Lines, one line a (machine, benchmark, case), the latest measurement of it."""

import json
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from u2a_fast.bench.machine import describe
from u2a_fast.store.files import write_text

__all__ = [
    "Row",
    "bandwidth",
    "key",
    "make_row",
    "number",
    "read_rows",
    "require_rows",
    "spread",
    "write_rows",
]

Row = dict[str, Any]
KEY = ("machine", "benchmark", "case")


def make_row(benchmark: str, case: str, values: Mapping[str, Any], *, gate: str, device: str = "cpu") -> Row:
    """A row of ``values``; ``gate`` says in words which check this very run passed, and by how much.

    More than one CPU thread makes another case of it, "<case>-<n>threads".
    """
    origin = describe(device)
    if device == "cpu" and origin["threads"] > 1:
        case = f"{case}-{origin['threads']}threads"
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {"benchmark": benchmark, "case": case, "gate": gate, **values, **origin, "utc": when}


def key(row: Row) -> tuple[str, str, str]:
    """What a file holds one row of: machine, benchmark, case."""
    machine, benchmark, case = (row[name] for name in KEY)
    return machine, benchmark, case


def read_rows(path: Path) -> list[Row]:
    """Rows of a file, or of every ``*.jsonl`` in a folder; none where there is no such file.

    Raises ValueError for a line that is no row, with its number.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []
    return [row for file in files for row in _parse(file)]


def _parse(file: Path) -> Iterable[Row]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"[bench] expected JSON Lines in UTF-8 in {file}, got {error.reason}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _row(line, f"{file}, line {number}")


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line, parse_constant=_refuse)
    except ValueError as error:
        raise ValueError(f"[bench] expected a row as a JSON object, got {error} ({where})") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in KEY):
        raise ValueError(f"[bench] expected a row with machine, benchmark and case, got {line[:80]!r} ({where})")
    return row


def _refuse(constant: str) -> None:
    raise ValueError(f"the number {constant}")


def require_rows(path: Path) -> list[Row]:
    """The rows of a file or folder, at least one. FileNotFoundError or ValueError where there is none."""
    if not path.exists():
        raise FileNotFoundError(f"[bench] expected a file of rows, got no such file: {path}")
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"[bench] expected at least one row in {path}, got none")
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Merge ``rows`` into a file: each replaces the row of the same machine, benchmark and case, others stay."""
    merged = {key(row): row for row in read_rows(path)}
    for row in rows:
        merged[key(row)] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(merged[name], ensure_ascii=False, allow_nan=False) for name in sorted(merged)]
    write_text(path, "".join(f"{line}\n" for line in lines))


def bandwidth(row: Row) -> float:
    """The machine's memory rate in GB/s: the faster of copy and triad (older rows have the copy alone)."""
    names = [name for name in ("copy_gbytes", "triad_gbytes") if name in row]
    return max(number(row, name) for name in names or ["copy_gbytes"])


def number(row: Row, name: str) -> float:
    """The positive finite number ``name`` of a row; ValueError where it is not."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"[bench] expected {name} above 0 in the row of {row['case']}, got {value!r}")
    return float(value)


def spread(row: Row) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile of a call's seconds; ValueError where the row has no such times."""
    values = row.get("seconds")
    if isinstance(values, list) and len(values) == 3 and all(isinstance(value, (int, float)) for value in values):
        low, median, high = map(float, values)
        if 0 < low <= median <= high < math.inf:
            return low, median, high
    raise ValueError(f"[bench] expected seconds as 3 rising percentiles in the row of {row['case']}, got {values!r}")
