"""Times every op against its reference, plain PyTorch and the bare matrix product, gated on its error budget.

    python -m benchmarks.run [--device cuda] [--threads 1] [--filter ghost_dot] [--quick] [--out rows.jsonl]

What is measured, ``u2a_fast.bench.measure`` says. A case whose result is wrong is reported, gives no row, and makes the
exit status 1. Every row is a line of its own, so that a log that is cut short has them.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/run.py`

from benchmarks.baselines import attempt
from u2a_fast.bench.cases import timing_cases
from u2a_fast.bench.measure import Settings, measure
from u2a_fast.bench.rows import Row, write_rows
from u2a_fast.testing import Case

__all__ = ["main"]

HEADER = (
    f"{'case':<68} {'GFLOP/s':>8} {'GB/s':>7} {'%gemm':>6} {'%copy':>6} {'%limit':>6} {'x ref':>6} {'x torch':>7} "
    f"{'x prod':>6}"
)


def _line(row: Row) -> str:
    return (
        f"{row['case']:<68} {row['gflops']:8.1f} {row['gbytes']:7.2f} {row['of_gemm']:6.0%} {row['of_copy']:6.0%} "
        f"{row['of_limit']:6.0%} {row['vs_reference'][1]:6.2f} {row['vs_composition'][1]:7.2f} "
        f"{row['vs_product'][1]:6.2f}"
    )


def _chosen(device: str, pattern: str, quick: bool) -> list[Case]:
    cases = [case for case in timing_cases(device) if pattern in case.id]
    if not quick:
        return cases
    return list({(case.op, case.dtype): case for case in reversed(cases)}.values())[::-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a gate failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="3 rounds of one case an op and dtype")
    parser.add_argument("--out", type=Path, help="merge the rows into this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    settings = Settings.of(options.device, options.quick)
    failed = 0
    print(f"{HEADER}\n(x: how many times as fast as reference, plain PyTorch, bare product of the same flops)")
    for case in _chosen(options.device, options.filter, options.quick):
        found = attempt(case.id, partial(measure, case, settings))
        failed += not isinstance(found, dict)
        if isinstance(found, list):
            print(f"{case.id}: GATE FAILED, not timed: {'; '.join(found)}", flush=True)
        elif found:
            print(_line(found), flush=True)
            if options.out:
                write_rows(options.out, [found])
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
