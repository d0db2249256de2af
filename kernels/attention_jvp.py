"""Attention, its log-sum-exp and K directional derivatives of its output; a program per tangent, query block and head.

Computes: do = sum_m p_m (ds_m v_m + dv_m) - (sum_m p_m ds_m) o, ds_m = c' scale (dq . k_m + q . dk_m).
Shapes:   as ``attention``; dq (K, N, H, E), dk (K, N, G, E), dv (K, N, G, F) -> (N, H, F), (N, H), (K, N, H, F).
Cost:     6 (E + F) flops a visible pair, head and tangent: each tangent computes the probabilities again, which two
          accumulators in registers, not K + 1, pay for.
Numerics: as ``attention``; p ds is rounded to v's dtype (float16: TF32).
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
    online_softmax,
    rows_product,
    scores,
    store_rows,
    weighted_rows,
)
from ._launch import INTERPRETER, Config, inner_contiguous, launch
from .attention import attention

__all__ = ["CONFIGS", "attention_jvp", "attention_jvp_kernel"]


def _config(m: int, n: int, d: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d}, warps, stages)


CONFIGS: HeadConfigs = {
    ("sm_80", 2, 64): _config(64, 32, 64, 4, 2),
    ("sm_80", 2, 128): _config(64, 32, 64, 8, 2),
    ("sm_80", 2, 256): _config(64, 16, 128, 8, 2),
    ("sm_80", 4, 64): _config(32, 32, 16, 4, 2),
    ("sm_90", 2, 64): _config(64, 64, 64, 4, 3),
    ("sm_90", 2, 128): _config(128, 32, 128, 8, 3),
    ("sm_90", 2, 256): _config(32, 32, 256, 8, 2),
    ("sm_90", 4, 64): _config(32, 32, 16, 4, 2),
    ("sm_100", 2, 64): _config(128, 64, 64, 8, 3),
    ("sm_100", 2, 128): _config(128, 32, 128, 8, 3),
    ("sm_100", 2, 256): _config(32, 32, 256, 8, 2),
    ("sm_100", 4, 64): _config(32, 32, 16, 4, 2),
    ("gfx942", 2, 64): _config(64, 32, 64, 4, 2),
    ("gfx942", 2, 128): _config(64, 32, 128, 4, 2),
    ("gfx942", 2, 256): _config(64, 16, 64, 4, 2),
    ("gfx942", 4, 64): _config(32, 32, 16, 4, 2),
    **{(INTERPRETER, 2, width): _config(32, 64, width, 4, 1) for width in (64, 128, 256)},
    (INTERPRETER, 4, 64): _config(32, 64, 32, 4, 1),
}

# Without parents, window and softcap, which need registers. With heads of 128 on Hopper a few bytes spill, and it is
# 15 % faster than the largest tile of which nothing does (benchmarks/LOG.md).
PLAIN_CONFIGS: HeadConfigs = {**CONFIGS, ("sm_90", 2, 128): _config(128, 64, 128, 8, 2)}


@triton.jit
def attention_jvp_kernel(
    p_q, p_k, p_v, p_dq, p_dk, p_dv, p_cu_seqlens, p_parent, p_out, p_lse, p_dout,
    s_q, s_qh, s_k, s_kh, s_v, s_vh, s_dqk, s_dq, s_dqh, s_dkk, s_dk, s_dkh, s_dvk, s_dv, s_dvh, s_doutk,
    scale, softcap, window, B, H, PER_GROUP, E: tl.constexpr, F: tl.constexpr, PAD_E: tl.constexpr, PAD_F: tl.constexpr,
    CAPPED: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dout of one tangent, block of queries and head; the first tangent's programs also write out and lse."""
    head = (tl.program_id(0) % H).to(tl.int64)
    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)) // H
    segment, begin, end, start = find_block(i_m, p_cu_seqlens, B, BLOCK_M)
    if start >= end:
        return
    end = tl.minimum(end, start + BLOCK_M)
    group = head // PER_GROUP
    i_k = tl.program_id(1).to(tl.int64)
    p_q += head * s_qh
    p_k += group * s_kh
    p_v += group * s_vh
    p_dq += i_k * s_dqk + head * s_dqh
    p_dk += i_k * s_dkk + group * s_dkh
    p_dv += i_k * s_dvk + group * s_dvh
    b_q = load_rows(p_q, start, end, s_q, E, BLOCK_M, PAD_E)
    b_dq = load_rows(p_dq, start, end, s_dq, E, BLOCK_M, PAD_E)
    b_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_mean = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_out = tl.zeros([BLOCK_M, PAD_F], dtype=tl.float32)
    b_dout = tl.zeros([BLOCK_M, PAD_F], dtype=tl.float32)
    o_m, o_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tiles, plan = key_plan(segment, begin, start, end, p_cu_seqlens, p_parent, window, BLOCK_N)
    for i in tl.range(0, tiles, disable_licm=True):
        start_k, end_k, shift = key_tile(i, plan, end, p_parent is not None, BLOCK_N)
        b_k = load_rows(p_k, start_k, end_k, s_k, E, BLOCK_N, PAD_E)
        b_dk = load_rows(p_dk, start_k, end_k, s_dk, E, BLOCK_N, PAD_E)
        b_s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        b_ds = rows_product(b_s, b_dq, p_dq, start, end, s_dq, b_k, p_k, start_k, end_k, s_k, E, BLOCK_D)
        b_ds = rows_product(b_ds, b_q, p_q, start, end, s_q, b_dk, p_dk, start_k, end_k, s_dk, E, BLOCK_D)
        b_s = rows_product(b_s, b_q, p_q, start, end, s_q, b_k, p_k, start_k, end_k, s_k, E, BLOCK_D)
        b_c, b_slope = scores(b_s, scale, softcap, CAPPED)
        b_ds *= b_slope * scale
        b_c = hide(
            b_c, -float("inf"), start - shift, start_k, end_k, window, o_m[:, None], o_n[None, :], BLOCK_M, BLOCK_N
        )
        b_p, b_factor, b_max, b_sum = online_softmax(b_c, b_max, b_sum)
        b_ds *= b_p
        b_mean = b_mean * b_factor + tl.sum(b_ds, 1)
        b_v = load_rows(p_v, start_k, end_k, s_v, F, BLOCK_N, PAD_F)
        b_dv = load_rows(p_dv, start_k, end_k, s_dv, F, BLOCK_N, PAD_F)
        b_out = weighted_rows(b_out * b_factor[:, None], b_p, b_v, False)
        b_dout = weighted_rows(b_dout * b_factor[:, None], b_ds, b_v, WIDE)
        b_dout = weighted_rows(b_dout, b_p, b_dv, False)
    b_out = b_out / b_sum[:, None]
    b_dout = b_dout / b_sum[:, None] - (b_mean / b_sum)[:, None] * b_out
    store_rows(p_dout + i_k * s_doutk + head * F, start, end, H * F, b_dout, F)
    if i_k == 0:
        store_rows(p_out + head * F, start, end, H * F, b_out, F)
        o_row = (start + o_m).to(tl.int64) * H + head
        tl.store(p_lse + o_row, (b_max + tl.log2(b_sum)) / LOG2_E, mask=start + o_m < end)


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
    """Attention, its log-sum-exp and K directional derivatives; see ``reference.attention_jvp``."""
    if needs_reference(q, v):
        return reference.attention_jvp(q, k, v, dq, dk, dv, cu_seqlens, parent, scale, window, softcap)
    q, k, v, dq, dk, dv = (inner_contiguous(x) for x in (q, k, v, dq, dk, dv))
    (n, heads, _), f, tangents = q.shape, v.shape[2], dq.shape[0]
    dout = q.new_empty(tangents, n, heads, f)
    if tangents == 0:
        return *attention(q, k, v, cu_seqlens, parent, scale, window, softcap), dout
    out = q.new_empty(n, heads, f)
    lse = torch.empty(n, heads, dtype=torch.float32, device=q.device)
    if n and heads:
        plain = parent is None and not window and not softcap
        config = config_of_heads(PLAIN_CONFIGS if plain else CONFIGS, q, v)
        blocks = n // config.blocks["BLOCK_M"] + cu_seqlens.shape[0] - 1
        launch(
            attention_jvp_kernel, (blocks * heads, tangents), config,
            p_dq=dq, p_dk=dk, p_dv=dv, p_out=out, p_lse=lse, p_dout=dout, **head_strides(dq=dq, dk=dk, dv=dv),
            s_doutk=dout.stride(0), **arguments_of_heads(q, k, v, cu_seqlens, parent, scale, window, softcap),
        )  # fmt: skip
    return out, lse, dout
