"""<V_k, G_i> without per-example gradients, by rows of a V_k^T or by tiles of G_i that stay in registers.

Computes: out[k, i] = sum over the tokens t of example i of g_t . (V_k a_t) = <V_k, sum_t g_t a_t^T>.
Shapes:   a (N, I), g (N, O), cu_seqlens (B + 1), v (K, O, I) -> (K, B).
Cost:     row form 2 K N I O flops on the matrix units; tile form 2 N I O there and 2 K B I O on the vector units, and
          v is read for every example. One form for the whole call, by the mean length, so that nothing is read back
          from the device.
Numerics: fp32 accumulation, no atomics: a partial per row and O tile (row form) or per tile and example (tile form),
          summed in fixed order.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ._launch import INTERPRETER, Config, Configs, aligned, device_family, launch, needs_reference, operand, programs
from ._tile import grouped_tile, load_tile, matmul_rows, operand_tile, segment_sum

__all__ = ["CONFIGS", "TILE_CONFIGS", "ghost_dot", "ghost_dot_kernel", "ghost_dot_tile_kernel"]

# Tokens of the row form that cost as much as contracting one example's G_i with one direction: an entry of v comes from
# the level-2 cache (2 bytes at 5.5 TB/s), where a token takes 2 flops at 900 Tflop/s. A model of Hopper, not measured.
DIRECTION_TOKENS = 160


def _config(n: int, o: int, i: int, warps: int, stages: int, hopper: bool = False) -> Config:
    return Config({"BLOCK_N": n, "BLOCK_O": o, "BLOCK_I": i, "GROUP": 8}, warps, stages, hopper, hopper)


CONFIGS: Configs = {
    ("sm_80", 2): _config(128, 128, 32, 8, 4),
    ("sm_80", 4): _config(64, 64, 16, 4, 3),
    ("sm_90", 2): _config(128, 256, 64, 8, 4, hopper=True),
    ("sm_90", 4): _config(64, 64, 16, 4, 3),
    ("sm_100", 2): _config(128, 128, 64, 8, 4),
    ("sm_100", 4): _config(64, 64, 16, 4, 3),
    ("gfx942", 2): _config(128, 128, 64, 8, 2),
    ("gfx942", 4): _config(64, 64, 32, 4, 2),
    (INTERPRETER, 2): _config(32, 32, 32, 4, 1, hopper=True),
    (INTERPRETER, 4): _config(32, 32, 32, 4, 1),
}


def _tile(o: int, i: int, t: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_O": o, "BLOCK_I": i, "BLOCK_T": t}, warps, stages)


TILE_CONFIGS: Configs = {
    ("sm_80", 2): _tile(128, 64, 32, 8, 3),
    ("sm_80", 4): _tile(64, 64, 16, 4, 3),
    ("sm_90", 2): _tile(128, 128, 64, 8, 3),
    ("sm_90", 4): _tile(64, 64, 16, 4, 3),
    ("sm_100", 2): _tile(128, 64, 64, 8, 3),
    ("sm_100", 4): _tile(64, 64, 16, 4, 3),
    ("gfx942", 2): _tile(128, 64, 32, 8, 2),
    ("gfx942", 4): _tile(64, 64, 16, 4, 2),
    (INTERPRETER, 2): _tile(32, 32, 16, 4, 1),
    (INTERPRETER, 4): _tile(32, 32, 16, 4, 1),
}


@triton.jit
def ghost_dot_kernel(
    p_a, p_g, p_v, p_rows, s_a, s_g, s_v, N, OUT, IN,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """rows[o tile, n] = sum over the tile's o of g[n, o] (a V^T)[n, o]; programs take the tiles in turn."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_o = tl.cdiv(OUT, BLOCK_O)
    for i_tile in range(tl.program_id(0), tiles_n * tiles_o, tl.num_programs(0)):
        i_n, i_o = grouped_tile(i_tile, tiles_n, tiles_o, GROUP)
        start_n = i_n * BLOCK_N
        start_o = i_o * BLOCK_O
        b_u = tl.zeros([BLOCK_N, BLOCK_O], dtype=tl.float32)
        b_u = matmul_rows(b_u, p_a, p_v, start_n, start_o, s_a, s_v, N, OUT, IN, BLOCK_N, BLOCK_O, BLOCK_I)
        b_g = operand_tile(p_g, start_n, start_o, s_g, N, OUT, BLOCK_N, BLOCK_O).to(tl.float32)
        o_n = start_n + tl.arange(0, BLOCK_N)
        tl.store(p_rows + i_o.to(tl.int64) * N + o_n, tl.sum(b_u * b_g, 1), mask=o_n < N)


