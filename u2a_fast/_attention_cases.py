"""The attention rows of the case table: their inputs, error scales and cost, for :mod:`u2a_fast.testing`."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference

if TYPE_CHECKING:
    from .testing import Case

__all__ = ["cost", "inputs", "rows", "scales", "timing_rows"]

Row = tuple[str, dict[str, int], dict[str, Any]]


def _sizes(heads: int, groups: int, e: int, f: int, lengths: tuple[int, ...]) -> dict[str, int]:
    return {"N": sum(lengths), "B": len(lengths), "H": heads, "G": groups, "E": e, "F": f}


def rows() -> Iterator[Row]:
    """Parity rows: every usual head size and odd ones, empty segments, windows, caps, shared beginnings."""
    # H, G, E, F, K, tokens of each segment, options.
    table: list[tuple[int, int, int, int, int, tuple[int, ...], dict[str, Any]]] = [
        (4, 2, 16, 16, 1, (33,), {}),
        (2, 2, 8, 8, 2, (7, 0, 1, 12), {}),
        (2, 2, 32, 32, 1, (128,), {}),
        (4, 1, 32, 32, 2, (5, 129, 40), {}),
        (8, 2, 64, 64, 1, (97, 31), {}),
        (2, 1, 80, 80, 1, (50, 17), {}),
        (2, 2, 96, 96, 1, (65,), {}),
        (2, 1, 128, 128, 1, (70, 7), {}),
        (1, 1, 256, 256, 1, (48,), {}),
        (3, 3, 7, 5, 1, (19, 2), {}),
        (2, 1, 64, 32, 2, (40,), {}),
        (1, 1, 16, 24, 1, (300,), {}),
        (1, 1, 32, 32, 1, (60,), {"scale": 30.0}),
        (2, 2, 16, 24, 1, (40, 9), {"window": 5}),
        (2, 1, 32, 32, 1, (261,), {"window": 64}),
        (2, 2, 32, 32, 1, (37, 20), {"softcap": 5.0, "scale": 10.0}),
        (4, 2, 16, 16, 2, (20, 7, 0, 13, 30), {"parent": (-1, 0, 0, 0, -1)}),
        (2, 1, 8, 8, 1, (0, 5, 9, 3, 4), {"parent": (-1, 0, 0, -1, 3)}),
        (1, 1, 16, 16, 1, (150, 101), {"parent": (-1, 0)}),
        (2, 1, 32, 32, 1, (25, 30, 10), {"parent": (-1, 0, 0), "window": 17, "softcap": 8.0}),
        (2, 1, 8, 8, 1, (), {}),
        (2, 1, 8, 8, 1, (0, 0), {"parent": (-1, 0)}),
    ]
    for heads, groups, e, f, k, lengths, options in table:
        sizes = _sizes(heads, groups, e, f, lengths)
        for op in ("attention", "attention_backward", "attention_jvp"):
            yield op, {**sizes, "K": k} if op == "attention_jvp" else sizes, {"lengths": lengths, **options}
    yield "attention_jvp", {**_sizes(2, 1, 8, 8, (5,)), "K": 0}, {"lengths": (5,)}


def timing_rows() -> Iterator[Row]:
    """Timing rows: short segments as of negatives, grouped heads, long ones, a shared prompt, a window with a cap."""
    table: list[tuple[int, int, int, int, tuple[int, ...], dict[str, Any]]] = [
        (8, 8, 32, 1, (160,) * 8, {}),
        (8, 2, 64, 1, (160,) * 8, {}),
        (4, 4, 64, 1, (1024,), {}),
        (2, 2, 128, 1, (512,) * 2, {}),
        (8, 2, 64, 1, (128,) * 9, {"parent": (-1, *(0,) * 8)}),
        (4, 2, 64, 4, (1024,), {"window": 256, "softcap": 50.0}),
    ]
    for heads, groups, e, k, lengths, options in table:
        sizes = _sizes(heads, groups, e, e, lengths)
        yield "attention", sizes, {"lengths": lengths, **options}
        yield "attention_backward", sizes, {"lengths": lengths, **options}
        yield "attention_jvp", {**sizes, "K": k}, {"lengths": lengths, **options}


def inputs(case: "Case", normal: Callable[..., Tensor]) -> dict[str, Any]:
    """Arguments of ``case``; ``normal(*shape)`` draws from a standard normal distribution in the case's dtype."""
    n, heads, groups, e, f = (case.sizes[c] for c in "NHGEF")
    shapes = {"q": (n, heads, e), "k": (n, groups, e), "v": (n, groups, f)}
    arguments: dict[str, Any] = {name: normal(*shape) for name, shape in shapes.items()}
    if case.op == "attention_jvp":
        arguments |= {f"d{name}": normal(case.sizes["K"], *shape) for name, shape in shapes.items()}
    options: dict[str, Any] = {
        "cu_seqlens": torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32),
        "parent": None if case.parent is None else torch.tensor(case.parent, dtype=torch.int32),
        "scale": case.scale / math.sqrt(e),
        "window": case.window,
        "softcap": case.softcap,
    }
    if case.op == "attention_backward":
        wide = {name: x.double() for name, x in arguments.items()}
        out, lse = reference.attention(**wide, **options)
        accumulate = torch.float64 if case.dtype == torch.float64 else torch.float32
        arguments |= {"grad": normal(n, heads, f), "out": out.to(case.dtype), "lse": lse.to(accumulate)}
    return arguments | options


