"""What every op means: the specification that the C++ and Triton kernels are judged against.

Letters, used alike in every signature and kernel of the project:

    N  packed tokens            B  examples               K  directions
    I  input features           O  output features        D  hidden features      V  vocabulary
    H  query heads              G  key heads, G | H       E  head features        F  value features
    P  projected inputs         Q  projected outputs      R  rank of a direction  M  sketch entries

Tokens of all examples lie one after the other; example ``i`` owns rows ``cu_seqlens[i]`` to
``cu_seqlens[i + 1]`` (``cu_seqlens`` is int32, length B + 1, starts at 0 and ends at N). A linear layer
``y_t = W a_t`` with output gradient ``g_t = dL/dy_t`` has the per-example weight gradient
``G_i = sum_{t in i} g_t a_t^T``, an O x I matrix that no function here ever forms whole.

Arithmetic is float64 for float64 inputs and float32 for every other dtype, whatever the inputs' own precision.
These functions are the schema, the shape inference and the fallback of their ops, so they hold no data-dependent
control flow and accept empty inputs.
"""

import math

import torch
from torch import Tensor

from .sketch import sketch_map

__all__ = [
    "attention",
    "attention_backward",
    "attention_jvp",
    "ghost_dot",
    "ghost_dot_lowrank",
    "ghost_norm",
    "glu_jvp",
    "grad_project",
    "grad_sketch",
    "linear_logprob",
    "linear_logprob_backward",
    "linear_logprob_jvp",
    "rms_norm_jvp",
    "rotary",
]


