"""Public ops: argument checks, then ``torch.ops.u2a_fast.<op>``.

Shape letters are those of :mod:`u2a_fast.reference`, which also says what each op means. All floating arguments of
one call share one dtype (float16, bfloat16, float32 or float64) and one device. Arithmetic and results are float32,
or float64 for float64 arguments. The same call gives the same bits, whatever the number of threads.

Any strides are accepted. Values of ``cu_seqlens`` and ``target`` are checked on CPU only: on a GPU that would cost a
synchronization, and wrong values there are undefined behavior.
"""

import torch
from torch import Tensor

from . import _register  # noqa: F401  (registers torch.ops.u2a_fast)
from ._check import (
    Shapes,
    check_cu_seqlens,
    check_dtypes,
    check_parent,
    check_sketch,
    check_softcap,
    check_target,
    check_window,
)

__all__ = [
    "attention",
    "attention_backward",
    "attention_jvp",
    "ghost_dot",
    "ghost_norm",
    "grad_sketch",
    "linear_logprob",
    "linear_logprob_backward",
    "linear_logprob_jvp",
]


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


def ghost_dot(a: Tensor, g: Tensor, cu_seqlens: Tensor, v: Tensor) -> Tensor:
    """Inner products <V_k, G_i> of K directions with the weight gradients of B examples, none of which is formed.

    For a linear layer y_t = W a_t with output gradients g_t, G_i = sum_{t in i} g_t a_t^T, so that
    <V_k, G_i> = sum_{t in i} g_t^T V_k a_t. Cost: 2 K N I O flops. Differentiable in a, g and v.

    Args:
        a: layer inputs of all examples' tokens, (N, I).
        g: gradients at the layer's outputs, (N, O).
        cu_seqlens: example i owns rows cu_seqlens[i] to cu_seqlens[i + 1], (B + 1) int32; empty examples are allowed.
        v: directions in weight space, (K, O, I).

    Returns:
        (K, B); float32, or float64 for float64 arguments. An empty example gives 0.

    Raises:
        ValueError: a shape, a device or a value of ``cu_seqlens`` does not fit.
        TypeError: a dtype does not fit.
    """
    shapes = Shapes("ghost_dot")
    shapes.bind("a", a, "N I")
    shapes.bind("g", g, "N O")
    check_cu_seqlens(shapes, cu_seqlens, "a")
    shapes.bind("v", v, "K O I")
    check_dtypes("ghost_dot", [("a", a), ("g", g), ("v", v)])
    return torch.ops.u2a_fast.ghost_dot(a, g, cu_seqlens, v)


