"""Gradients of attention in q, k and v: one kernel over blocks of queries, one over blocks of keys.

Computes: p recomputed from lse, ds = p (grad v^T - grad . out) c'; dq = scale ds k, dk = scale ds^T q, dv = p^T grad.
Shapes:   grad and out (N, H, F), lse (N, H), q, k, v -> shapes of q, k, v.
Cost:     2 (3 E + 2 F) flops a visible pair and head, and 2 (E + F) more because both kernels compute p and grad v^T.
Numerics: fp32 scores and accumulation; p and ds are rounded to the inputs' dtype (float16: TF32). A key's gradient is
          summed by one program over the query heads of its group, its own segment's queries and then, in order, those
          of the segments that continue it: no atomics.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._attention import (
    LOG2_E,
    HeadConfigs,
    arguments_of_heads,
    config_of_heads,
    find_block,
    head_strides,
    hide,
    key_plan,
    key_tile,
    load_rows,
    needs_reference,
    rows_product,
    scores,
    store_rows,
    weighted_rows,
)
from ._launch import INTERPRETER, Config, inner_contiguous, launch

__all__ = ["KEY_CONFIGS", "QUERY_CONFIGS", "attention_backward", "keys_kernel", "queries_kernel"]


def _config(m: int, n: int, d: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d}, warps, stages)


QUERY_CONFIGS: HeadConfigs = {
    ("sm_80", 2, 64): _config(64, 32, 64, 4, 2),
    ("sm_80", 2, 128): _config(64, 32, 64, 8, 2),
    ("sm_80", 2, 256): _config(64, 16, 64, 8, 2),
    ("sm_80", 4, 64): _config(32, 32, 16, 4, 2),
    ("sm_90", 2, 64): _config(128, 64, 64, 8, 3),
    ("sm_90", 2, 128): _config(128, 64, 128, 8, 2),
    ("sm_90", 2, 256): _config(64, 32, 256, 8, 2),
    ("sm_90", 4, 64): _config(32, 32, 16, 8, 2),
    ("sm_100", 2, 64): _config(128, 64, 64, 8, 3),
    ("sm_100", 2, 128): _config(128, 64, 128, 8, 2),
    ("sm_100", 2, 256): _config(64, 32, 256, 8, 2),
    ("sm_100", 4, 64): _config(32, 32, 16, 8, 2),
    ("gfx942", 2, 64): _config(64, 32, 64, 4, 2),
    ("gfx942", 2, 128): _config(64, 32, 128, 4, 2),
    ("gfx942", 2, 256): _config(64, 16, 64, 4, 2),
    ("gfx942", 4, 64): _config(32, 32, 16, 4, 2),
    **{(INTERPRETER, 2, width): _config(32, 64, width, 4, 1) for width in (64, 128, 256)},
    (INTERPRETER, 4, 64): _config(32, 64, 32, 4, 1),
}

KEY_CONFIGS: HeadConfigs = {
    ("sm_80", 2, 64): _config(32, 64, 64, 4, 2),
    ("sm_80", 2, 128): _config(32, 64, 64, 8, 2),
    ("sm_80", 2, 256): _config(16, 32, 256, 8, 1),
    ("sm_80", 4, 64): _config(32, 32, 16, 4, 2),
    ("sm_90", 2, 64): _config(64, 128, 64, 8, 3),
    ("sm_90", 2, 128): _config(32, 128, 128, 8, 2),
    ("sm_90", 2, 256): _config(32, 32, 256, 8, 2),
    ("sm_90", 4, 64): _config(32, 32, 16, 8, 2),
    ("sm_100", 2, 64): _config(32, 128, 64, 8, 3),
    ("sm_100", 2, 128): _config(32, 32, 128, 8, 2),
    ("sm_100", 2, 256): _config(32, 32, 256, 8, 2),
    ("sm_100", 4, 64): _config(32, 32, 16, 8, 2),
    ("gfx942", 2, 64): _config(32, 64, 64, 4, 2),
    ("gfx942", 2, 128): _config(32, 64, 128, 4, 2),
    ("gfx942", 2, 256): _config(16, 64, 64, 4, 2),
    ("gfx942", 4, 64): _config(32, 32, 16, 4, 2),
    **{(INTERPRETER, 2, width): _config(64, 32, width, 4, 1) for width in (64, 128, 256)},
    (INTERPRETER, 4, 64): _config(64, 32, 32, 4, 1),
}


@triton.jit
def queries_kernel(
    p_grad, p_q, p_k, p_v, p_out, p_lse, p_cu_seqlens, p_parent, p_dq, p_delta,
    s_grad, s_gradh, s_q, s_qh, s_k, s_kh, s_v, s_vh, s_out, s_outh, scale, softcap, window, B, H, PER_GROUP,
    E: tl.constexpr, F: tl.constexpr, PAD_E: tl.constexpr, PAD_F: tl.constexpr, CAPPED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq and delta = grad . out of one block of queries and one head; the blocks that see most keys come first."""
    head = (tl.program_id(0) % H).to(tl.int64)
    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)) // H
    segment, begin, end, start = find_block(i_m, p_cu_seqlens, B, BLOCK_M)
    if start >= end:
        return
    end = tl.minimum(end, start + BLOCK_M)
    p_q += head * s_qh
    p_grad += head * s_gradh
    p_out += head * s_outh
    p_k += head // PER_GROUP * s_kh
    p_v += head // PER_GROUP * s_vh
    o_m = tl.arange(0, BLOCK_M)
    o_row = (start + o_m).to(tl.int64) * H + head
    m_row = start + o_m < end
    b_q = load_rows(p_q, start, end, s_q, E, BLOCK_M, PAD_E)
    b_grad = load_rows(p_grad, start, end, s_grad, F, BLOCK_M, PAD_F)
    b_out = load_rows(p_out, start, end, s_out, F, BLOCK_M, PAD_F)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(p_delta + o_row, b_delta, mask=m_row)
    b_lse = tl.load(p_lse + o_row, mask=m_row, other=0.0) * LOG2_E
    b_dq = tl.zeros([BLOCK_M, PAD_E], dtype=tl.float32)
    o_k = tl.arange(0, BLOCK_N)[None, :]
    tiles, plan = key_plan(segment, begin, start, end, p_cu_seqlens, p_parent, window, BLOCK_N)
    for i in tl.range(0, tiles, disable_licm=True):
        start_k, end_k, shift = key_tile(i, plan, end, p_parent is not None, BLOCK_N)
        b_k = load_rows(p_k, start_k, end_k, s_k, E, BLOCK_N, PAD_E)
        b_v = load_rows(p_v, start_k, end_k, s_v, F, BLOCK_N, PAD_F)
        b_zero = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        b_s = rows_product(b_zero, b_q, p_q, start, end, s_q, b_k, p_k, start_k, end_k, s_k, E, BLOCK_D)
        b_dp = rows_product(b_zero, b_grad, p_grad, start, end, s_grad, b_v, p_v, start_k, end_k, s_v, F, BLOCK_D)
        b_c, b_slope = scores(b_s, scale, softcap, CAPPED)
        b_ds = (b_dp - b_delta[:, None]) * b_slope
        b_p = tl.exp2(b_c - b_lse[:, None])
        b_p = hide(b_p, 0.0, start - shift, start_k, end_k, window, o_m[:, None], o_k, BLOCK_M, BLOCK_N)
        b_ds *= b_p
        b_dq = weighted_rows(b_dq, b_ds, b_k, WIDE)
    store_rows(p_dq + head * E, start, end, H * E, b_dq * scale, E)


