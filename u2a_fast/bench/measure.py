"""One op at one size against its reference, plain PyTorch and the machine's ceilings; timed only if it is right.

A case is timed only after its result on the same arguments is within the error budget of ``u2a_fast.testing`` against
the float64 reference. The op is timed as users call it and, as "kernel", below its argument checks and autograd. Rates
count the flops of the algorithm and the fewest bytes it can move. The ceilings, a large square matrix product in the
case's dtype, a large copy and a large triad (x + s y into z, as the STREAM benchmark has it), are measured in the same
rounds; the faster of the last two is the memory's rate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from u2a_fast import ops, reference, testing
from u2a_fast._register import implementations
from u2a_fast.bench.cases import COMPOSITIONS, bare_product
from u2a_fast.bench.rows import Row, make_row
from u2a_fast.bench.timing import Spread, Task, alternate, ratios
from u2a_fast.testing import Case

__all__ = ["Settings", "measure"]

# The last-level cache of a GPU is 50 to 126 MB: inputs rotate through more than that, or the cache would be measured.
CUDA_ROTATION = 384 << 20


@dataclass(frozen=True)
class Settings:
    """How long to measure; gemm is the side of the square product, copy_bytes the size of a buffer that is copied."""

    device: str = "cpu"
    rounds: int = 5
    gemm: int = 1024
    copy_bytes: int = 256 << 20

    @classmethod
    def of(cls, device: str, quick: bool) -> "Settings":
        """What fills ``device`` ("cpu" or "cuda"); ``quick`` measures shorter, and less surely."""
        if device == "cuda":
            return cls(device, rounds=3 if quick else 11, gemm=8192, copy_bytes=1 << 30)
        return cls(rounds=3, gemm=512, copy_bytes=32 << 20) if quick else cls()


def _ceilings(dtype: torch.dtype, settings: Settings) -> dict[str, Task]:
    n = settings.gemm
    x, y = (torch.randn(n, n, device=settings.device).to(dtype) for _ in range(2))
    source, other, sink = (torch.ones(settings.copy_bytes // 4, device=settings.device) for _ in range(3))
    return {
        "gemm": lambda _: x @ y,
        "copy": lambda _: sink.copy_(source),
        "triad": lambda _: torch.add(source, other, alpha=3.0, out=sink),
    }


def _cloned(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def _input_sets(arguments: dict[str, Any], device: str) -> list[dict[str, Any]]:
    if device == "cpu":
        return [arguments]
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    sets = math.ceil(CUDA_ROTATION / max(sum(x.nbytes for x in tensors), 1))
    return [arguments, *(_cloned(arguments) for _ in range(min(sets, 32) - 1))]


def _below_checks(op: str, sets: Sequence[dict[str, Any]]) -> Task:
    """The op without argument checks and autograd, which on a small layer take as long as its products."""
    with torch.inference_mode():  # autograd does not see tensors that are made here
        return _rotating(getattr(torch.ops.u2a_fast, op).default, [_cloned(arguments) for arguments in sets])


def _rotating(function: Callable[..., Any], sets: Sequence[dict[str, Any]]) -> Task:
    return lambda i: function(**sets[i % len(sets)])


def _tasks(case: Case, sets: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Task]:
    products = [bare_product(case, arguments)[0] for arguments in sets]
    return {
        "op": _rotating(getattr(ops, case.op), sets),
        "kernel": _below_checks(case.op, sets),
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
    gemm = 2 * settings.gemm**3 / seconds["gemm"]
    copy, triad = 2 * settings.copy_bytes / seconds["copy"], 3 * settings.copy_bytes / seconds["triad"]
    # The product's time is scaled to the flops of the op, so that it is the time of a product of the same flops.
    scaled = [t * flops / product_flops for t in samples["product"]]
    return {
        "op": case.op,
        "dtype": str(case.dtype).removeprefix("torch."),
        "backend": settings.device if settings.device in implementations(case.op) else "reference",
        "flops": flops,
        "bytes": moved,
        "seconds": Spread.of(samples["op"]).to_list(),
        "kernel_seconds": Spread.of(samples["kernel"]).to_list(),
        "rounds": settings.rounds,
        "gflops": flops / seconds["op"] / 1e9,
        "gbytes": moved / seconds["op"] / 1e9,
        "gemm_gflops": gemm / 1e9,
        "copy_gbytes": copy / 1e9,
        "triad_gbytes": triad / 1e9,
        "kernel_of_gemm": flops / seconds["kernel"] / gemm,
        "of_gemm": flops / seconds["op"] / gemm,
        "of_copy": moved / seconds["op"] / copy,
        "of_limit": max(flops / gemm, moved / max(copy, triad)) / seconds["op"],
        "yardstick_seconds": {name: float(f"{seconds[name]:.4g}") for name in ("reference", "composition", "product")},
        "vs_reference": ratios(samples["reference"], samples["op"]).to_list(),
        "vs_composition": ratios(samples["composition"], samples["op"]).to_list(),
        "vs_product": ratios(scaled, samples["op"]).to_list(),
    }
