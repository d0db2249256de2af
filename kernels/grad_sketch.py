"""Sketches of per-example gradients: tiles of G_i in registers, signed, shifted and added to a sketch in registers.

Computes: out[i, (place(o, c) + shift(block)) mod dim] += +-G_i[o, c], the map of ``u2a_fast/sketch.py``.
Shapes:   a (N, I), g (N, O), cu_seqlens (B + 1) -> (B, dim).
Cost:     2 N I O flops and B I O additions; a partial sketch per row of tiles passes through memory, at most WORKSPACE
          bytes at once.
Numerics: fp32 accumulation, no atomics: a tile's blocks are shifted by a gather and summed, a program adds its tiles in
          order, and the partial sketches of an example are summed in fixed order.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..sketch import sketch_block
from ._launch import INTERPRETER, Config, Configs, aligned, device_family, launch, needs_reference
from ._tile import load_tile

__all__ = ["CONFIGS", "WORKSPACE", "grad_sketch", "grad_sketch_kernel"]

WORKSPACE = 1 << 28  # bytes of partial sketches


def _config(i: int, t: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_I": i, "BLOCK_T": t}, warps, stages)


# Tiles are 128 rows high and at least 64 columns wide, so that they hold whole blocks of every sketch.
BLOCK_O = 128

CONFIGS: Configs = {
    ("sm_80", 2): _config(64, 32, 8, 3),
    ("sm_80", 4): _config(64, 16, 8, 3),
    ("sm_90", 2): _config(64, 64, 8, 3),
    ("sm_90", 4): _config(64, 32, 16, 3),
    ("sm_100", 2): _config(64, 64, 8, 3),
    ("sm_100", 4): _config(64, 32, 8, 3),
    ("gfx942", 2): _config(64, 32, 8, 2),
    ("gfx942", 4): _config(64, 16, 8, 2),
    (INTERPRETER, 2): _config(64, 16, 4, 1),
    (INTERPRETER, 4): _config(64, 16, 4, 1),
}


@triton.jit
def _philox(seed, row, column, stream):
    """Four words at the counters (row, column, stream, 0)."""
    c0 = row.to(tl.uint32)
    c1 = column.to(tl.uint32)
    return tl.philox(seed, c0, c1, tl.zeros_like(c0) + stream, tl.zeros_like(c0))


@triton.jit
def _signed(b_tile, seed, start_o, start_i, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """The tile as (rows, runs of 32 columns, 32) with the sketch's signs: bit i mod 32 of word o mod 4."""
    ROWS: tl.constexpr = BLOCK_O // 4
    RUNS: tl.constexpr = BLOCK_I // 32
    row = start_o // 4 + tl.arange(0, ROWS)[:, None] + tl.zeros([ROWS, RUNS], dtype=tl.int32)
    run = start_i // 32 + tl.arange(0, RUNS)[None, :] + tl.zeros([ROWS, RUNS], dtype=tl.int32)
    w0, w1, w2, w3 = _philox(seed, row, run, 0)
    # the words' axes, the last the low bit of their number, beside the rows that they belong to
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), [BLOCK_O, RUNS])
    negative = (words[:, :, None] >> tl.arange(0, 32)[None, None, :].to(tl.uint32)) & 1
    b_tile = tl.reshape(b_tile, [BLOCK_O, RUNS, 32])
    return tl.where(negative == 1, -b_tile, b_tile)


