"""Runs the GPU case that is farthest from its limit, for a profiler to watch.

ncu --clock-control none python -m benchmarks.slowest --rows rows.jsonl
python -m benchmarks.slowest --rows rows.jsonl --profile      (torch.profiler's table, where there is no ncu)
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
    """The case of the op row with the lowest share of its limit. ValueError where there is none."""
    timed = [row for row in rows if (row["benchmark"], row["device"]) == ("ops", device)]
    if not timed:
        raise ValueError(f"[slowest] expected rows of ops on {device}, got none")
    worst = min(timed, key=lambda row: row["of_limit"])
    return next(case for case in timing_cases(device) if f"{case.id}-{device}" == worst["case"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--profile", action="store_true", help="print torch.profiler's table")
    options = parser.parse_args(argv)
    case = slowest(read_rows(options.rows), options.device)
    arguments = testing.inputs(case, options.device)
    op = getattr(ops, case.op)
    op(**arguments)  # compiles
    if not options.profile:
        for _ in range(CALLS):
            op(**arguments)
        print(f"ran {case.id} {CALLS} times")
        return 0
    activity = ProfilerActivity.CUDA if options.device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as record:
        for _ in range(CALLS):
            op(**arguments)
        if options.device == "cuda":
            torch.cuda.synchronize()
    print(case.id)
    print(record.key_averages().table(sort_by=f"self_{options.device}_time_total", row_limit=15))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
