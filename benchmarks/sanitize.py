"""Runs every Triton kernel on small cases with uneven edges; what compute-sanitizer is to watch.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitize [--ops ghost_dot,...]

Give it PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own with edges to fall off. The
results are checked against the reference too; exit status 1 where one is wrong.
"""

import argparse
from collections.abc import Sequence

import torch

from u2a_fast import ops, testing

__all__ = ["cases", "main"]

MOST_FLOPS = 4_000_000  # a case takes about a second under racecheck


def cases(names: Sequence[str]) -> list[testing.Case]:
    """For every op and dtype that kernels know, the largest case under MOST_FLOPS and the smallest of any work."""
    chosen = []
    for op in names:
        for dtype in (torch.float32, torch.bfloat16):
            sized = [(testing.cost(c)[0], c) for c in testing.CASES if (c.op, c.dtype) == (op, dtype)]
            fitting = sorted((pair for pair in sized if 0 < pair[0] <= MOST_FLOPS), key=lambda pair: pair[0])
            chosen += [fitting[0][1], fitting[-1][1]]
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=lambda text: text.split(","), default=list(ops.__all__))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args(argv)
    failed = 0
    for case in cases(options.ops):
        arguments = testing.inputs(case, options.device)
        wrong = testing.violations(case, arguments, getattr(ops, case.op)(**arguments))
        print(f"{case.id}: {'; '.join(wrong) or 'right'}", flush=True)
        failed += bool(wrong)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
