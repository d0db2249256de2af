"""Where the committed rows live; what a row is, ``u2a_fast.bench.rows`` says."""

from pathlib import Path

from benchmarks import ROOT
from u2a_fast.bench.machine import slug
from u2a_fast.bench.rows import Row

__all__ = ["RESULTS", "results_file"]

RESULTS = ROOT / "benchmarks" / "results"


def results_file(row: Row) -> Path:
    """Where the committed rows of a row's machine live."""
    return RESULTS / f"{slug(row['machine'])}.jsonl"
