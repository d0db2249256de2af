"""<V_k, G_i> without per-example gradients: a matrix product whose epilogue is a row sum.

Computes: out[k, i] = sum over the tokens t of example i of g_t . (V_k a_t).
Shapes:   a (N, I), g (N, O), cu_seqlens (B + 1), v (K, O, I) -> (K, B).
Cost:     2 K N I O flops; u = a V_k^T stays in registers; a partial sum per row and O tile passes through memory.
Numerics: fp32 accumulation, no atomics: one partial per row and O tile, then a sum over each example in fixed order.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._launch import INTERPRETER, Config, Configs, aligned, device_family, launch, needs_reference
from ._tile import grouped_tile, matmul_rows, segment_sum

__all__ = ["CONFIGS", "ghost_dot", "ghost_dot_kernel"]


def _config(n: int, o: int, i: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_N": n, "BLOCK_O": o, "BLOCK_I": i, "GROUP": 8}, warps, stages)


CONFIGS: Configs = {
    ("sm_80", 2): _config(128, 128, 32, 8, 4),
    ("sm_80", 4): _config(64, 64, 16, 4, 3),
    ("sm_90", 2): _config(128, 128, 64, 8, 4),
    ("sm_90", 4): _config(64, 64, 16, 4, 3),
    ("sm_100", 2): _config(128, 128, 64, 8, 4),
    ("sm_100", 4): _config(64, 64, 16, 4, 3),
    ("gfx942", 2): _config(128, 128, 64, 8, 2),
    ("gfx942", 4): _config(64, 64, 32, 4, 2),
    (INTERPRETER, 2): _config(32, 32, 32, 4, 1),
    (INTERPRETER, 4): _config(32, 32, 32, 4, 1),
}


@triton.jit
def ghost_dot_kernel(
    p_a, p_g, p_v, p_rows, s_a, s_g, s_vk, s_vo, N, OUT, IN,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """rows[k, o tile, n] = sum over the tile's o of g[n, o] (a V_k^T)[n, o]; a program per (n tile, o tile) and k."""
    tiles_o = tl.cdiv(OUT, BLOCK_O)
    i_n, i_o = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_N), tiles_o, GROUP)
    i_k = tl.program_id(1).to(tl.int64)
    start_n = i_n * BLOCK_N
    start_o = i_o * BLOCK_O
    p_v += i_k * s_vk
    b_u = tl.zeros([BLOCK_N, BLOCK_O], dtype=tl.float32)
    b_u = matmul_rows(b_u, p_a, p_v, start_n, start_o, s_a, s_vo, N, OUT, IN, BLOCK_N, BLOCK_O, BLOCK_I)
    o_n = tl.arange(0, BLOCK_N)
    o_o = tl.arange(0, BLOCK_O)
    m_n = o_n < N - start_n
    m_tile = m_n[:, None] & (o_o < OUT - start_o)[None, :]
    p_g += start_n.to(tl.int64) * s_g + start_o
    b_g = tl.load(p_g + (o_n[:, None] * s_g + o_o[None, :]), mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_rows + (i_k * tiles_o + i_o) * N + start_n + o_n, tl.sum(b_u * b_g, 1), mask=m_n)


def ghost_dot(a: Tensor, g: Tensor, cu_seqlens: Tensor, v: Tensor) -> Tensor:
    """<V_k, G_i> for every direction k and example i; see ``reference.ghost_dot``."""
    if needs_reference(a):
        return reference.ghost_dot(a, g, cu_seqlens, v)
    a, g, v = aligned(a), aligned(g), aligned(v)
    (n, i), (k, o) = a.shape, v.shape[:2]
    config = CONFIGS[device_family(a.device), a.element_size()]
    tiles_o = triton.cdiv(o, config.blocks["BLOCK_O"])
    rows = torch.empty(k, tiles_o, n, dtype=torch.float32, device=a.device)
    launch(
        ghost_dot_kernel, (triton.cdiv(n, config.blocks["BLOCK_N"]) * tiles_o, k), config,
        p_a=a, p_g=g, p_v=v, p_rows=rows, s_a=a.stride(0), s_g=g.stride(0), s_vk=v.stride(0), s_vo=v.stride(1),
        N=n, OUT=o, IN=i,
    )  # fmt: skip
    return segment_sum(rows, cu_seqlens)