@triton.jit
def ghost_dot_tile_kernel(
    p_a, p_g, p_v, p_cu_seqlens, p_parts, s_a, s_g, s_vk, s_vo, OUT, IN, K, B, TILES,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """parts[k, tile, i] = <V_k, G_i> over one O x I tile; a program per (i, tile), so that examples share v's tile."""
    # One axis: the others hold 65,535 programs, fewer than a wide head has tiles.
    i_b = tl.program_id(0) % B
    i_tile = tl.program_id(0) // B
    tiles_i = tl.cdiv(IN, BLOCK_I)
    start_o = (i_tile // tiles_i) * BLOCK_O
    start_i = (i_tile % tiles_i) * BLOCK_I
    begin = tl.load(p_cu_seqlens + i_b)
    end = tl.load(p_cu_seqlens + i_b + 1)
    p_g += begin.to(tl.int64) * s_g + start_o
    p_a += begin.to(tl.int64) * s_a + start_i
    p_v += start_o.to(tl.int64) * s_vo + start_i
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
    m_tile = m_o[:, None] & m_i[None, :]
    # Outside of the tile's own entries zeros may have met an infinity.
    b_tile = tl.where(m_tile, b_tile, 0.0)
    p_parts += i_tile.to(tl.int64) * B + i_b
    for _ in range(K):
        b_v = tl.load(p_v + (o_o[:, None] * s_vo + o_i[None, :]), mask=m_tile, other=0.0).to(tl.float32)
        tl.store(p_parts, tl.sum(b_tile * b_v))
        p_v += tl.cast(s_vk, tl.int64)
        p_parts += tl.cast(TILES, tl.int64) * B


def _by_rows(a: Tensor, g: Tensor, cu_seqlens: Tensor, v: Tensor) -> Tensor:
    (n, i), (k, o) = a.shape, v.shape[:2]
    config = CONFIGS[device_family(a.device), a.element_size()]
    tiles_o = triton.cdiv(o, config.blocks["BLOCK_O"])
    rows = torch.empty(k, tiles_o, n, dtype=torch.float32, device=a.device)
    tiles = programs(config, a.device, triton.cdiv(n, config.blocks["BLOCK_N"]) * tiles_o)
    p_a, p_g = operand(a, config, "BLOCK_N", "BLOCK_I"), operand(g, config, "BLOCK_N", "BLOCK_O")
    for v_k, rows_k in zip(v, rows, strict=True):
        launch(
            ghost_dot_kernel, (tiles,), config,
            p_a=p_a, p_g=p_g, p_v=operand(v_k, config, "BLOCK_O", "BLOCK_I"), p_rows=rows_k,
            s_a=a.stride(0), s_g=g.stride(0), s_v=v_k.stride(0), N=n, OUT=o, IN=i,
        )  # fmt: skip
    return segment_sum(rows, cu_seqlens)


def _by_tiles(a: Tensor, g: Tensor, cu_seqlens: Tensor, v: Tensor) -> Tensor:
    i, (k, o), b = a.shape[1], v.shape[:2], cu_seqlens.shape[0] - 1
    config = TILE_CONFIGS[device_family(a.device), a.element_size()]
    tiles = triton.cdiv(o, config.blocks["BLOCK_O"]) * triton.cdiv(i, config.blocks["BLOCK_I"])
    parts = torch.empty(k, tiles, b, dtype=torch.float32, device=a.device)
    launch(
        ghost_dot_tile_kernel, (b * tiles,), config,
        p_a=a, p_g=g, p_v=v, p_cu_seqlens=cu_seqlens.contiguous(), p_parts=parts, s_a=a.stride(0), s_g=g.stride(0),
        s_vk=v.stride(0), s_vo=v.stride(1), OUT=o, IN=i, K=k, B=b, TILES=tiles,
    )  # fmt: skip
    return parts.sum(1)


def ghost_dot(a: Tensor, g: Tensor, cu_seqlens: Tensor, v: Tensor) -> Tensor:
    """<V_k, G_i> for every direction k and example i; see ``reference.ghost_dot``."""
    if needs_reference(a):
        return reference.ghost_dot(a, g, cu_seqlens, v)
    a, g, v = aligned(a), aligned(g), aligned(v)
    n, k, b = a.shape[0], v.shape[0], cu_seqlens.shape[0] - 1
    # Row form: K T tokens of a matrix product an example, at the mean length T = N / B; tile form: T, and K epilogues.
    if (k - 1) * n <= k * b * DIRECTION_TOKENS:
        return _by_rows(a, g, cu_seqlens, v)
    return _by_tiles(a, g, cu_seqlens, v)