@dataclass
class _Weights:
    """Per-pair quantities of the error analysis, (H, N, N) and (H, N); errors are in units of eps."""

    p: Tensor
    slope: Tensor  # of the cap
    slope_error: Tensor
    lse_error: Tensor  # (H, N)
    error: Tensor  # of p, relative (H, N, 1)


def _row_max(x: Tensor) -> Tensor:
    return x.amax(-1) if x.shape[-1] else x.sum(-1)


def _per_query_head(case: "Case", x: Tensor) -> Tensor:
    return x.repeat_interleave(case.sizes["H"] // case.sizes["G"], -2)


def _weights(case: "Case", wide: dict[str, Any]) -> _Weights:
    q, k, cu_seqlens, parent, scale = (wide[name] for name in ("q", "k", "cu_seqlens", "parent", "scale"))
    p, lse, slope = reference._attention_weights(q, k, cu_seqlens, parent, scale, case.window, case.softcap)
    visible = reference._visible(cu_seqlens, parent, case.window, q.shape[0])
    k = _per_query_head(case, k)
    s = scale * torch.einsum("nhe,mhe->hnm", q, k)
    c = case.softcap * torch.tanh(s / case.softcap) if case.softcap else s
    magnitude = scale * torch.einsum("nhe,mhe->hnm", q.abs(), k.abs())
    # A cap contracts (slope <= 1) and adds the rounding of tanh and of the division.
    logit_error = _row_max(visible * magnitude) + 2 * _row_max(visible * c.abs())
    # exp turns the absolute error of c - max into a relative one; the sum of T terms adds sqrt(T), the logarithm its
    # own rounding.
    lse_error = logit_error + visible.sum(-1).double().sqrt() + lse.abs()
    # |c''| <= 0.77 / softcap
    slope_error = 0.77 * logit_error / case.softcap + 2 if case.softcap else torch.zeros_like(logit_error)
    return _Weights(p, slope, slope_error[..., None], lse_error, (logit_error + lse_error)[..., None])


def _rounding(case: "Case") -> float:
    """Eps of the inputs' dtype: weights and their derivatives may be rounded to it before the next product."""
    accumulate = torch.float64 if case.dtype == torch.float64 else torch.float32
    return torch.finfo(case.dtype).eps / torch.finfo(accumulate).eps


def scales(case: "Case", wide: dict[str, Any]) -> tuple[Tensor, ...]:
    """Error scale of every output entry (see :mod:`u2a_fast.testing`), from float64 arguments."""
    weights = _weights(case, wide)
    if case.op == "attention_backward":
        return _backward_scales(case, wide, weights)
    rounding = 1 + _rounding(case)
    v = _per_query_head(case, wide["v"])
    out = torch.einsum("hnm,mhf->nhf", weights.p * (weights.error + rounding), v.abs())
    lse = weights.lse_error.T
    if case.op == "attention":
        return out, lse
    return out, lse, _jvp_scale(case, wide, weights, out)


def _jvp_scale(case: "Case", wide: dict[str, Any], weights: _Weights, out_error: Tensor) -> Tensor:
    rounding = 1 + _rounding(case)
    q, scale = wide["q"], wide["scale"]
    k, v, dk, dv = (_per_query_head(case, wide[name]) for name in ("k", "v", "dk", "dv"))
    out = torch.einsum("hnm,mhf->nhf", weights.p, v)
    found = []
    for dq_j, dk_j, dv_j in zip(wide["dq"], dk, dv, strict=True):
        ds = scale * (torch.einsum("nhe,mhe->hnm", dq_j, k) + torch.einsum("nhe,mhe->hnm", q, dk_j))
        magnitude = torch.einsum("nhe,mhe->hnm", dq_j.abs(), k.abs()) + torch.einsum(
            "nhe,mhe->hnm", q.abs(), dk_j.abs()
        )
        pds = weights.p * ds.abs() * weights.slope
        ds_error = weights.p * scale * magnitude * (weights.slope + weights.slope_error)
        pds_error = ds_error + pds * (weights.error + rounding)
        mean, mean_error = (x.sum(-1).T[..., None] for x in (weights.p * ds * weights.slope, pds_error))
        terms = torch.einsum("hnm,mhf->nhf", pds_error, v.abs())
        terms = terms + torch.einsum("hnm,mhf->nhf", weights.p * (weights.error + rounding), dv_j.abs())
        found.append(terms + mean_error * out.abs() + mean.abs() * out_error)
    return torch.stack(found) if found else out.new_zeros(0, *out.shape)


def _backward_scales(case: "Case", wide: dict[str, Any], weights: _Weights) -> tuple[Tensor, ...]:
    rounding = 1 + _rounding(case)
    q, grad, out, scale = (wide[name] for name in ("q", "grad", "out", "scale"))
    k, v = (_per_query_head(case, wide[name]) for name in ("k", "v"))
    change = torch.einsum("nhf,mhf->hnm", grad, v) - (grad * out).sum(-1).T[..., None]
    magnitude = torch.einsum("nhf,mhf->hnm", grad.abs(), v.abs()) + (grad * out).abs().sum(-1).T[..., None]
    ds = weights.p * scale * weights.slope * change.abs()
    ds_error = ds * (weights.error + rounding)
    ds_error = ds_error + weights.p * scale * (weights.slope * magnitude + weights.slope_error * change.abs())

    def per_key_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (case.sizes["G"], -1)).sum(2)

    dq = torch.einsum("hnm,mhe->nhe", ds_error, k.abs())
    dk = per_key_head(torch.einsum("hnm,nhe->mhe", ds_error, q.abs()))
    dv = per_key_head(torch.einsum("hnm,nhf->mhf", weights.p * (weights.error + rounding), grad.abs()))
    return dq, dk, dv