def ghost_norm(a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Squared Frobenius norms of the weight gradients of B examples, none of which is stored.

    ||G_i||^2 = sum_{t,s in i} (a_t . a_s)(g_t . g_s), or the squared entries of G_i tile by tile, whichever is cheaper
    (Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679). Not differentiable.

    Args:
        a: layer inputs of all examples' tokens, (N, I).
        g: gradients at the layer's outputs, (N, O).
        cu_seqlens: example i owns rows cu_seqlens[i] to cu_seqlens[i + 1], (B + 1) int32; empty examples are allowed.

    Returns:
        (B); float32, or float64 for float64 arguments. An empty example gives 0.

    Raises:
        ValueError: a shape, a device or a value of ``cu_seqlens`` does not fit.
        TypeError: a dtype does not fit.
    """
    shapes = Shapes("ghost_norm")
    shapes.bind("a", a, "N I")
    shapes.bind("g", g, "N O")
    check_cu_seqlens(shapes, cu_seqlens, "a")
    check_dtypes("ghost_norm", [("a", a), ("g", g)])
    return torch.ops.u2a_fast.ghost_norm(a, g, cu_seqlens)


def grad_sketch(a: Tensor, g: Tensor, cu_seqlens: Tensor, dim: int, seed: int) -> Tensor:
    """Sketches S vec(G_i) of the weight gradients of B examples, none of which is stored, S drawn from ``seed``.

    E <Sx, Sy> = <x, y>, Var <Sx, Sy> <= 2 |x|^2 |y|^2 / dim (:mod:`u2a_fast.sketch`). Not differentiable.

    Args:
        a: layer inputs of all examples' tokens, (N, I).
        g: gradients at the layer's outputs, (N, O).
        cu_seqlens: example i owns rows cu_seqlens[i] to cu_seqlens[i + 1], (B + 1) int32; empty examples are allowed.
        dim: entries M of a sketch, from 32 to 8192.
        seed: from 0 to 2^63 - 1; layers whose sketches are added need one each.

    Returns:
        (B, M); float32, or float64 for float64 arguments. An empty example gives 0.

    Raises:
        ValueError: a shape, a device, ``dim``, ``seed`` or a value of ``cu_seqlens`` does not fit.
        TypeError: a dtype does not fit.
    """
    shapes = Shapes("grad_sketch")
    shapes.bind("a", a, "N I")
    shapes.bind("g", g, "N O")
    check_cu_seqlens(shapes, cu_seqlens, "a")
    check_dtypes("grad_sketch", [("a", a), ("g", g)])
    check_sketch("grad_sketch", dim, seed)
    return torch.ops.u2a_fast.grad_sketch(a, g, cu_seqlens, dim, seed)


def _bind_head(shapes: Shapes, h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float) -> None:
    shapes.bind("h", h, "N D")
    shapes.bind("weight", weight, "V D")
    check_target(shapes, target)
    if bias is not None:
        shapes.bind("bias", bias, "V")
    check_softcap(shapes.op, softcap)


def linear_logprob(
    h: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of target tokens under a linear head, without its logits in memory.

    log p_t = c(z_t)[target_t] - lse_t with z_t = W h_t + b, lse_t = log sum_v exp c(z_t)[v] and the soft cap
    c(z) = softcap tanh(z / softcap) of Gemma 2 (0: no cap). Cost: 2 N D V flops in one pass over the vocabulary.
    Differentiable in h, weight and bias through both outputs.

    Args:
        h: hidden states, (N, D).
        weight: head weights, (V, D).
        target: token ids in [0, V), (N) int64.
        bias: head biases, (V), or None.
        softcap: finite, >= 0.

    Returns:
        log p(target) (N) and the log-sum-exp (N); float32, or float64 for float64 arguments.

    Raises:
        ValueError: a shape, a device, a target or the cap does not fit.
        TypeError: a dtype does not fit.
    """
    _bind_head(Shapes("linear_logprob"), h, weight, target, bias, softcap)
    check_dtypes("linear_logprob", [("h", h), ("weight", weight), ("bias", bias)])
    return torch.ops.u2a_fast.linear_logprob(h, weight, target, bias, softcap)


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
    """Gradients of sum_t grad_logp_t log p_t + grad_lse_t lse_t, with the logits recomputed tile by tile.

    With p_t the softmax: dz_t = c'(z_t) (grad_logp_t e_target + (grad_lse_t - grad_logp_t) p_t), dh = dz W,
    dW = dz^T h, db = sum_t dz_t. Cost: 2 N D V flops, and as many again for each of h and weight. Not differentiable.

    Args:
        grad_logp: upstream gradients of the log-probabilities, (N) in the accumulation dtype.
        grad_lse: upstream gradients of the log-sum-exp, (N) in the accumulation dtype.
        h: hidden states, (N, D).
        weight: head weights, (V, D).
        target: token ids in [0, V), (N) int64.
        lse: second output of :func:`linear_logprob`, (N) in the accumulation dtype.
        bias: head biases, (V), or None.
        softcap: finite, >= 0.
        need_h: whether to compute the gradient in h.
        need_weight: whether to compute the gradients in weight and bias.

    Returns:
        Gradients in h (N, D) in its dtype, and in weight (V, D) and bias (V) in the accumulation dtype (float32, or
        float64 for float64 arguments). A gradient that is not needed has length 0 along its first axis.

    Raises:
        ValueError: a shape, a device, a target or the cap does not fit.
        TypeError: a dtype does not fit.
    """
    op = "linear_logprob_backward"
    shapes = Shapes(op)
    _bind_head(shapes, h, weight, target, bias, softcap)
    check_dtypes(op, [("h", h), ("weight", weight), ("bias", bias)])
    accumulation = torch.float64 if h.dtype == torch.float64 else torch.float32
    for name, x in (("grad_logp", grad_logp), ("grad_lse", grad_lse), ("lse", lse)):
        shapes.bind(name, x, "N")
        if x.dtype != accumulation:
            raise TypeError(f"[{op}] expected {name} of dtype {accumulation} (for h of {h.dtype}), got {x.dtype}")
    return torch.ops.u2a_fast.linear_logprob_backward(
        grad_logp, grad_lse, h, weight, target, lse, bias, softcap, need_h, need_weight
    )


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
    """Log-probabilities, their log-sum-exp and K directional derivatives of them in one pass over the vocabulary.

    dlog p_kt = dc_kt[target_t] - sum_v p_tv dc_kt[v] with dc_k = c'(z) (W dh_k + dW_k h + db_k). Not differentiable.
    Cost: 2 N D V flops, and 2 K N D V for each of dh and dweight.

    Args:
        h: hidden states, (N, D).
        weight: head weights, (V, D).
        target: token ids in [0, V), (N) int64.
        dh: tangents of h, (K, N, D), or None for zero; at least one of dh and dweight is given.
        dweight: tangents of weight, (K, V, D), or None for zero.
        bias: head biases, (V), or None.
        dbias: tangents of bias, (K, V), or None for zero.
        softcap: finite, >= 0.

    Returns:
        log p(target) (N), the log-sum-exp (N) and the derivatives of log p(target) (K, N); float32, or float64 for
        float64 arguments.

    Raises:
        ValueError: a shape, a device, a target or the cap does not fit, or neither dh nor dweight is given.
        TypeError: a dtype does not fit.
    """
    op = "linear_logprob_jvp"
    shapes = Shapes(op)
    _bind_head(shapes, h, weight, target, bias, softcap)
    if dh is None and dweight is None:
        raise ValueError(f"[{op}] expected dh or dweight to be given, got neither")
    for name, x, letters in (("dh", dh, "K N D"), ("dweight", dweight, "K V D"), ("dbias", dbias, "K V")):
        if x is not None:
            shapes.bind(name, x, letters)
    named = [("h", h), ("weight", weight), ("dh", dh), ("dweight", dweight), ("bias", bias), ("dbias", dbias)]
    check_dtypes(op, named)
    return torch.ops.u2a_fast.linear_logprob_jvp(h, weight, target, dh, dweight, bias, dbias, softcap)
