"""Causal grouped-query attention within segments of packed tokens, one block of queries and one head a program.

Computes: o_n = sum_m p_nm v_m, p = softmax of c(scale q_n . k_m) over the keys m that n sees, and its log-sum-exp.
Shapes:   q (N, H, E), k (N, G, E), v (N, G, F), cu_seqlens (B + 1), parent (B) -> (N, H, F), (N, H).
Cost:     2 (E + F) flops a visible pair and head; key tiles that no query of the block sees are skipped.
Numerics: fp32 scores, online softmax in fixed order of the keys; probabilities are rounded to v's dtype.
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

__all__ = ["CONFIGS", "attention", "attention_kernel"]


def _config(m: int, n: int, d: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d}, warps, stages)


CONFIGS: HeadConfigs = {
    ("sm_80", 2, 64): _config(128, 64, 64, 8, 3),
    ("sm_80", 2, 128): _config(128, 32, 128, 8, 3),
    ("sm_80", 2, 256): _config(128, 32, 64, 8, 2),
    ("sm_80", 4, 64): _config(32, 32, 16, 4, 2),
    ("sm_90", 2, 64): _config(128, 64, 64, 4, 3),
    ("sm_90", 2, 128): _config(128, 128, 128, 8, 2),
    ("sm_90", 2, 256): _config(128, 64, 256, 8, 2),
    ("sm_90", 4, 64): _config(32, 32, 16, 4, 2),
    ("sm_100", 2, 64): _config(128, 64, 64, 8, 3),
    ("sm_100", 2, 128): _config(128, 64, 128, 8, 3),
    ("sm_100", 2, 256): _config(128, 32, 256, 8, 2),
    ("sm_100", 4, 64): _config(32, 32, 16, 4, 2),
    ("gfx942", 2, 64): _config(128, 64, 64, 4, 2),
    ("gfx942", 2, 128): _config(128, 32, 128, 4, 2),
    ("gfx942", 2, 256): _config(64, 32, 64, 4, 2),
    ("gfx942", 4, 64): _config(32, 32, 16, 4, 2),
    **{(INTERPRETER, 2, width): _config(32, 64, width, 4, 1) for width in (64, 128, 256)},
    (INTERPRETER, 4, 64): _config(32, 64, 32, 4, 1),
}


@triton.jit
def attention_kernel(
    p_q, p_k, p_v, p_cu_seqlens, p_parent, p_out, p_lse, s_q, s_qh, s_k, s_kh, s_v, s_vh, scale, softcap, window, B, H,
    PER_GROUP, E: tl.constexpr, F: tl.constexpr, PAD_E: tl.constexpr, PAD_F: tl.constexpr, CAPPED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out and lse of one block of queries and one head; the blocks that see most keys come first."""
    head = (tl.program_id(0) % H).to(tl.int64)
    i_m = (tl.num_programs(0) - 1 - tl.program_id(0)) // H
    segment, begin, end, start = find_block(i_m, p_cu_seqlens, B, BLOCK_M)
    if start >= end:
        return
    end = tl.minimum(end, start + BLOCK_M)
    p_q += head * s_qh
    p_k += head // PER_GROUP * s_kh
    p_v += head // PER_GROUP * s_vh
    b_q = load_rows(p_q, start, end, s_q, E, BLOCK_M, PAD_E)
    b_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_out = tl.zeros([BLOCK_M, PAD_F], dtype=tl.float32)
    o_q = tl.arange(0, BLOCK_M)[:, None]
    o_k = tl.arange(0, BLOCK_N)[None, :]
    tiles, plan = key_plan(segment, begin, start, end, p_cu_seqlens, p_parent, window, BLOCK_N)
    for i in tl.range(0, tiles, disable_licm=True):
        start_k, end_k, shift = key_tile(i, plan, end, p_parent is not None, BLOCK_N)
        b_k = load_rows(p_k, start_k, end_k, s_k, E, BLOCK_N, PAD_E)
        b_s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        b_s = rows_product(b_s, b_q, p_q, start, end, s_q, b_k, p_k, start_k, end_k, s_k, E, BLOCK_D)
        b_c, _ = scores(b_s, scale, softcap, CAPPED)
        b_c = hide(b_c, -float("inf"), start - shift, start_k, end_k, window, o_q, o_k, BLOCK_M, BLOCK_N)
        b_p, b_factor, b_max, b_sum = online_softmax(b_c, b_max, b_sum)
        b_v = load_rows(p_v, start_k, end_k, s_v, F, BLOCK_N, PAD_F)
        b_out = weighted_rows(b_out * b_factor[:, None], b_p, b_v, False)
    store_rows(p_out + head * F, start, end, H * F, b_out / b_sum[:, None], F)
    o_m = start + tl.arange(0, BLOCK_M)
    tl.store(p_lse + o_m.to(tl.int64) * H + head, (b_max + tl.log2(b_sum)) / LOG2_E, mask=o_m < end)


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
    """Attention and its log-sum-exp; see ``reference.attention``."""
    if needs_reference(q, v):
        return reference.attention(q, k, v, cu_seqlens, parent, scale, window, softcap)
    q, k, v = (inner_contiguous(x) for x in (q, k, v))
    n, heads, _ = q.shape
    out = q.new_empty(n, heads, v.shape[2])
    lse = torch.empty(n, heads, dtype=torch.float32, device=q.device)
    if n and heads:
        config = config_of_heads(CONFIGS, q, v)
        blocks = n // config.blocks["BLOCK_M"] + cu_seqlens.shape[0] - 1
        launch(
            attention_kernel, (blocks * heads,), config, p_out=out, p_lse=lse,
            **arguments_of_heads(q, k, v, cu_seqlens, parent, scale, window, softcap),
        )  # fmt: skip
    return out, lse
