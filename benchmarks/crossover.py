"""The constants behind ghost_dot's choice of a form on CPU: what several directions cost, in tokens of one direction.

    python -m benchmarks.crossover [--rounds 9] [--out rows.jsonl]

One direction always takes the row form, so that t(K = 1) / T is the time of a token. Long examples with several
directions take the tile form, whose time is a line in K: T tokens times the cost of its product (kProductThirds / 3 of
the engine in csrc), and the tokens of each direction (kDirectionTokens).
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from u2a_fast import ops, testing
from u2a_fast.bench.rows import Row, make_row, write_rows
from u2a_fast.bench.timing import Spread, alternate
from u2a_fast.testing import Case

__all__ = ["crossover_rows", "line", "main"]

DIRECTIONS = (1, 4, 8, 16)
LAYERS = ((256, 704), (704, 256), (1024, 1024))


def line(tokens: int, seconds: dict[int, float]) -> tuple[float, float]:
    """(cost of the product in tokens of the row form for each token, tokens of each direction) from times by K."""
    several = [k for k in seconds if k > 1]
    in_tokens = [tokens * seconds[k] / seconds[1] for k in several]
    slope, start = np.polyfit(several, in_tokens, 1)
    return float(start) / tokens, float(slope)


def _case(dtype: torch.dtype, i: int, o: int, k: int, lengths: tuple[int, ...]) -> Case:
    sizes = {"N": sum(lengths), "B": len(lengths), "I": i, "O": o, "K": k}
    return Case("ghost_dot", sizes, dtype, lengths)


def _check(case: Case) -> None:
    arguments = testing.inputs(case)
    wrong = testing.violations(case, arguments, ops.ghost_dot(**arguments))
    if wrong:
        raise RuntimeError(f"[crossover] expected {case.id} within its budget, got {wrong}")


def crossover_rows(
    rounds: int, tokens: int = 128, examples: int = 16, layers: Sequence[tuple[int, int]] = LAYERS
) -> Iterator[Row]:
    """A row for each layer and dtype, once results for two examples are within their budget; RuntimeError where not."""
    for dtype in (torch.float32, torch.bfloat16):
        for i, o in layers:
            inputs = {k: testing.inputs(_case(dtype, i, o, k, (tokens,) * examples)) for k in DIRECTIONS}
            for k in DIRECTIONS:
                _check(_case(dtype, i, o, k, (tokens,) * 2))
            tasks = {str(k): lambda _, x=x: ops.ghost_dot(**x) for k, x in inputs.items()}
            samples = alternate(tasks, rounds=rounds)
            seconds = {k: Spread.of(samples[str(k)]).p20 for k in DIRECTIONS}
            product, direction = line(tokens, seconds)
            name = f"{i}-{o}-{tokens}x{examples}-{str(dtype).removeprefix('torch.')}"
            values = {
                "seconds": {str(k): float(f"{t:.4g}") for k, t in seconds.items()},
                "units": {str(k): round(t / seconds[1], 3) for k, t in seconds.items()},
                "product_tokens": round(product, 3),
                "direction_tokens": round(direction, 2),
                "rounds": rounds,
            }
            yield make_row("crossover", name, values, gate="results for two examples within their budget")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="merge the rows into this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for row in crossover_rows(options.rounds):
        units = ", ".join(f"{k}: {value:.2f}" for k, value in row["units"].items())
        print(
            f"{row['case']}: K over one direction {units}; product {row['product_tokens']:.2f} tokens a token, "
            f"{row['direction_tokens']:.1f} a direction",
            flush=True,
        )
        if options.out:
            write_rows(options.out, [row])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
