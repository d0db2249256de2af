"""||G_i||^2 without per-example gradients, by token Grams or by tiles of G_i that stay in registers.

Computes: out[i] = sum over pairs of tokens t, s of example i of (a_t . a_s)(g_t . g_s) = ||sum_t g_t a_t^T||^2.
Shapes:   a (N, I), g (N, O), cu_seqlens (B + 1) -> (B).
Cost:     Gram form sum_i T_i^2 (I + O) flops (each pair of tokens once), tile form 2 N I O; one form for the whole
          call, by the mean length, so that nothing is read back from the device.
Numerics: fp32 accumulation, no atomics; partials per row (Gram) or per tile (tile form) summed in fixed order.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._launch import INTERPRETER, Config, Configs, aligned, device_family, launch, needs_reference
from ._tile import load_tile, matmul_rows, segment_sum

__all__ = ["GRAM_CONFIGS", "TILE_CONFIGS", "ghost_norm", "gram_kernel", "tile_kernel"]


def _gram(n: int, s: int, depth: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_N": n, "BLOCK_S": s, "BLOCK_DEPTH": depth}, warps, stages)


def _tile(o: int, i: int, t: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_O": o, "BLOCK_I": i, "BLOCK_T": t}, warps, stages)


GRAM_CONFIGS: Configs = {
    ("sm_80", 2): _gram(64, 64, 64, 4, 3),
    ("sm_80", 4): _gram(32, 32, 32, 4, 3),
    ("sm_90", 2): _gram(128, 64, 64, 8, 4),
    ("sm_90", 4): _gram(32, 32, 32, 4, 3),
    ("sm_100", 2): _gram(128, 64, 64, 8, 4),
    ("sm_100", 4): _gram(32, 32, 32, 4, 3),
    ("gfx942", 2): _gram(64, 64, 64, 4, 2),
    ("gfx942", 4): _gram(32, 32, 32, 4, 2),
    (INTERPRETER, 2): _gram(16, 16, 32, 4, 1),
    (INTERPRETER, 4): _gram(16, 16, 32, 4, 1),
}

TILE_CONFIGS: Configs = {
    ("sm_80", 2): _tile(128, 128, 32, 8, 3),
    ("sm_80", 4): _tile(64, 64, 16, 4, 3),
    ("sm_90", 2): _tile(128, 256, 64, 8, 3),
    ("sm_90", 4): _tile(64, 64, 16, 4, 3),
    ("sm_100", 2): _tile(128, 256, 64, 8, 3),
    ("sm_100", 4): _tile(64, 64, 16, 4, 3),
    ("gfx942", 2): _tile(128, 128, 32, 8, 2),
    ("gfx942", 4): _tile(64, 64, 16, 4, 2),
    (INTERPRETER, 2): _tile(32, 32, 16, 4, 1),
    (INTERPRETER, 4): _tile(32, 32, 16, 4, 1),
}


@triton.jit
def gram_kernel(
    p_a, p_g, p_first, p_rows, s_a, s_g, N, OUT, IN,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """rows[n] = sum over the tokens s <= n of n's example of (a_n . a_s)(g_n . g_s), pairs s < n counted twice."""
    start_n = tl.program_id(0) * BLOCK_N
    o_n = start_n + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_first = tl.load(p_first + o_n, mask=m_n, other=0)
    b_rows = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start_s in range(tl.load(p_first + start_n), tl.minimum(start_n + BLOCK_N, N), BLOCK_S):
        o_s = start_s + tl.arange(0, BLOCK_S)
        b_aa = tl.zeros([BLOCK_N, BLOCK_S], dtype=tl.float32)
        b_aa = matmul_rows(b_aa, p_a, p_a, start_n, start_s, s_a, s_a, N, N, IN, BLOCK_N, BLOCK_S, BLOCK_DEPTH)
        b_gg = tl.zeros([BLOCK_N, BLOCK_S], dtype=tl.float32)
        b_gg = matmul_rows(b_gg, p_g, p_g, start_n, start_s, s_g, s_g, N, N, OUT, BLOCK_N, BLOCK_S, BLOCK_DEPTH)
        own = (o_s[None, :] >= b_first[:, None]) & (o_s[None, :] <= o_n[:, None])
        times = tl.where(o_s[None, :] < o_n[:, None], 2.0, 1.0)
        b_rows += tl.sum(tl.where(own, times * b_aa * b_gg, 0.0), 1)
    tl.store(p_rows + o_n, b_rows, mask=m_n)


