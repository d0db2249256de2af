"""Ops at the sizes of large models on a GPU, beside the library's product, plain PyTorch and other people's kernels.

    python -m benchmarks.large [--device cuda] [--filter ghost_dot] [--rounds 7] [--scale 1] [--out rows.jsonl]

The case table's float64 gate runs on the CPU and bounds its sizes; here a sample of every result is held against
float64 on the device itself, and what is wrong is not timed. Packages ``liger-kernel`` and ``jvp_flash_attention`` take
part where they are installed; what they cannot run is printed and left out. bfloat16, contestants in turns, "gemm" a
square product.
"""

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import functional

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/large.py`

from benchmarks.baselines import attempt, norm_error
from u2a_fast import ops
from u2a_fast.bench.rows import Row, make_row, write_rows
from u2a_fast.bench.timing import Spread, Task, alternate, ratios

__all__ = ["Workload", "main", "measure", "workloads"]

# Of a sample's norm: float32 accumulation alone, and where probabilities or tangents are rounded to bfloat16.
EXACT, ROUNDED = 1e-4, 1e-2


@dataclass(frozen=True)
class Workload:
    """One op at one size.

    Args:
        name: the row's case.
        flops: of the op's products.
        op: our call.
        error: of a sample of the op's result against float64, relative to the sample's norm.
        bound: what it may be.
        rivals: other ways to the same, by name; where one raises it takes no part.
        ratios: pairs (slower, faster) of names whose ratio of times the row holds as "slower over faster".
    """

    name: str
    flops: float
    op: Callable[[], Any]
    error: Callable[[Any], float]
    bound: float
    rivals: dict[str, Callable[[], Any]] = field(default_factory=dict)
    ratios: tuple[tuple[str, str], ...] = ()


def _normal(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(torch.bfloat16)


def ghost_dot(inputs: int, outputs: int, device: str, scale: float) -> Workload:
    """One direction of a layer, examples of 512 tokens."""
    length, batch = max(int(512 * scale), 1), 128
    n = length * batch
    a, g = _normal(n, inputs, device=device), _normal(n, outputs, device=device)
    v = _normal(1, outputs, inputs, device=device, scale=0.02)
    cu_seqlens = torch.arange(0, n + 1, length, device=device, dtype=torch.int32)

    def composed() -> Tensor:
        return ((a @ v[0].T) * g).sum(-1, dtype=torch.float32).view(batch, length).sum(1)

    def error(out: Tensor) -> float:
        rows = slice(0, 4 * length)
        want = ((a[rows].double() @ v[0].double().T) * g[rows].double()).sum(-1).view(4, length).sum(1)
        return norm_error(out[0, :4], want)

    return Workload(
        f"ghost_dot-{inputs}x{outputs}",
        2.0 * n * inputs * outputs,
        lambda: ops.ghost_dot(a, g, cu_seqlens, v),
        error,
        EXACT,
        {"product": lambda: a @ v[0].T, "product, elementwise, sum": composed},
        (("product, elementwise, sum", "op"), ("op", "product")),
    )


def _liger(h: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    module = importlib.import_module("liger_kernel.transformers.functional")
    return module.liger_fused_linear_cross_entropy(h, weight, target, reduction="sum")


def _head(d: int, vocabulary: int, device: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    n = max(int(8192 * scale), 16)
    h, weight = _normal(n, d, device=device), _normal(vocabulary, d, device=device, scale=0.02)
    return h, weight, torch.randint(vocabulary, (n,), device=device)


def _head_error(h: Tensor, weight: Tensor, target: Tensor, out: tuple[Tensor, ...]) -> float:
    z = h[:16].double() @ weight.double().T
    want = z.gather(1, target[:16, None])[:, 0] - z.logsumexp(1)
    return norm_error(out[0][:16], want)


def linear_logprob(d: int, vocabulary: int, device: str, scale: float) -> Workload:
    """The head's log-probabilities alone."""
    h, weight, target = _head(d, vocabulary, device, scale)
    return Workload(
        f"linear_logprob-{d}x{vocabulary}",
        2.0 * len(h) * d * vocabulary,
        lambda: ops.linear_logprob(h, weight, target),
        partial(_head_error, h, weight, target),
        EXACT,
        {
            "product": lambda: h @ weight.T,
            "cross_entropy": lambda: functional.cross_entropy((h @ weight.T).float(), target, reduction="none"),
            "liger": lambda: _liger(h, weight, target),
        },
        (("liger", "op"), ("op", "product"), ("cross_entropy", "op")),
    )


def linear_logprob_with_gradient(d: int, vocabulary: int, device: str, scale: float) -> Workload:
    """Log-probabilities and their gradient in the hidden states: two products of the forward pass's size."""
    h, weight, target = _head(d, vocabulary, device, scale)
    leaf = h.detach().requires_grad_()

    def ours() -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            logp = ops.linear_logprob(leaf, weight, target)[0]
            return logp, torch.autograd.grad(logp.sum(), leaf)[0]

    def liger() -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(_liger(leaf, weight, target), leaf)[0]

    def error(out: tuple[Tensor, ...]) -> float:
        z = h[:16].double() @ weight.double().T
        dz = functional.one_hot(target[:16], vocabulary).double() - z.softmax(1)
        right = _head_error(h, weight, target, out) <= EXACT
        return norm_error(out[1][:16], dz @ weight.double()) if right else math.inf

    return Workload(
        f"linear_logprob_gradient-{d}x{vocabulary}",
        6.0 * len(h) * d * vocabulary,
        ours,
        error,
        ROUNDED,
        {"liger": liger},
        (("liger", "op"),),
    )


def linear_logprob_jvp(d: int, vocabulary: int, device: str, scale: float) -> Workload:
    """The head with tangents of hidden states and weight: three products."""
    h, weight, target = _head(d, vocabulary, device, scale)
    dh, dweight = torch.randn_like(h)[None], (torch.randn_like(weight) * 0.02)[None]

    def error(out: tuple[Tensor, ...]) -> float:
        x, w, dx, dw = (t.double() for t in (h[:16], weight, dh[0, :16], dweight[0]))
        dz = dx @ w.T + x @ dw.T
        z = x @ w.T
        at = target[:16, None]
        tangent = dz.gather(1, at)[:, 0] - (z.softmax(1) * dz).sum(1)
        return max(_head_error(h, weight, target, out), norm_error(out[2][0, :16], tangent))

    return Workload(
        f"linear_logprob_jvp-{d}x{vocabulary}",
        6.0 * len(h) * d * vocabulary,
        lambda: ops.linear_logprob_jvp(h, weight, target, dh, dweight),
        error,
        EXACT,
        {"product, three times": lambda: [h @ weight.T for _ in range(3)]},
        (("op", "product, three times"),),
    )


def _jvp_flash(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    module: Any = importlib.import_module("jvp_flash_attention.jvp_attention")
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, dx) for x, dx in ((q, dq), (k, dk), (v, dv))]
        out = module.JVPAttn.fwd_dual(*duals, causal=True, warp_specialize=False)
        return forward_ad.unpack_dual(out).tangent


def attention(head: int, tokens: int, device: str, scale: float) -> Workload:
    """Causal grouped attention of 32 query and 8 key heads with one tangent, 16 k tokens; rivals get whole keys."""
    length = max(int(tokens * scale), 16)
    batch, heads, groups = max(16384 // tokens, 1), 32, 8
    n = batch * length
    q, dq = (_normal(n, heads, head, device=device) for _ in range(2))
    k, v, dk, dv = (_normal(n, groups, head, device=device) for _ in range(4))
    cu_seqlens = torch.arange(0, n + 1, length, device=device, dtype=torch.int32)

    def grid(x: Tensor) -> Tensor:  # (B, H, T, E), every query head with keys of its own
        x = x.repeat_interleave(heads // x.shape[1], 1)
        return x.unflatten(0, (batch, length)).transpose(1, 2).contiguous()

    wide = [grid(x) for x in (q, k, v, dq, dk, dv)]

    def error(out: tuple[Tensor, ...]) -> float:
        rows = slice(0, length)
        x, y, z, dx, dy, dz = (t[rows, 0].double() for t in (q, k, v, dq, dk, dv))
        unseen = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        s, ds = (x @ y.T * head**-0.5).masked_fill(unseen, -torch.inf), (dx @ y.T + x @ dy.T) * head**-0.5
        p = s.softmax(1)
        dp = p * ds
        tangent = dp @ z + p @ dz - dp.sum(1, keepdim=True) * (p @ z)
        return max(norm_error(out[0][rows, 0], p @ z), norm_error(out[2][0, rows, 0], tangent))

    options = (cu_seqlens, None, head**-0.5)
    return Workload(
        f"attention_jvp-E{head}-T{tokens}",
        12.0 * head * batch * length * length / 2 * heads,
        lambda: ops.attention_jvp(q, k, v, dq[None], dk[None], dv[None], *options),
        error,
        ROUNDED,
        {
            "forward": lambda: ops.attention(q, k, v, *options),
            "sdpa forward": lambda: functional.scaled_dot_product_attention(*wide[:3], is_causal=True),
            "jvp_flash_attention": lambda: _jvp_flash(*wide),
        },
        (("op", "forward"), ("jvp_flash_attention", "op"), ("forward", "sdpa forward")),
    )


def workloads(device: str, scale: float = 1.0) -> Iterator[tuple[str, Callable[[], Workload]]]:
    """(name, how to make it) of every workload; ``scale`` shortens tokens."""
    for inputs, outputs in ((4096, 4096), (4096, 14336)):
        yield "ghost_dot", partial(ghost_dot, inputs, outputs, device, scale)
    for d in (2048, 4096):
        for make in (linear_logprob, linear_logprob_with_gradient, linear_logprob_jvp):
            yield make.__name__, partial(make, d, 128256, device, scale)
    for head in (64, 128):
        for tokens in (2048, 8192):
            yield "attention", partial(attention, head, tokens, device, scale)


def _able(rivals: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    able = {}
    for name, rival in rivals.items():
        try:
            rival()
        except Exception as problem:  # a library may raise anything; it takes no part then
            print(f"  {name} does not run: {type(problem).__name__}: {str(problem).splitlines()[:1]}", flush=True)
        else:
            able[name] = rival
    return able


def _task(call: Callable[[], Any]) -> Task:
    return lambda _: call()


def measure(workload: Workload, device: str, *, rounds: int, gemm: int = 8192) -> Row | float:
    """The row of one workload, or the error of its result where that is too large."""
    with torch.no_grad():
        error = workload.error(workload.op())
        if not error <= workload.bound:
            return error
        square = _normal(gemm, gemm, device=device)
        calls = {"op": workload.op, "gemm": lambda: square @ square, **_able(workload.rivals)}
        tasks = {name: _task(call) for name, call in calls.items()}
        samples = alternate(tasks, rounds=rounds, device=device, sample_seconds=0.05)
    seconds = {name: Spread.of(times) for name, times in samples.items()}
    of_gemm = [
        workload.flops / op / (2 * gemm**3 / base) for op, base in zip(samples["op"], samples["gemm"], strict=True)
    ]
    values = {
        "flops": workload.flops,
        "seconds": {name: spread.to_list() for name, spread in seconds.items()},
        "gflops": workload.flops / seconds["op"].p50 / 1e9,
        "gemm_gflops": 2 * gemm**3 / seconds["gemm"].p50 / 1e9,
        "of_gemm": Spread.of(of_gemm).to_list(),
        "ratios": {
            f"{slow} over {fast}": ratios(samples[slow], samples[fast]).to_list()
            for slow, fast in workload.ratios
            if {slow, fast} <= samples.keys()
        },
    }
    gate = f"a sample of the result within {error:.1e} of float64, relative to its norm"
    return make_row("large", f"{workload.name}-{device}", values, gate=gate, device=device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a gate failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--filter", default="", help="only workloads whose kind contains this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of tokens")
    parser.add_argument("--gemm", type=int, default=8192, help="rows of the square product")
    parser.add_argument("--out", type=Path, help="merge the rows into this file")
    options = parser.parse_args(argv)
    failed = 0
    for kind, make in workloads(options.device, options.scale):
        if options.filter not in kind:
            continue
        torch.manual_seed(0)
        workload = attempt(kind, make)
        if workload is None:
            failed += 1
            continue
        row = attempt(
            workload.name, partial(measure, workload, options.device, rounds=options.rounds, gemm=options.gemm)
        )
        if not isinstance(row, dict):
            failed += 1
            if row is not None:
                print(f"{workload.name}: GATE FAILED, not timed: {row:.1e} off", flush=True)
            continue
        shown = "".join(
            f"; {name} {p50:.2f} ({p20:.2f} to {p80:.2f})" for name, (p20, p50, p80) in row["ratios"].items()
        )
        print(
            f"{workload.name}: {row['gflops']:,.0f} GFLOP/s, {row['of_gemm'][1]:.0%} of the product{shown}", flush=True
        )
        if options.out:
            write_rows(options.out, [row])
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