def _pairs(case: "Case") -> int:
    """Visible pairs of a query and a key."""
    parents = case.parent or (-1,) * len(case.lengths)
    total = 0
    for length, parent in zip(case.lengths, parents, strict=True):
        before = case.lengths[parent] if parent >= 0 else 0
        seen = range(before + 1, before + length + 1)
        total += sum(min(x, case.window) for x in seen) if case.window else sum(seen)
    return total


def cost(case: "Case") -> tuple[int, int]:
    """Flops of the visible pairs, and bytes of every argument and result once."""
    n, heads, groups, e, f = (case.sizes[c] for c in "NHGEF")
    directions = case.sizes.get("K", 0)
    per_pair = 2 * (3 * e + 2 * f) if case.op == "attention_backward" else 2 * (1 + 2 * directions) * (e + f)
    queries, keys, outputs = n * heads * e, n * groups * (e + f), n * heads * f
    elements = {
        "attention": queries + keys + outputs,
        "attention_backward": 2 * (queries + keys + outputs),
        "attention_jvp": (1 + directions) * (queries + keys + outputs),
    }[case.op]
    element, accumulator = torch.finfo(case.dtype).bits // 8, 8 if case.dtype == torch.float64 else 4
    return heads * per_pair * _pairs(case), element * elements + accumulator * n * heads
