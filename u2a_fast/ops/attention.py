"""Attention of packed segments: argument checks, then ``torch.ops.u2a_fast.<op>``."""

import torch
from torch import Tensor

from u2a_fast._check import Shapes, check_cu_seqlens, check_dtypes, check_parent, check_softcap, check_window

__all__ = ["attention", "attention_backward", "attention_jvp"]


def _bind_attention(
    shapes: Shapes, tensors: tuple[Tensor, ...], cu_seqlens: Tensor, parent: Tensor | None, window: int, softcap: float
) -> None:
    for (name, letters), x in zip((("q", "N H E"), ("k", "N G E"), ("v", "N G F")), tensors, strict=True):
        shapes.bind(name, x, letters)
    heads, groups = shapes.sizes["H"], shapes.sizes["G"]
    if groups == 0 or heads % groups:
        raise ValueError(f"[{shapes.op}] expected G to divide H = {heads} (from q), got G = {groups} (from k)")
    check_cu_seqlens(shapes, cu_seqlens, "q")
    if parent is not None:
        check_parent(shapes, parent)
    check_window(shapes.op, window)
    check_softcap(shapes.op, softcap)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    parent: Tensor | None = None,
    scale: float = 1.0,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Causal grouped-query attention within segments of packed tokens, without an N x N matrix in memory.

    A query sees its own key and those before it: o = sum_m p_m v_m with p the softmax of c(scale q . k_m) and the soft
    cap c(s) = softcap tanh(s / softcap) of Gemma 2 (Dao et al. 2022, arXiv:2205.14135; Rabe & Staats 2021,
    arXiv:2112.05682). Segments may share a beginning: where parent[j] >= 0, segment j continues segment parent[j].
    Differentiable in q, k and v through the first output.

    Args:
        q: queries, (N, H, E).
        k: keys, (N, G, E) with G dividing H; query head h reads key head h // (H / G).
        v: values, (N, G, F).
        cu_seqlens: segment j owns rows cu_seqlens[j] to cu_seqlens[j + 1], (B + 1) int32; empty segments are allowed.
        parent: (B) int32: -1 for a segment that starts a sequence, else the last such segment before it; None: all -1.
        scale: factor of q . k, usually E ** -0.5.
        window: most keys that a query sees, its own among them; 0: all.
        softcap: finite, >= 0 (0: no cap).

    Returns:
        Outputs (N, H, F) in q's dtype, and the log-sum-exp of the scores (N, H) in float32, or float64 for float64.

    Raises:
        ValueError: a shape, a device, an offset, a parent, the window or the cap does not fit.
        TypeError: a dtype does not fit.
    """
    _bind_attention(Shapes("attention"), (q, k, v), cu_seqlens, parent, window, softcap)
    check_dtypes("attention", [("q", q), ("k", k), ("v", v)])
    return torch.ops.u2a_fast.attention(q, k, v, cu_seqlens, parent, scale, window, softcap)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    parent: Tensor | None = None,
    scale: float = 1.0,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(grad * out) in q, k and v, for ``out, lse = attention(q, k, v, ...)``. Not differentiable.

    Args:
        grad: upstream gradient, (N, H, F).
        q: queries, (N, H, E).
        k: keys, (N, G, E).
        v: values, (N, G, F).
        out: first output of :func:`attention`, (N, H, F).
        lse: second output of :func:`attention`, (N, H) in the accumulation dtype.
        cu_seqlens: as in :func:`attention`, and so are ``parent``, ``scale``, ``window`` and ``softcap``.
        parent: as in :func:`attention`.
        scale: as in :func:`attention`.
        window: as in :func:`attention`.
        softcap: as in :func:`attention`.

    Returns:
        Gradients in q, k and v, with their shapes and dtypes.

    Raises:
        ValueError: a shape, a device, an offset, a parent, the window or the cap does not fit.
        TypeError: a dtype does not fit.
    """
    op = "attention_backward"
    shapes = Shapes(op)
    _bind_attention(shapes, (q, k, v), cu_seqlens, parent, window, softcap)
    for name, x, letters in (("grad", grad, "N H F"), ("out", out, "N H F"), ("lse", lse, "N H")):
        shapes.bind(name, x, letters)
    check_dtypes(op, [("q", q), ("k", k), ("v", v), ("grad", grad), ("out", out)])
    accumulation = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lse.dtype != accumulation:
        raise TypeError(f"[{op}] expected lse of dtype {accumulation} (for q of {q.dtype}), got {lse.dtype}")
    return torch.ops.u2a_fast.attention_backward(grad, q, k, v, out, lse, cu_seqlens, parent, scale, window, softcap)


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens: Tensor,
    parent: Tensor | None = None,
    scale: float = 1.0,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`attention` and K directional derivatives of its output in one pass over the keys. Not differentiable.

    With ds = c' scale (dq . k + q . dk): do = sum_m p_m (ds_m v_m + dv_m) - (sum_m p_m ds_m) o.

    Args:
        q: queries, (N, H, E).
        k: keys, (N, G, E).
        v: values, (N, G, F).
        dq: tangents of q, (K, N, H, E).
        dk: tangents of k, (K, N, G, E).
        dv: tangents of v, (K, N, G, F).
        cu_seqlens: as in :func:`attention`, and so are ``parent``, ``scale``, ``window`` and ``softcap``.
        parent: as in :func:`attention`.
        scale: as in :func:`attention`.
        window: as in :func:`attention`.
        softcap: as in :func:`attention`.

    Returns:
        Outputs (N, H, F) in q's dtype, the log-sum-exp (N, H) in the accumulation dtype, and the outputs' tangents
        (K, N, H, F) in q's dtype.

    Raises:
        ValueError: a shape, a device, an offset, a parent, the window or the cap does not fit.
        TypeError: a dtype does not fit.
    """
    op = "attention_jvp"
    shapes = Shapes(op)
    _bind_attention(shapes, (q, k, v), cu_seqlens, parent, window, softcap)
    for name, x, letters in (("dq", dq, "K N H E"), ("dk", dk, "K N G E"), ("dv", dv, "K N G F")):
        shapes.bind(name, x, letters)
    check_dtypes(op, [("q", q), ("k", k), ("v", v), ("dq", dq), ("dk", dk), ("dv", dv)])
    return torch.ops.u2a_fast.attention_jvp(q, k, v, dq, dk, dv, cu_seqlens, parent, scale, window, softcap)
