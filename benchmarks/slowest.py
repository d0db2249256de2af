"""Runs the case of benchmarks.run that is farthest from its limit, for a profiler to watch.

ncu --clock-control none python -m benchmarks.slowest --rows rows.jsonl
python -m benchmarks.slowest --rows rows.jsonl --profile      (torch.profiler's table: no ncu, or the CPU)
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from u2a_fast import ops, testing
from u2a_fast.bench.cases import timing_cases
from u2a_fast.bench.rows import Row, read_rows

__all__ = ["main", "slowest"]

CALLS = 3


def slowest(rows: Sequence[Row], device: str) -> testing.Case:
    """The case of ``timing_cases`` whose row has the lowest share of its limit. ValueError where none has one."""
    cases = {f"{case.id}-{device}": case for case in timing_cases(device)}
    timed = [row for row in rows if (row["benchmark"], row["device"]) == ("ops", device) and row["case"] in cases]
    if not timed:
        raise ValueError(f"[slowest] expected rows of benchmarks.run on {device}, got none of its cases")
    return cases[min(timed, key=lambda row: row["of_limit"])["case"]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where the rows have any, else cpu")
    parser.add_argument("--profile", action="store_true", help="print torch.profiler's table")
    options = parser.parse_args(argv)
    rows = read_rows(options.rows)
    device = options.device or ("cuda" if any(row["device"] == "cuda" for row in rows) else "cpu")
    try:
        case = slowest(rows, device)
    except ValueError as error:
        parser.error(str(error))
    arguments = testing.inputs(case, device)
    op = getattr(ops, case.op)
    op(**arguments)  # compiles
    if not options.profile:
        for _ in range(CALLS):
            op(**arguments)
        print(f"ran {case.id} {CALLS} times")
        return 0
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as record:
        for _ in range(CALLS):
            op(**arguments)
        if device == "cuda":
            torch.cuda.synchronize()
    print(case.id)
    print(record.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=15))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