@triton.jit
def tile_kernel(
    p_a, p_g, p_cu_seqlens, p_parts, s_a, s_g, OUT, IN, B,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """parts[tile, i] = squared norm of one O x I tile of G_i; a program per (tile, i), an example's tiles in a row."""
    tiles_i = tl.cdiv(IN, BLOCK_I)
    tiles = tl.cdiv(OUT, BLOCK_O) * tiles_i
    i_b = tl.program_id(0) // tiles
    i_tile = tl.program_id(0) % tiles
    start_o = (i_tile // tiles_i) * BLOCK_O
    start_i = (i_tile % tiles_i) * BLOCK_I
    begin = tl.load(p_cu_seqlens + i_b)
    end = tl.load(p_cu_seqlens + i_b + 1)
    p_g += begin.to(tl.int64) * s_g + start_o
    p_a += begin.to(tl.int64) * s_a + start_i
    o_o = tl.arange(0, BLOCK_O)
    o_i = tl.arange(0, BLOCK_I)
    o_t = tl.arange(0, BLOCK_T)
    m_o = o_o < OUT - start_o
    m_i = o_i < IN - start_i
    b_tile = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    for start in range(begin, end, BLOCK_T):
        m_t = o_t < end - start
        b_g = load_tile(p_g + (o_t[None, :] * s_g + o_o[:, None]), m_o[:, None] & m_t[None, :])
        b_a = load_tile(p_a + (o_t[:, None] * s_a + o_i[None, :]), m_t[:, None] & m_i[None, :])
        b_tile = tl.dot(b_g, b_a, b_tile, input_precision="ieee")
        p_g += BLOCK_T * tl.cast(s_g, tl.int64)
        p_a += BLOCK_T * tl.cast(s_a, tl.int64)
    tl.store(p_parts + i_tile.to(tl.int64) * B + i_b, tl.sum(b_tile * b_tile))


def _norm_by_gram(a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    (n, i), o = a.shape, g.shape[1]
    config = GRAM_CONFIGS[device_family(a.device), a.element_size()]
    tokens = torch.arange(n, device=a.device, dtype=cu_seqlens.dtype)
    first = cu_seqlens[torch.bucketize(tokens, cu_seqlens[1:], right=True)]
    rows = torch.empty(1, 1, n, dtype=torch.float32, device=a.device)
    launch(
        gram_kernel, (triton.cdiv(n, config.blocks["BLOCK_N"]),), config,
        p_a=a, p_g=g, p_first=first, p_rows=rows, s_a=a.stride(0), s_g=g.stride(0), N=n, OUT=o, IN=i,
    )  # fmt: skip
    return segment_sum(rows, cu_seqlens)[0]


def _norm_by_tile(a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    i, o, b = a.shape[1], g.shape[1], cu_seqlens.shape[0] - 1
    config = TILE_CONFIGS[device_family(a.device), a.element_size()]
    tiles = triton.cdiv(o, config.blocks["BLOCK_O"]) * triton.cdiv(i, config.blocks["BLOCK_I"])
    parts = torch.empty(tiles, b, dtype=torch.float32, device=a.device)
    launch(
        tile_kernel, (tiles * b,), config,
        p_a=a, p_g=g, p_cu_seqlens=cu_seqlens.contiguous(), p_parts=parts, s_a=a.stride(0), s_g=g.stride(0),
        OUT=o, IN=i, B=b,
    )  # fmt: skip
    return parts.sum(0)


def ghost_norm(a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    """||G_i||^2 for every example i; see ``reference.ghost_norm``."""
    if needs_reference(a):
        return reference.ghost_norm(a, g, cu_seqlens)
    a, g = aligned(a), aligned(g)
    (n, i), o, b = a.shape, g.shape[1], cu_seqlens.shape[0] - 1
    # Gram form: T^2 (IN + OUT) flops at the mean length T = N / B; tile form: 2 T IN OUT.
    if n * (i + o) <= 2 * b * i * o:
        return _norm_by_gram(a, g, cu_seqlens)
    return _norm_by_tile(a, g, cu_seqlens)
