"""Times every op against its reference, plain PyTorch and the bare matrix product, gated on its error budget.

    python -m benchmarks.run [--device cuda] [--threads 1] [--filter ghost_dot] [--quick] [--out rows.jsonl]

A case is timed only after its result on the same arguments is within the error budget of ``u2a_fast.testing`` against
the float64 reference; a case that is not is reported, gives no row, and makes the exit status 1. Rates count the flops
of the algorithm and the fewest bytes it can move. The ceilings, a large square matrix product in the case's dtype and a
large copy, are measured in the same rounds.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/run.py`

from benchmarks.cases import COMPOSITIONS, bare_product, timing_cases
from benchmarks.rows import Row, make_row, write_rows
from benchmarks.timing import Spread, Task, alternate, ratios
from u2a_fast import ops, reference, testing
from u2a_fast._register import implementations
from u2a_fast.testing import Case

__all__ = ["Settings", "main", "measure"]

# The last-level cache of a GPU is 50 to 126 MB: inputs rotate through more than that, or the cache would be measured.
CUDA_ROTATION = 384 << 20
HEADER = (
    f"{'case':<68} {'GFLOP/s':>8} {'GB/s':>7} {'%gemm':>6} {'%copy':>6} {'%limit':>6} {'x ref':>6} {'x torch':>7} "
    f"{'x prod':>6}"
)


@dataclass(frozen=True)
class Settings:
    """How long to measure; gemm is the side of the square product, copy_bytes the size of the copied buffer."""

    device: str = "cpu"
    rounds: int = 5
    gemm: int = 1024
    copy_bytes: int = 256 << 20

    @classmethod
    def of(cls, device: str, quick: bool) -> "Settings":
        if device == "cuda":
            return cls(device, rounds=3 if quick else 11, gemm=8192, copy_bytes=2 << 30)
        return cls(rounds=3, gemm=512, copy_bytes=32 << 20) if quick else cls()


def _ceilings(dtype: torch.dtype, settings: Settings) -> dict[str, Task]:
    n = settings.gemm
    x, y = (torch.randn(n, n, device=settings.device).to(dtype) for _ in range(2))
    source = torch.ones(settings.copy_bytes // 4, device=settings.device)
    sink = torch.empty_like(source)
    return {"gemm": lambda _: x @ y, "copy": lambda _: sink.copy_(source)}


def _input_sets(arguments: dict[str, Any], device: str) -> list[dict[str, Any]]:
    if device == "cpu":
        return [arguments]
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    sets = math.ceil(CUDA_ROTATION / max(sum(x.nbytes for x in tensors), 1))
    clone = {name: x.clone if isinstance(x, torch.Tensor) else (lambda x=x: x) for name, x in arguments.items()}
    return [arguments, *({name: make() for name, make in clone.items()} for _ in range(min(sets, 32) - 1))]


def _rotating(function: Callable[..., Any], sets: Sequence[dict[str, Any]]) -> Task:
    return lambda i: function(**sets[i % len(sets)])


def _tasks(case: Case, sets: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Task]:
    products = [bare_product(case, arguments)[0] for arguments in sets]
    return {
        "op": _rotating(getattr(ops, case.op), sets),
        "reference": _rotating(getattr(reference, case.op), sets),
        "composition": _rotating(COMPOSITIONS[case.op], sets),
        "product": lambda i: products[i % len(products)](),
        **_ceilings(case.dtype, settings),
    }


def measure(case: Case, settings: Settings) -> Row | list[str]:
    """The row of one case, or what is wrong with the op's result on it."""
    arguments = testing.inputs(case, settings.device)
    wrong = testing.violations(case, arguments, getattr(ops, case.op)(**arguments))
    if wrong:
        return wrong
    with torch.no_grad():
        tasks = _tasks(case, _input_sets(arguments, settings.device), settings)
        with torch.enable_grad():  # the composition of a backward op differentiates
            samples = alternate(tasks, rounds=settings.rounds, device=settings.device)
    values = _summary(case, samples, bare_product(case, arguments)[1], settings)
    gate = "every output entry within its float32-epsilon error budget of the float64 reference"
    return make_row("ops", f"{case.id}-{settings.device}", values, gate=gate, device=settings.device)


def _summary(case: Case, samples: dict[str, list[float]], product_flops: int, settings: Settings) -> dict[str, Any]:
    flops, moved = testing.cost(case)
    seconds = {name: Spread.of(times).p50 for name, times in samples.items()}
    gemm, copy = 2 * settings.gemm**3 / seconds["gemm"], 2 * settings.copy_bytes / seconds["copy"]
    # The product's time is scaled to the flops of the op, so that it is the time of a product of the same flops.
    scaled = [t * flops / product_flops for t in samples["product"]]
    return {
        "op": case.op,
        "dtype": str(case.dtype).removeprefix("torch."),
        "backend": settings.device if settings.device in implementations(case.op) else "reference",
        "flops": flops,
        "bytes": moved,
        "seconds": Spread.of(samples["op"]).to_list(),
        "rounds": settings.rounds,
        "gflops": flops / seconds["op"] / 1e9,
        "gbytes": moved / seconds["op"] / 1e9,
        "gemm_gflops": gemm / 1e9,
        "copy_gbytes": copy / 1e9,
        "of_gemm": flops / seconds["op"] / gemm,
        "of_copy": moved / seconds["op"] / copy,
        "of_limit": max(flops / gemm, moved / copy) / seconds["op"],
        "vs_reference": ratios(samples["reference"], samples["op"]).to_list(),
        "vs_composition": ratios(samples["composition"], samples["op"]).to_list(),
        "vs_product": ratios(scaled, samples["op"]).to_list(),
    }


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
        found = measure(case, settings)
        if isinstance(found, list):
            failed += 1
            print(f"{case.id}: GATE FAILED, not timed: {'; '.join(found)}", flush=True)
            continue
        print(_line(found), flush=True)
        if options.out:
            write_rows(options.out, [found])
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
