"""What the ops are timed on, and what they are timed against.

CPU shapes are ``u2a_fast.testing.TIMING_CASES``. A GPU needs larger ones to fill, built as the same ``Case``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear

from u2a_fast.bench import attention
from u2a_fast.sketch import sketch_map
from u2a_fast.testing import TIMING_CASES, Case

__all__ = ["COMPOSITIONS", "bare_product", "timing_cases"]

Arguments = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16)


def timing_cases(device: str) -> tuple[Case, ...]:
    """The cases to time on "cpu" or "cuda"."""
    return TIMING_CASES if device == "cpu" else _cuda_cases()


def _cuda_cases() -> tuple[Case, ...]:
    # The gate's float64 reference runs on the CPU and sets how large a case can be.
    cases = []
    lengths = (128,) * 64
    for i, o in ((1024, 1024), (2048, 2048), (2048, 8192)):
        sizes = {"N": sum(lengths), "B": len(lengths), "I": i, "O": o}
        for dtype in DTYPES:
            cases.append(Case("ghost_dot", {**sizes, "K": 1}, dtype, lengths))
            cases.append(Case("ghost_norm", sizes, dtype, lengths))
            for r in (16, 64):
                cases.append(Case("ghost_dot_lowrank", {**sizes, "K": 1, "R": r}, dtype, lengths))
                cases.append(Case("grad_project", {**sizes, "P": r, "Q": r}, dtype, lengths))
    # The sketch's reference multiplies every token by every example's mask.
    few = lengths[:16]
    for i, o in ((1024, 1024), (2048, 2048)):
        sizes = {"N": sum(few), "B": len(few), "I": i, "O": o, "M": 1024}
        cases += [Case("grad_sketch", sizes, dtype, few) for dtype in DTYPES]
    for n, d, v in ((2048, 1024, 32000), (1024, 1024, 128256)):
        sizes = {"N": n, "D": d, "V": v}
        for dtype in DTYPES:
            cases.append(Case("linear_logprob", sizes, dtype))
            cases.append(Case("linear_logprob_backward", sizes, dtype, tangents=("h",)))
            cases.append(Case("linear_logprob_backward", sizes, dtype))
            cases.append(Case("linear_logprob_jvp", {**sizes, "K": 1}, dtype))
    for heads, groups, e, tokens, examples in ((16, 4, 64, 2048, 1), (8, 2, 128, 512, 4)):
        sizes = {"N": examples * tokens, "B": examples, "H": heads, "G": groups, "E": e, "F": e}
        for dtype in DTYPES:
            segments = (tokens,) * examples
            cases.append(Case("attention", sizes, dtype, segments))
            cases.append(Case("attention_backward", sizes, dtype, segments))
            cases.append(Case("attention_jvp", {**sizes, "K": 1}, dtype, segments))
    for dtype in DTYPES:
        cases += [Case("glu_jvp", {"N": 4096, "I": 4096}, dtype, gelu=gelu) for gelu in (False, True)]
        cases += [Case("rms_norm_jvp", sizes, dtype) for sizes in ({"N": 8192, "D": 2048}, {"N": 131072, "D": 128})]
        cases.append(Case("rotary", {"N": 4096, "H": 32, "E": 128}, dtype))
    # The reference's pairs of all heads, in float64 on the CPU, make these the costliest to gate: last.
    for heads, groups, e, tokens in ((16, 4, 128, 2048), (4, 1, 64, 8192), (4, 1, 128, 8192)):
        sizes = {"N": tokens, "B": 1, "H": heads, "G": groups, "E": e, "F": e}
        cases.append(Case("attention", sizes, torch.bfloat16, (tokens,)))
        cases.append(Case("attention_jvp", {**sizes, "K": 1}, torch.bfloat16, (tokens,)))
    return tuple(cases)


def _segment_sum(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    ids = torch.repeat_interleave(cu_seqlens.diff(), output_size=rows.shape[1])
    return rows.new_zeros(rows.shape[0], len(cu_seqlens) - 1).index_add_(1, ids, rows)


def _ghost_dot(a: Tensor, g: Tensor, cu_seqlens: Tensor, v: Tensor) -> Tensor:
    return _segment_sum(torch.stack([((a @ v_k.T) * g).sum(-1, dtype=torch.float32) for v_k in v]), cu_seqlens)


def _ghost_dot_lowrank(a: Tensor, g: Tensor, cu_seqlens: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return _segment_sum(((a @ right) * (g @ left)).sum(-1, dtype=torch.float32), cu_seqlens)


def _ghost_norm(a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    bounds = cu_seqlens.tolist()
    gradients = (g[i:j].T @ a[i:j] for i, j in zip(bounds[:-1], bounds[1:], strict=True))
    return torch.stack([gradient.float().square().sum() for gradient in gradients])


def _grad_project(a: Tensor, g: Tensor, cu_seqlens: Tensor, p_in: Tensor, p_out: Tensor) -> Tensor:
    bounds, x, y = cu_seqlens.tolist(), a @ p_in, g @ p_out
    return torch.stack([y[i:j].T @ x[i:j] for i, j in zip(bounds[:-1], bounds[1:], strict=True)])


def _grad_sketch(a: Tensor, g: Tensor, cu_seqlens: Tensor, dim: int, seed: int) -> Tensor:
    entry, sign = sketch_map(g.shape[1], a.shape[1], dim, seed, a.device)
    entry, sign = entry.flatten(), sign.flatten()
    bounds = cu_seqlens.tolist()
    out = torch.zeros(len(bounds) - 1, dim, device=a.device)
    for row, i, j in zip(out, bounds[:-1], bounds[1:], strict=True):
        row.index_add_(0, entry, (g[i:j].T @ a[i:j]).flatten().float() * sign)
    return out


def _linear_logprob(
    h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    logits = linear(h, weight, bias).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(-1)
    return logits.gather(-1, target[:, None])[:, 0] - lse, lse


def _linear_logprob_backward(
    grad_logp: Tensor,
    grad_lse: Tensor,
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    softcap: float,
    need_h: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    h, weight = h.detach().requires_grad_(need_h), weight.detach().requires_grad_(need_weight)
    outputs = _linear_logprob(h, weight, target, bias, softcap)
    wanted = [leaf for leaf in (h, weight) if leaf.requires_grad]
    return torch.autograd.grad(outputs, wanted, (grad_logp, grad_lse))


def _linear_logprob_jvp(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    dh: Tensor | None,
    dweight: Tensor | None,
    bias: Tensor | None,
    dbias: Tensor | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    assert dh is not None and dweight is not None and bias is None, "the timing cases have both tangents, no bias"
    outputs, tangents = torch.func.jvp(
        lambda h, weight: _linear_logprob(h, weight, target, None, softcap), (h, weight), (dh[0], dweight[0])
    )[:2]
    return outputs[0], tangents[0]


def _glu_jvp(gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    activation = partial(functional.gelu, approximate="tanh") if gelu else functional.silu
    if dup is None:  # `up` is the gradient in the unit of `gate` and `dgate`; autograd runs it forward, too
        gate, dgate = (x.detach().requires_grad_() for x in (gate, dgate))
        grad_up, grad_gate = torch.autograd.grad(activation(gate) * dgate, (dgate, gate), up)
        return grad_up, grad_gate
    y, dy = torch.func.jvp(lambda gate, up: activation(gate) * up, (gate, up), (dgate, dup))[:2]
    return y, dy


def _rms_norm_jvp(x: Tensor, dx: Tensor, scale: Tensor, dscale: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    def norm(x: Tensor, scale: Tensor) -> Tensor:  # as transformers' models write it
        wide = x.float()
        return scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    scale, dscale = scale.to(x.dtype), torch.zeros_like(x[0]) if dscale is None else dscale.to(x.dtype)
    y, dy = torch.func.jvp(norm, (x, scale), (dx, dscale))[:2]
    return y, dy


def _rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cosine[:, None] + torch.cat([-high, low], -1) * sine[:, None]


# What one would write in plain PyTorch, in the inputs' precision: logits and per-example gradients are materialized.
COMPOSITIONS: dict[str, Callable[..., Any]] = {
    "attention": attention.attention,
    "attention_backward": attention.attention_backward,
    "attention_jvp": attention.attention_jvp,
    "ghost_dot": _ghost_dot,
    "ghost_dot_lowrank": _ghost_dot_lowrank,
    "ghost_norm": _ghost_norm,
    "glu_jvp": _glu_jvp,
    "grad_project": _grad_project,
    "grad_sketch": _grad_sketch,
    "linear_logprob": _linear_logprob,
    "linear_logprob_backward": _linear_logprob_backward,
    "linear_logprob_jvp": _linear_logprob_jvp,
    "rms_norm_jvp": _rms_norm_jvp,
    "rotary": _rotary,
}


def bare_product(case: Case, arguments: Arguments) -> tuple[Callable[[], object], int]:
    """The matrix product (or two) at the heart of a case, by PyTorch in the case's dtype, and its flops.

    Ops without one stand against an elementwise product of a matrix of theirs.
    """
    s = case.sizes
    if case.op in ("glu_jvp", "rms_norm_jvp", "rotary"):
        x = arguments["gate" if case.op == "glu_jvp" else "x"]
        return lambda: x * x, x.numel()
    if case.op.startswith("attention"):
        q, k = arguments["q"].transpose(0, 1), arguments["k"].permute(1, 2, 0)
        k = k.repeat_interleave(s["H"] // s["G"], 0)
        return lambda: q @ k, 2 * s["H"] * s["N"] ** 2 * s["E"]
    if case.op == "ghost_dot":
        a, v = arguments["a"], arguments["v"]
        return lambda: a @ v[0].T, 2 * s["N"] * s["I"] * s["O"]
    if case.op in ("ghost_norm", "grad_sketch"):
        a, g = arguments["a"], arguments["g"]
        return lambda: g.T @ a, 2 * s["N"] * s["I"] * s["O"]
    if case.op in ("ghost_dot_lowrank", "grad_project"):
        a, g, _, x, y = arguments.values()
        left, right = (x[0], y[0]) if case.op == "ghost_dot_lowrank" else (y, x)
        return lambda: (a @ right, g @ left), 2 * s["N"] * (s["I"] * right.shape[1] + s["O"] * left.shape[1])
    h, weight = arguments["h"], arguments["weight"]
    return lambda: h @ weight.T, 2 * s["N"] * s["D"] * s["V"]