_SKETCHED_ROWS = 128  # of G_i at a time


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _segment_ids(cu_seqlens: Tensor, n: int) -> Tensor:
    tokens = torch.arange(n, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(tokens, cu_seqlens[1:], right=True)


def _segment_sum(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    out = rows.new_zeros(*rows.shape[:-1], cu_seqlens.shape[0] - 1)
    return out.index_add_(-1, _segment_ids(cu_seqlens, rows.shape[-1]), rows)


def _visible(cu_seqlens: Tensor, parent: Tensor | None, window: int, n: int) -> Tensor:
    """(N, N): whether query token n sees key token m."""
    ids = _segment_ids(cu_seqlens, n)
    tokens = torch.arange(n, device=cu_seqlens.device)
    before = torch.zeros_like(cu_seqlens[1:])  # tokens of the parent
    if parent is None:
        from_parent = torch.zeros_like(ids, dtype=torch.bool)[:, None]
    else:
        lengths = cu_seqlens.diff()
        before = torch.where(parent >= 0, lengths[parent.clamp(min=0).long()], before)
        from_parent = parent[ids][:, None] == ids[None, :]
    position = tokens - cu_seqlens[ids] + before[ids]
    distance = position[:, None] - position[None, :]
    visible = from_parent | ((ids[:, None] == ids[None, :]) & (distance >= 0))
    return visible & (distance < window) if window else visible


def _attention_weights(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, parent: Tensor | None, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax weights (H, N, N), log-sum-exp (H, N) and the slope of the scores in scale * q . k."""
    acc = _accumulate_dtype(q)
    k = k.to(acc).repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("nhe,mhe->hnm", q.to(acc), k) * scale
    slope = torch.ones_like(s)
    if softcap != 0.0:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    visible = _visible(cu_seqlens, parent, window, q.shape[0])
    s = s.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(s, -1)
    return torch.where(visible, torch.exp(s - lse[..., None]), 0.0), lse, slope


def _mix(weights: Tensor, x: Tensor, visible: Tensor) -> Tensor:
    """sum_m weights[h, n, m] x[m, h] over visible pairs -> (N, H, F); a zero weight shuts out NaN and infinity."""
    finite = x.isfinite()
    tainted = torch.einsum("nm,mhf->nhf", visible.to(x.dtype), (~finite).to(x.dtype)) > 0
    return torch.where(tainted, torch.nan, torch.einsum("hnm,mhf->nhf", weights, torch.where(finite, x, 0.0)))


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
    """Causal grouped-query attention within segments of packed tokens, and its log-sum-exp.

    Segment j owns rows cu_seqlens[j] to cu_seqlens[j + 1]; where parent[j] >= 0 it continues that segment, whose tokens
    come before its own: a root (parent -1) and the segments that continue it lie one after the other. A query sees the
    keys before it and its own, at most ``window`` of them (0: all). Scores are c(scale q . k) with c(s) = softcap
    tanh(s / softcap) (0: no cap). Query head h reads key head h // (H / G).
    Shapes: q (N, H, E), k (N, G, E), v (N, G, F), cu_seqlens (B + 1), parent (B) int32 -> (N, H, F) in q's dtype,
    (N, H) in the accumulation dtype.
    Cost: 2 (E + F) flops a visible pair and head; no N x N matrix is stored (by the kernels).
    """
    p, lse, _ = _attention_weights(q, k, cu_seqlens, parent, scale, window, softcap)
    visible = _visible(cu_seqlens, parent, window, q.shape[0])
    v = v.to(p.dtype).repeat_interleave(q.shape[1] // v.shape[1], 1)
    return _mix(p, v, visible).to(q.dtype).contiguous(), lse.T.contiguous()


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
    """Gradients of sum grad * out in q, k and v, in their dtypes, with the weights recomputed tile by tile.

    With p the weights, dp = grad v^T and ds = p (dp - grad . out): dq = scale c' ds k, dk = scale (c' ds)^T q, dv = p^T
    grad, summed over the query heads of a key head and over the segments that continue a parent.
    Shapes: grad and out (N, H, F), lse (N, H); outputs of ``attention`` -> shapes of q, k, v.
    Cost: 2 (3 E + 2 F) flops a visible pair and head.
    """
    p, _, slope = _attention_weights(q, k, cu_seqlens, parent, scale, window, softcap)
    visible = _visible(cu_seqlens, parent, window, q.shape[0])
    groups = k.shape[1]
    per_group = q.shape[1] // groups
    q_, k_, v_, grad_, out_ = (x.to(p.dtype) for x in (q, k, v, grad, out))
    k_, v_ = k_.repeat_interleave(per_group, 1), v_.repeat_interleave(per_group, 1)
    delta = (grad_ * out_).sum(-1).T[..., None]
    ds = torch.where(visible, scale * slope * p * (torch.einsum("nhf,mhf->hnm", grad_, v_) - delta), 0.0)
    dk = _mix(ds.transpose(1, 2), q_, visible.T).unflatten(1, (groups, per_group)).sum(2)
    dv = _mix(p.transpose(1, 2), grad_, visible.T).unflatten(1, (groups, per_group)).sum(2)
    dq = _mix(ds, k_, visible)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


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
    """``attention`` and its K directional derivatives in one pass over the keys.

    With ds = c' scale (dq . k + q . dk): dout = sum_m p_m (ds_m v_m + dv_m) - (sum_m p_m ds_m) out.
    Shapes: as ``attention``; dq (K, N, H, E), dk (K, N, G, E), dv (K, N, G, F) -> (N, H, F), (N, H), (K, N, H, F), the
    first and the last in q's dtype.
    Cost: 2 (E + F) flops a visible pair and head, 4 K (E + F) more for the tangents.
    """
    p, lse, slope = _attention_weights(q, k, cu_seqlens, parent, scale, window, softcap)
    visible = _visible(cu_seqlens, parent, window, q.shape[0])
    per_group = q.shape[1] // k.shape[1]
    k_, v_ = (x.to(p.dtype).repeat_interleave(per_group, 1) for x in (k, v))
    dk_, dv_ = (x.to(p.dtype).repeat_interleave(per_group, 2) for x in (dk, dv))
    out = _mix(p, v_, visible)
    rows = []
    for j in range(dq.shape[0]):
        ds = torch.einsum("nhe,mhe->hnm", dq[j].to(p.dtype), k_) + torch.einsum("nhe,mhe->hnm", q.to(p.dtype), dk_[j])
        pds = torch.where(visible, scale * slope * p * ds, 0.0)
        rows.append(_mix(pds, v_, visible) + _mix(p, dv_[j], visible) - pds.sum(-1).T[..., None] * out)
    dout = torch.stack(rows) if rows else out.new_zeros(0, *out.shape)
    return out.to(q.dtype).contiguous(), lse.T.contiguous(), dout.to(q.dtype).contiguous()


def ghost_dot(a: Tensor, g: Tensor, cu_seqlens: Tensor, v: Tensor) -> Tensor:
    """<V_k, G_i> for every direction k and example i.

    Shapes: a (N, I), g (N, O), cu_seqlens (B + 1), v (K, O, I) -> (K, B).
    Cost: 2 K N I O flops; a, g and v read once.
    """
    acc = _accumulate_dtype(a)
    a, g, v = a.to(acc), g.to(acc), v.to(acc)
    rows = torch.stack([((a @ v_k.T) * g).sum(-1) for v_k in v]) if v.shape[0] else a.new_zeros(0, a.shape[0])
    return _segment_sum(rows, cu_seqlens)


def ghost_dot_lowrank(a: Tensor, g: Tensor, cu_seqlens: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """<L_k R_k^T, G_i> = sum_{t in i} (L_k^T g_t) . (R_k^T a_t) for every direction k of rank R and example i.

    Shapes: a (N, I), g (N, O), cu_seqlens (B + 1), left (K, O, R), right (K, I, R) -> (K, B).
    Cost: 2 K N R (I + O) flops; a, g, left and right read once.
    """
    acc = _accumulate_dtype(a)
    rows = ((a.to(acc) @ right.to(acc)) * (g.to(acc) @ left.to(acc))).sum(-1)
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


def grad_project(a: Tensor, g: Tensor, cu_seqlens: Tensor, p_in: Tensor, p_out: Tensor) -> Tensor:
    """P_out^T G_i P_in = sum_{t in i} (P_out^T g_t) (P_in^T a_t)^T for every example i.

    Shapes: a (N, I), g (N, O), cu_seqlens (B + 1), p_in (I, P), p_out (O, Q) -> (B, Q, P).
    Cost: 2 N (I P + O Q + P Q) flops; a, g, p_in and p_out read once.
    """
    acc = _accumulate_dtype(a)
    x, y = a.to(acc) @ p_in.to(acc), g.to(acc) @ p_out.to(acc)
    # one projected output at a time, or every token's outer product would be in memory
    slices = [_segment_sum((x * y[:, q : q + 1]).T, cu_seqlens).T for q in range(y.shape[1])]
    return torch.stack(slices, 1) if slices else x.new_zeros(cu_seqlens.shape[0] - 1, 0, x.shape[1])


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


def glu_jvp(
    gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor | None = None, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """y = f(gate) * up and its tangent f'(gate) dgate up + f(gate) dup; f is SiLU, or GELU by tanh.

    With up and dgate exchanged for a gradient in y and up, and no dup, it is the gradients in up and gate.

    Shapes: all (N, I) -> (N, I), (N, I) in gate's dtype.
    Cost: six matrices of N I elements read or written once; five without dup.
    """
    acc = _accumulate_dtype(gate)
    x, u, dx = (tensor.to(acc) for tensor in (gate, up, dgate))
    if gelu:
        z = x.clamp(-64, 64)  # there the slope is 0 or 1 to every digit, and further out the cube overflows
        inner = 2 * math.sqrt(2 / math.pi) * z * (1 + 0.044715 * z * z)  # (1 + tanh(z)) / 2 is sigmoid(2 z)
        dinner = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)
    else:
        z, inner, dinner = x, x, torch.ones_like(x)
    there, back = torch.sigmoid(inner), torch.sigmoid(-inner)  # 1 - there would cancel
    value, slope = x * there, there * (1 + z * back * dinner)
    tangent = slope * dx * u
    if dup is not None:
        tangent = tangent + value * dup.to(acc)
    return (value * u).to(gate.dtype), tangent.to(gate.dtype)


def rms_norm_jvp(
    x: Tensor, dx: Tensor, scale: Tensor, dscale: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """y = n * scale with n = x / sqrt(mean(x^2) + eps), and its tangent (dx - n mean(n dx)) / rms * scale + n dscale.

    Shapes: x and dx (N, D), scale and dscale (D) in the accumulation dtype -> (N, D), (N, D) in x's dtype.
    Cost: four matrices of N D elements read or written once.
    """
    acc = _accumulate_dtype(x)
    wide, dwide = x.to(acc), dx.to(acc)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normal = wide * inverse
    tangent = (dwide * inverse - normal * (normal * dwide).mean(-1, keepdim=True) * inverse) * scale
    if dscale is not None:
        tangent = tangent + normal * dscale
    return (normal * scale).to(x.dtype), tangent.to(x.dtype)


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding x * cosine + rotate(x) * sine; rotate((a, b)) = (-b, a) for the halves of a head.

    Linear in x, so it is its own tangent.
    Shapes: x (N, H, E) with E even, cosine and sine (N, E) -> (N, H, E) in x's dtype.
    Cost: two tensors of N H E elements read or written once.
    """
    acc = _accumulate_dtype(x)
    low, high = x.to(acc).chunk(2, -1)
    rotated = torch.cat([-high, low], -1)
    return (x.to(acc) * cosine.to(acc)[:, None] + rotated * sine.to(acc)[:, None]).to(x.dtype).contiguous()


def _sketch(a: Tensor, g: Tensor, cu_seqlens: Tensor, dim: int, entry: Tensor, sign: Tensor) -> Tensor:
    ids = _segment_ids(cu_seqlens, a.shape[0])
    out = a.new_zeros(cu_seqlens.shape[0] - 1, dim)
    for example in range(out.shape[0]):
        own = (ids == example)[:, None]
        own_a, own_g = torch.where(own, a, 0.0), torch.where(own, g, 0.0)
        for start in range(0, g.shape[1], _SKETCHED_ROWS):
            rows = slice(start, start + _SKETCHED_ROWS)
            signed = sign[rows] * (own_g[:, rows].T @ own_a)
            out[example].index_add_(0, entry[rows].flatten(), signed.flatten())
    return out


def grad_sketch(a: Tensor, g: Tensor, cu_seqlens: Tensor, dim: int, seed: int) -> Tensor:
    """S vec(G_i) for every example i, S the sparse random map of :mod:`u2a_fast.sketch`, E <Sx, Sy> = <x, y>.

    Shapes: a (N, I), g (N, O), cu_seqlens (B + 1) -> (B, M) with M = dim.
    Cost: 2 N I O flops for the entries of all G_i, B I O additions; a and g read once.
    """
    acc = _accumulate_dtype(a)
    entry, sign = sketch_map(g.shape[1], a.shape[1], dim, seed, a.device)
    return _sketch(a.to(acc), g.to(acc), cu_seqlens, dim, entry, sign)
