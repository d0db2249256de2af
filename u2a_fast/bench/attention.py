"""Attention over packed segments as one would write it in PyTorch, segment by segment.

Fused where ``scaled_dot_product_attention`` knows the case, else the logits are made, as in transformers' eager form.
"""

from functools import partial
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


def _eager(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = scale * (query @ key.transpose(-1, -2))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    token = torch.arange(key.shape[2], device=key.device)
    past = token[:, None] - token
    hidden = (past < 0) | (past >= (window or key.shape[2]))
    logits = logits.masked_fill(hidden, -torch.inf)
    return torch.softmax(logits, -1, dtype=torch.float32).to(query.dtype) @ value


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
    """Outputs (N, H, F) of ``ops.attention``."""
    grouped, parts = q.shape[1] != k.shape[1], []
    for own, prompt in _segments(cu_seqlens, parent):
        query, key, value = (_sequence(x, own, prompt) for x in (q, k, v))
        if window or softcap:
            out = _eager(query, key, value, scale, window, softcap)
        else:
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
    """Outputs and their K directional derivatives, by the one of PyTorch's attentions that has forward mode."""

    def along(*tangents: Tensor) -> Any:
        return torch.func.jvp(partial(attention, cu_seqlens=cu_seqlens, **options), (q, k, v), tangents)

    with sdpa_kernel(SDPBackend.MATH):
        if len(dq) > 1:  # for one direction a batch of them would only slow the yardstick down
            outs, tangents = torch.func.vmap(along)(dq, dk, dv)
            return outs[0], tangents
        out, tangent = along(dq[0], dk[0], dv[0])
        return out, tangent[None]