@triton.jit
def _shifted_sum(
    b_tile, seed, start_o, start_i, dim, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Sum over the tile's R x C blocks, each shifted to its place in the sketch: [M], M >= dim, zero from dim on."""
    ACROSS: tl.constexpr = BLOCK_I // C
    BLOCKS: tl.constexpr = BLOCK_O // R * ACROSS
    block = tl.arange(0, BLOCKS)
    row = block // ACROSS
    column = block % ACROSS
    w0, _, _, _ = _philox(seed, start_o // R + row, start_i // C + column, 1)
    shift = tl.umulhi(w0, tl.zeros_like(w0) + dim.to(tl.uint32)).to(tl.int32)
    # moves nothing, but without it every thread that reads a shift computes its words again
    shift = tl.gather(shift, tl.arange(0, BLOCKS), 0)
    o_m = tl.arange(0, M)[None, :]
    place = o_m - shift[:, None]
    place = tl.where(place < 0, place + dim, place)
    own = (place >= 0) & (place < R * C) & (o_m < dim)
    place = tl.where(own, place, 0)
    source = (row[:, None] * R + place // C) * BLOCK_I + column[:, None] * C + place % C
    b_moved = tl.gather(tl.reshape(b_tile, [BLOCK_O * BLOCK_I]), tl.reshape(source, [BLOCKS * M]), 0)
    return tl.sum(tl.where(own, tl.reshape(b_moved, [BLOCKS, M]), 0.0), 0)


@triton.jit
def grad_sketch_kernel(
    p_a, p_g, p_cu_seqlens, p_parts, s_a, s_g, OUT, IN, dim, seed,
    M: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """parts[i, strip] = sketch of rows [strip BLOCK_O, (strip + 1) BLOCK_O) of G_i: one program for each."""
    strips = tl.cdiv(OUT, BLOCK_O)
    i_b = tl.program_id(0) // strips
    start_o = (tl.program_id(0) % strips) * BLOCK_O
    begin = tl.load(p_cu_seqlens + i_b)
    end = tl.load(p_cu_seqlens + i_b + 1)
    o_o = tl.arange(0, BLOCK_O)
    o_i = tl.arange(0, BLOCK_I)
    o_t = tl.arange(0, BLOCK_T)
    m_o = o_o < OUT - start_o
    p_g += begin.to(tl.int64) * s_g + start_o
    p_a += begin.to(tl.int64) * s_a
    b_sketch = tl.zeros([M], dtype=tl.float32)
    for start_i in range(0, IN, BLOCK_I):
        m_i = o_i < IN - start_i
        p_g_t = p_g
        p_a_t = p_a + start_i
        b_tile = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
        for start in range(begin, end, BLOCK_T):
            m_t = o_t < end - start
            b_g = load_tile(p_g_t + (o_t[None, :] * s_g + o_o[:, None]), m_o[:, None] & m_t[None, :])
            b_a = load_tile(p_a_t + (o_t[:, None] * s_a + o_i[None, :]), m_t[:, None] & m_i[None, :])
            b_tile = tl.dot(b_g, b_a, b_tile, input_precision="ieee")
            p_g_t += BLOCK_T * tl.cast(s_g, tl.int64)
            p_a_t += BLOCK_T * tl.cast(s_a, tl.int64)
        # outside the layer there is no coordinate, only the product of a zero with what may not be finite
        b_tile = tl.where(m_o[:, None] & m_i[None, :], b_tile, 0.0)
        b_signed = _signed(b_tile, seed, start_o, start_i, BLOCK_O, BLOCK_I)
        b_sketch += _shifted_sum(b_signed, seed, start_o, start_i, dim, M, R, C, BLOCK_O, BLOCK_I)
    o_m = tl.arange(0, M)
    tl.store(p_parts + tl.program_id(0).to(tl.int64) * dim + o_m, b_sketch, mask=o_m < dim)


def grad_sketch(a: Tensor, g: Tensor, cu_seqlens: Tensor, dim: int, seed: int) -> Tensor:
    """S vec(G_i) for every example i; see ``reference.grad_sketch``."""
    if needs_reference(a):
        return reference.grad_sketch(a, g, cu_seqlens, dim, seed)
    (_, i), o, b = a.shape, g.shape[1], cu_seqlens.shape[0] - 1
    a, g, cu_seqlens = aligned(a), aligned(g), cu_seqlens.contiguous()
    config = CONFIGS[device_family(a.device), a.element_size()]
    rows, columns = sketch_block(dim)
    strips = triton.cdiv(o, BLOCK_O)
    out = torch.empty(b, dim, dtype=torch.float32, device=a.device)
    examples = max(1, WORKSPACE // (4 * dim * max(1, strips)))
    for first in range(0, b, examples):
        count = min(examples, b - first)
        parts = torch.empty(count, strips, dim, dtype=torch.float32, device=a.device)
        launch(
            grad_sketch_kernel, (count * strips,), config,
            p_a=a, p_g=g, p_cu_seqlens=cu_seqlens[first:], p_parts=parts, s_a=a.stride(0), s_g=g.stride(0),
            OUT=o, IN=i, dim=dim, seed=seed, M=triton.next_power_of_2(dim), R=rows, C=columns, BLOCK_O=BLOCK_O,
        )  # fmt: skip
        torch.sum(parts, 1, out=out[first : first + count])
    return out
