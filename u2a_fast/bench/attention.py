"""Attention over packed segments as one would write it in PyTorch: fused attention, segment by segment."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["attention", "attention_backward", "attention_jvp"]


def _segments(cu_seqlens: Tensor, parent: Tensor | None) -> list[tuple[slice, slice | None]]:
    """Rows of each segment, and of the one that it continues."""
    starts = cu_seqlens.tolist()
    rows = [slice(i, j) for i, j in zip(starts[:-1], starts[1:], strict=True)]
    parents = [-1] * len(rows) if parent is None else parent.tolist()
    return [(own, rows[j] if j >= 0 else None) for own, j in zip(rows, parents, strict=True)]


def _sequence(x: Tensor, own: slice, prompt: slice | None) -> Tensor:
    """Rows of a segment behind a copy of those that it continues, (1, heads, tokens, features)."""
    rows = x[own] if prompt is None else torch.cat([x[prompt], x[own]])
    return rows.transpose(0, 1)[None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    parent: Tensor | None = None,
    scale: float = 1.0,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Outputs (N, H, F) of ``ops.attention`` without window or softcap, which fused attention does not know."""
    assert not window and not softcap, "the timing cases have neither"
    parts = []
    for own, prompt in _segments(cu_seqlens, parent):
        query, key, value = (_sequence(x, own, prompt) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        parts.append(out[0].transpose(0, 1)[out.shape[2] - (own.stop - own.start) :])
    return torch.cat(parts)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """Gradients in q, k and v; autograd runs the forward pass too."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return torch.autograd.grad(attention(q, k, v, cu_seqlens, **options), (q, k, v), grad)


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, cu_seqlens: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Outputs and their first directional derivative, through the one of PyTorch's attentions that has forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(
            lambda q, k, v: attention(q, k, v, cu_seqlens, **options), (q, k, v), (dq[0], dk[0], dv[0])
        )[:2]
