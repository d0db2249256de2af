"""<L_k R_k^T, G_i> without directions or per-example gradients: two thin products whose epilogue is a row sum.

Computes: out[k, i] = sum over the tokens t of example i of (L_k^T g_t) . (R_k^T a_t).
Shapes:   a (N, I), g (N, O), cu_seqlens (B + 1), left (K, O, R), right (K, I, R) -> (K, B).
Cost:     2 K N R (I + O) flops; both products stay in registers, several directions of small rank in one tile, so that
          a and g are read once for all of them; a partial sum per row and rank tile passes through memory.
Numerics: fp32 accumulation, no atomics: one partial per row and rank tile, then a sum over each example in fixed order.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._launch import INTERPRETER, Config, Configs, aligned, device_family, launch, needs_reference
from ._tile import matmul_columns, segment_sum

__all__ = ["CONFIGS", "ghost_dot_lowrank", "ghost_dot_lowrank_kernel"]

COLUMNS = 64  # most columns of a tile


def _config(n: int, depth: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_N": n, "BLOCK_DEPTH": depth}, warps, stages)


CONFIGS: Configs = {
    ("sm_80", 2): _config(64, 64, 4, 4),
    ("sm_80", 4): _config(64, 16, 4, 3),
    ("sm_90", 2): _config(128, 64, 8, 4),
    ("sm_90", 4): _config(32, 16, 4, 3),
    ("sm_100", 2): _config(128, 64, 8, 4),
    ("sm_100", 4): _config(64, 16, 4, 3),
    ("gfx942", 2): _config(64, 64, 4, 2),
    ("gfx942", 4): _config(64, 32, 4, 2),
    (INTERPRETER, 2): _config(32, 64, 4, 1),
    (INTERPRETER, 4): _config(32, 64, 4, 1),
}


@triton.jit
def ghost_dot_lowrank_kernel(
    p_a, p_g, p_left, p_right, p_rows, s_a, s_g, s_left_k, s_left, s_right_k, s_right, N, OUT, IN, K, RANK,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """rows[k, r tile, n] = sum over the tile's r of (g L_k)[n, r] (a R_k)[n, r]; a program per n, k and r tile."""
    start_n = tl.program_id(0) * BLOCK_N
    start_k = tl.program_id(1) * BLOCK_K
    i_r = tl.program_id(2)
    o_k = tl.arange(0, BLOCK_K * BLOCK_R) // BLOCK_R
    o_r = tl.arange(0, BLOCK_K * BLOCK_R) % BLOCK_R
    m_c = (o_k < K - start_k) & (o_r < RANK - i_r * BLOCK_R)
    p_right += start_k.to(tl.int64) * s_right_k + i_r * BLOCK_R
    p_left += start_k.to(tl.int64) * s_left_k + i_r * BLOCK_R
    b_x = tl.zeros([BLOCK_N, BLOCK_K * BLOCK_R], dtype=tl.float32)
    b_x = matmul_columns(
        b_x, p_a, p_right, o_k * s_right_k + o_r, m_c, start_n, s_a, s_right, N, IN, BLOCK_N, BLOCK_DEPTH
    )
    b_y = tl.zeros([BLOCK_N, BLOCK_K * BLOCK_R], dtype=tl.float32)
    b_y = matmul_columns(
        b_y, p_g, p_left, o_k * s_left_k + o_r, m_c, start_n, s_g, s_left, N, OUT, BLOCK_N, BLOCK_DEPTH
    )
    b_rows = tl.sum(tl.reshape(b_x * b_y, [BLOCK_N, BLOCK_K, BLOCK_R]), 2)
    o_n = start_n + tl.arange(0, BLOCK_N)
    o_k = start_k + tl.arange(0, BLOCK_K)
    place = (o_k[None, :].to(tl.int64) * tl.num_programs(2) + i_r) * N + o_n[:, None]
    tl.store(p_rows + place, b_rows, mask=(o_n < N)[:, None] & (o_k < K)[None, :])


def ghost_dot_lowrank(a: Tensor, g: Tensor, cu_seqlens: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """<L_k R_k^T, G_i> for every direction k and example i; see ``reference.ghost_dot_lowrank``."""
    if needs_reference(a):
        return reference.ghost_dot_lowrank(a, g, cu_seqlens, left, right)
    (n, i), (k, o, r) = a.shape, left.shape
    a, g, left, right = aligned(a), aligned(g), aligned(left), aligned(right)
    config = CONFIGS[device_family(a.device), a.element_size()]
    block_r = max(16, min(COLUMNS, triton.next_power_of_2(r)))
    block_k = max(1, min(COLUMNS // block_r, triton.next_power_of_2(k)))
    tiles_r = triton.cdiv(r, block_r)
    rows = torch.empty(k, tiles_r, n, dtype=torch.float32, device=a.device)
    launch(
        ghost_dot_lowrank_kernel, (triton.cdiv(n, config.blocks["BLOCK_N"]), triton.cdiv(k, block_k), tiles_r), config,
        p_a=a, p_g=g, p_left=left, p_right=right, p_rows=rows, s_a=a.stride(0), s_g=g.stride(0),
        s_left_k=left.stride(0), s_left=left.stride(1), s_right_k=right.stride(0), s_right=right.stride(1),
        N=n, OUT=o, IN=i, K=k, RANK=r, BLOCK_K=block_k, BLOCK_R=block_r,
    )  # fmt: skip
    return segment_sum(rows, cu_seqlens)
