"""What the ops are timed on, and what they are timed against.

CPU shapes are ``u2a_fast.testing.TIMING_CASES``. A GPU needs larger ones to fill, built as the same ``Case``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

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
    return tuple(cases)


def _ghost_dot(a: Tensor, g: Tensor, cu_seqlens: Tensor, v: Tensor) -> Tensor:
    rows = torch.stack([((a @ v_k.T) * g).sum(-1, dtype=torch.float32) for v_k in v])
    ids = torch.repeat_interleave(cu_seqlens.diff(), output_size=a.shape[0])
    return rows.new_zeros(v.shape[0], len(cu_seqlens) - 1).index_add_(1, ids, rows)


def _ghost_norm(a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    bounds = cu_seqlens.tolist()
    gradients = (g[i:j].T @ a[i:j] for i, j in zip(bounds[:-1], bounds[1:], strict=True))
    return torch.stack([gradient.float().square().sum() for gradient in gradients])


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


# What one would write in plain PyTorch, in the inputs' precision: logits and per-example gradients are materialized.
COMPOSITIONS: dict[str, Callable[..., Any]] = {
    "ghost_dot": _ghost_dot,
    "ghost_norm": _ghost_norm,
    "grad_sketch": _grad_sketch,
    "linear_logprob": _linear_logprob,
    "linear_logprob_backward": _linear_logprob_backward,
    "linear_logprob_jvp": _linear_logprob_jvp,
}


def bare_product(case: Case, arguments: Arguments) -> tuple[Callable[[], Tensor], int]:
    """The matrix product at the heart of a case, by PyTorch in the case's dtype, and its flops."""
    s = case.sizes
    if case.op == "ghost_dot":
        a, v = arguments["a"], arguments["v"]
        return lambda: a @ v[0].T, 2 * s["N"] * s["I"] * s["O"]
    if case.op in ("ghost_norm", "grad_sketch"):
        a, g = arguments["a"], arguments["g"]
        return lambda: g.T @ a, 2 * s["N"] * s["I"] * s["O"]
    h, weight = arguments["h"], arguments["weight"]
    return lambda: h @ weight.T, 2 * s["N"] * s["D"] * s["V"]
