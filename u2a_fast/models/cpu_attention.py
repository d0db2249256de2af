"""Causal attention in half precision on CPU: the library's forward pass and a backward pass of six batched products.

PyTorch's fused CPU backward takes 12 ms in bfloat16 where these products take 4 ms (6 examples of 170 tokens, 4 heads
of 64, one thread; benchmarks/LOG.md), because only whole products run on the matrix units. Log-probabilities are
formed in float32; against float64 the gradients of keys and values are closer than the library's, those of queries a
little less.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["causal_attention", "serves"]

_LARGEST = 2**26  # probabilities held at once in float32: 256 MiB


def serves(q: Tensor, v: Tensor, dropout: float) -> bool:
    """Whether ``causal_attention`` is the better choice for queries (B, H, T, E) and values (B, G, T, E)."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return (
        q.device.type == "cpu"
        and half
        and dropout == 0.0
        and q.shape[-1] == v.shape[-1]
        and q[..., 0].numel() * q.shape[2] <= _LARGEST
    )


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        ctx.scale = scale
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 0.0, True, scale=scale
        )
        ctx.save_for_backward(q, k, v, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, lse = ctx.saved_tensors
        batch, heads, length, size = q.shape
        groups = heads // k.shape[1]
        queries, grads = (x.reshape(-1, groups * length, size) for x in (q, grad))
        keys, values = (x.reshape(-1, length, size) for x in (k, v))
        shift = -lse.reshape(-1, groups * length, 1)
        p = torch.baddbmm(shift, queries.float(), keys.float().transpose(1, 2), alpha=ctx.scale).exp_()
        p.view(-1, groups, length, length).tril_()
        p = p.to(q.dtype)
        dp = torch.bmm(grads, values.transpose(1, 2))
        dlogits = torch._softmax_backward_data(dp, p, -1, q.dtype)
        dq = torch.bmm(dlogits, keys).mul_(ctx.scale).view(q.shape)
        dk = torch.bmm(dlogits.transpose(1, 2), queries).mul_(ctx.scale).view(k.shape)
        dv = torch.bmm(p.transpose(1, 2), grads).view(v.shape)
        return dq, dk, dv, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, causal) v with grouped queries.

    Shapes: q (B, H, T, E), k and v (B, G, T, E), G dividing H -> (B, H, T, E).
    """
    return _CausalAttention.apply(q, k, v, scale)
