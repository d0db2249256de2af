"""What every op means: the specification that the C++ and Triton kernels are judged against.

Letters, used alike in every signature and kernel of the project:

    N  packed tokens            B  examples               K  directions
    I  input features           O  output features        D  hidden features      V  vocabulary

Tokens of all examples lie one after the other; example ``i`` owns rows ``cu_seqlens[i]`` to
``cu_seqlens[i + 1]`` (``cu_seqlens`` is int32, length B + 1, starts at 0 and ends at N). A linear layer
``y_t = W a_t`` with output gradient ``g_t = dL/dy_t`` has the per-example weight gradient
``G_i = sum_{t in i} g_t a_t^T``, an O x I matrix that no function here ever forms.

Arithmetic is float64 for float64 inputs and float32 for every other dtype, whatever the inputs' own precision.
These functions are the schema, the shape inference and the fallback of their ops, so they hold no data-dependent
control flow and accept empty inputs.
"""

import torch
from torch import Tensor

__all__ = [
    "ghost_dot",
    "ghost_norm",
    "linear_logprob",
    "linear_logprob_backward",
    "linear_logprob_jvp",
]


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _segment_ids(cu_seqlens: Tensor, n: int) -> Tensor:
    tokens = torch.arange(n, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(tokens, cu_seqlens[1:], right=True)


def _segment_sum(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    out = rows.new_zeros(*rows.shape[:-1], cu_seqlens.shape[0] - 1)
    return out.index_add_(-1, _segment_ids(cu_seqlens, rows.shape[-1]), rows)


def ghost_dot(a: Tensor, g: Tensor, cu_seqlens: Tensor, v: Tensor) -> Tensor:
    """<V_k, G_i> for every direction k and example i.

    Shapes: a (N, I), g (N, O), cu_seqlens (B + 1), v (K, O, I) -> (K, B).
    Cost: 2 K N I O flops; a, g and v read once.
    """
    acc = _accumulate_dtype(a)
    a, g, v = a.to(acc), g.to(acc), v.to(acc)
    rows = torch.stack([((a @ v_k.T) * g).sum(-1) for v_k in v]) if v.shape[0] else a.new_zeros(0, a.shape[0])
    return _segment_sum(rows, cu_seqlens)


def ghost_norm(a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    """||G_i||^2 (Frobenius) for every example i.

    Shapes: a (N, I), g (N, O), cu_seqlens (B + 1) -> (B).
    Cost: the cheaper of sum_i T_i^2 (I + O) multiply-adds (token Grams) and N I O (the tile G_i).
    """
    acc = _accumulate_dtype(a)
    a, g = a.to(acc), g.to(acc)
    ids = _segment_ids(cu_seqlens, a.shape[0])
    same_example = ids[:, None] == ids[None, :]
    # a product with the mask would carry one example's NaN into every other
    rows = torch.where(same_example, (a @ a.T) * (g @ g.T), 0.0).sum(-1)
    return _segment_sum(rows, cu_seqlens)


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> tuple[Tensor, Tensor]:
    """Capped logits c(z) and the cap's slope c'(z), z = h W^T + b; softcap 0 means no cap."""
    acc = _accumulate_dtype(h)
    z = h.to(acc) @ weight.to(acc).T
    if bias is not None:
        z = z + bias.to(acc)
    if softcap == 0.0:
        return z, torch.ones_like(z)
    t = torch.tanh(z / softcap)
    return softcap * t, 1 - t * t


def linear_logprob(
    h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """log p(target_t) under softmax(c(h_t W^T + b)) and its log-sum-exp; c(z) = softcap tanh(z / softcap).

    Shapes: h (N, D), weight (V, D), target (N) int64, bias (V) -> (N), (N).
    Cost: 2 N D V flops; h and weight read once, logits never stored (by the kernels).
    """
    c, _ = _logits(h, weight, bias, softcap)
    lse = torch.logsumexp(c, -1)
    return c.gather(-1, target[:, None])[:, 0] - lse, lse


def linear_logprob_backward(
    grad_logp: Tensor,
    grad_lse: Tensor,
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    need_h: bool = True,
    need_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum_t grad_logp_t logp_t + grad_lse_t lse_t in h, weight and bias.

    With p the softmax and e_y the target's indicator, dL/dz_t = c'(z_t) * (grad_logp_t e_y + (grad_lse_t -
    grad_logp_t) p_t).
    Shapes: grad_logp (N), grad_lse (N), lse (N) -> (N, D) in h's dtype, (V, D) and (V) in the accumulation dtype;
    an output that is not needed is empty (size 0 along its first axis).
    Cost: 2 N D V flops for the logits, 2 N D V more for each of h and weight.
    """
    c, slope = _logits(h, weight, bias, softcap)
    dz = (grad_lse - grad_logp).to(c.dtype)[:, None] * torch.exp(c - lse.to(c.dtype)[:, None])
    dz = dz.scatter_add(-1, target[:, None], grad_logp.to(c.dtype)[:, None]) * slope
    grad_h = (dz @ weight.to(c.dtype)).to(h.dtype) if need_h else h.new_empty(0, h.shape[1])
    if not need_weight:
        return grad_h, c.new_empty(0, h.shape[1]), c.new_empty(0)
    return grad_h, dz.T @ h.to(c.dtype), dz.sum(0)


def linear_logprob_jvp(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    dh: Tensor | None = None,
    dweight: Tensor | None = None,
    bias: Tensor | None = None,
    dbias: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target_t), its log-sum-exp and K directional derivatives of log p(target_t), in one pass.

    The tangent of the logits is dz_k = dh_k W^T + h dW_k^T + db_k; at least one of dh, dweight is given.
    Shapes: dh (K, N, D), dweight (K, V, D), dbias (K, V) -> (N), (N), (K, N).
    Cost: 2 N D V flops, 2 K N D V more for each of dh and dweight.
    """
    c, slope = _logits(h, weight, bias, softcap)
    lse = torch.logsumexp(c, -1)
    p = torch.exp(c - lse[:, None])
    given = dh if dh is not None else dweight
    assert given is not None
    rows = []
    for k in range(given.shape[0]):
        dz = torch.zeros_like(c)
        if dh is not None:
            dz = dz + dh[k].to(c.dtype) @ weight.to(c.dtype).T
        if dweight is not None:
            dz = dz + h.to(c.dtype) @ dweight[k].to(c.dtype).T
        if dbias is not None:
            dz = dz + dbias[k].to(c.dtype)
        dz = dz * slope
        rows.append(dz.gather(-1, target[:, None])[:, 0] - (p * dz).sum(-1))
    jvp = torch.stack(rows) if rows else c.new_zeros(0, h.shape[0])
    return c.gather(-1, target[:, None])[:, 0] - lse, lse, jvp