@triton.jit
def _last_heir(segment, p_cu_seqlens, p_parent, B):
    """The end of the segments that continue ``segment``, as a segment number."""
    stop = segment + 1
    if p_parent is not None:
        while tl.load(p_parent + stop, mask=stop < B, other=-1) == segment:
            stop += 1
    return stop


@triton.jit
def keys_kernel(
    p_grad, p_q, p_k, p_v, p_lse, p_delta, p_cu_seqlens, p_parent, p_dk, p_dv,
    s_grad, s_gradh, s_q, s_qh, s_k, s_kh, s_v, s_vh, scale, softcap, window, B, H, PER_GROUP,
    E: tl.constexpr, F: tl.constexpr, PAD_E: tl.constexpr, PAD_F: tl.constexpr, CAPPED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys and one key head. Tiles are transposed: (keys, queries)."""
    groups = H // PER_GROUP
    i_g = tl.program_id(0) % groups
    segment, _, end, start_k = find_block(tl.program_id(0) // groups, p_cu_seqlens, B, BLOCK_N)
    if start_k >= end:
        return
    end_k = tl.minimum(end, start_k + BLOCK_N)
    group = i_g.to(tl.int64)
    p_k += group * s_kh
    p_v += group * s_vh
    b_k = load_rows(p_k, start_k, end_k, s_k, E, BLOCK_N, PAD_E)
    b_v = load_rows(p_v, start_k, end_k, s_v, F, BLOCK_N, PAD_F)
    b_dk = tl.zeros([BLOCK_N, PAD_E], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, PAD_F], dtype=tl.float32)
    o_k = tl.arange(0, BLOCK_N)[:, None]
    o_m = tl.arange(0, BLOCK_M)
    for heir in range(segment, _last_heir(segment, p_cu_seqlens, p_parent, B)):
        begin_q = tl.load(p_cu_seqlens + heir)
        # Rows between a segment and the one that continues it count for nothing.
        shift = tl.where(heir == segment, 0, begin_q - end)
        low = tl.maximum(begin_q, start_k + shift)
        high = tl.load(p_cu_seqlens + heir + 1)
        if window is not None:
            high = tl.minimum(high, end_k - 1 + shift + window)
        for i_h in range(i_g * PER_GROUP, (i_g + 1) * PER_GROUP):
            head = tl.cast(i_h, tl.int64)
            p_q_h = p_q + head * s_qh
            p_grad_h = p_grad + head * s_gradh
            for start in tl.range(low, high, BLOCK_M, disable_licm=True):
                b_q = load_rows(p_q_h, start, high, s_q, E, BLOCK_M, PAD_E)
                b_grad = load_rows(p_grad_h, start, high, s_grad, F, BLOCK_M, PAD_F)
                o_row = (start + o_m).to(tl.int64) * H + head
                b_lse = tl.load(p_lse + o_row, mask=start + o_m < high, other=0.0) * LOG2_E
                b_delta = tl.load(p_delta + o_row, mask=start + o_m < high, other=0.0)
                b_zero = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
                b_s = rows_product(b_zero, b_k, p_k, start_k, end_k, s_k, b_q, p_q_h, start, high, s_q, E, BLOCK_D)
                b_dp = rows_product(
                    b_zero, b_v, p_v, start_k, end_k, s_v, b_grad, p_grad_h, start, high, s_grad, F, BLOCK_D
                )
                b_c, b_slope = scores(b_s, scale, softcap, CAPPED)
                b_ds = (b_dp - b_delta[None, :]) * b_slope
                b_p = tl.exp2(b_c - b_lse[None, :])
                b_p = hide(
                    b_p, 0.0, start - shift, start_k, start_k + BLOCK_N, window, o_m[None, :], o_k, BLOCK_M, BLOCK_N
                )
                b_dv = weighted_rows(b_dv, b_p, b_grad, WIDE)
                b_ds *= b_p
                b_dk = weighted_rows(b_dk, b_ds, b_q, WIDE)
    store_rows(p_dk + group * E, start_k, end_k, groups * E, b_dk * scale, E)
    store_rows(p_dv + group * F, start_k, end_k, groups * F, b_dv, F)


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
    """Gradients in q, k and v; see ``reference.attention_backward``."""
    if needs_reference(q, v):
        return reference.attention_backward(grad, q, k, v, out, lse, cu_seqlens, parent, scale, window, softcap)
    grad, q, k, v, out = (inner_contiguous(x) for x in (grad, q, k, v, out))
    lse = lse.contiguous()
    (n, heads, _), groups, segments = q.shape, k.shape[1], cu_seqlens.shape[0] - 1
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if n == 0 or heads == 0:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    shared = arguments_of_heads(q, k, v, cu_seqlens, parent, scale, window, softcap)
    shared |= {"p_grad": grad, "p_lse": lse, "p_delta": delta, **head_strides(grad=grad)}
    config = config_of_heads(QUERY_CONFIGS, q, v)
    blocks = n // config.blocks["BLOCK_M"] + segments
    launch(queries_kernel, (blocks * heads,), config, p_dq=dq, p_out=out, **head_strides(out=out), **shared)
    config = config_of_heads(KEY_CONFIGS, q, v)
    blocks = n // config.blocks["BLOCK_N"] + segments
    launch(keys_kernel, (blocks * groups,), config, p_dk=dk, p_dv=dv, **shared)
    return dq, dk, dv
