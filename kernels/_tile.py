"""Device side shared by the kernels: products of row tiles, tile order, tanh, and the sum over an example's tokens.

Prefixes: p_ pointer, b_ block of values, o_ offsets, m_ mask, s_ stride of the first dimension in elements, i_ program
index. The last dimension of every matrix is contiguous.
"""

# mypy: disallow-untyped-defs=False
# (Triton gives the annotations of a kernel's parameters a meaning of its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, launch

__all__ = [
    "grouped_tile",
    "load_tile",
    "matmul_columns",
    "matmul_rows",
    "matmul_rows_with_tangent",
    "operand_tile",
    "segment_sum",
    "segment_sum_kernel",
    "softcapped",
]

# Triton's interpreter computes bfloat16 on its bit patterns; float32 right after the load is exact there.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

SEGMENT_SUM_CONFIG = Config({"BLOCK_P": 8, "BLOCK_T": 128}, num_warps=4, num_stages=1)


@triton.jit
def load_tile(pointers, mask):
    """A masked tile, zero outside the mask, in the dtype that the matrix units take."""
    b_x = tl.load(pointers, mask=mask, other=0.0)
    if INTERPRET:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def _described_tile(x, row, column):
    """The tile of a descriptor from (row, column) on, zero outside the matrix."""
    b_x = x.load([row, column])
    if INTERPRET:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def operand_tile(
    x, row, column, s_x, X, Y, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr
):  # fmt: skip
    """The tile of an ``operand`` (X, Y) from (row, column) on, zero outside the matrix."""
    if isinstance(x, tl.tensor_descriptor):
        return _described_tile(x, row, column)
    else:
        o_x = tl.arange(0, BLOCK_X)
        o_y = tl.arange(0, BLOCK_Y)
        mask = (o_x < X - row)[:, None] & (o_y < Y - column)[None, :]
        return load_tile(x + tl.cast(row, tl.int64) * s_x + column + (o_x[:, None] * s_x + o_y[None, :]), mask)


@triton.jit
def matmul_rows_with_tangent(acc, dacc, x, dx, y, dy, start_x, start_y, DEPTH, BLOCK_DEPTH: tl.constexpr):
    """(acc + x y^T, dacc + dx y^T + x dy^T) of descriptors, dx or dy None for zero: every tile is brought once."""
    for start in range(0, DEPTH, BLOCK_DEPTH):
        b_x = _described_tile(x, start_x, start)
        b_y = _described_tile(y, start_y, start)
        acc = tl.dot(b_x, b_y.T, acc)
        if dx is not None:
            dacc = tl.dot(_described_tile(dx, start_x, start), b_y.T, dacc)
        if dy is not None:
            dacc = tl.dot(b_x, _described_tile(dy, start_y, start).T, dacc)
    return acc, dacc


@triton.jit
def matmul_rows(
    acc, x, y, start_x, start_y, s_x, s_y, X, Y, DEPTH,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """acc + (rows of x from start_x) (rows of y from start_y)^T of ``operand``s; outside X, Y and DEPTH all is 0."""
    if isinstance(x, tl.tensor_descriptor):
        for start in range(0, DEPTH, BLOCK_DEPTH):
            acc = tl.dot(_described_tile(x, start_x, start), _described_tile(y, start_y, start).T, acc)
    else:
        # A 64-bit scalar for the tile's place and 32-bit offsets inside it: tiles of 64-bit pointers would spill.
        p_x = x + tl.cast(start_x, tl.int64) * s_x
        p_y = y + tl.cast(start_y, tl.int64) * s_y
        o_x = tl.arange(0, BLOCK_X)
        o_y = tl.arange(0, BLOCK_Y)
        o_d = tl.arange(0, BLOCK_DEPTH)
        m_x = o_x < X - start_x
        m_y = o_y < Y - start_y
        for start in range(0, DEPTH, BLOCK_DEPTH):
            m_d = o_d < DEPTH - start
            b_x = load_tile(p_x + start + (o_x[:, None] * s_x + o_d[None, :]), m_x[:, None] & m_d[None, :])
            b_y = load_tile(p_y + start + (o_y[None, :] * s_y + o_d[:, None]), m_d[:, None] & m_y[None, :])
            acc = tl.dot(b_x, b_y, acc, input_precision="ieee")
    return acc


@triton.jit
def matmul_columns(
    acc, p_x, p_y, o_y, m_y, start_x, s_x, s_y, X, DEPTH, BLOCK_X: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """acc + (rows of x from start_x) (columns of y at offsets o_y in its rows); outside X, m_y and DEPTH all is 0."""
    p_x += tl.cast(start_x, tl.int64) * s_x
    o_x = tl.arange(0, BLOCK_X)
    o_d = tl.arange(0, BLOCK_DEPTH)
    m_x = o_x < X - start_x
    for start in range(0, DEPTH, BLOCK_DEPTH):
        m_d = o_d < DEPTH - start
        b_x = load_tile(p_x + start + (o_x[:, None] * s_x + o_d[None, :]), m_x[:, None] & m_d[None, :])
        b_y = load_tile(p_y + (o_d[:, None] * s_y + o_y[None, :]), m_d[:, None] & m_y[None, :])
        acc = tl.dot(b_x, b_y, acc, input_precision="ieee")
        p_y += BLOCK_DEPTH * tl.cast(s_y, tl.int64)
    return acc


@triton.jit
def grouped_tile(i, ROWS, COLUMNS, GROUP: tl.constexpr):
    """(row tile, column tile) of program ``i``: GROUP row tiles share each column tile while it is in the L2 cache."""
    group = i // (GROUP * COLUMNS)
    first = group * GROUP
    size = tl.minimum(ROWS - first, GROUP)
    local = i - group * GROUP * COLUMNS
    return first + local % size, local // size


@triton.jit
def _tanh(x):
    """tanh to a few ulp; the interpreter has no libdevice, and 1 - 2 / (exp(2x) + 1) alone loses small x."""
    square = x * x
    small = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    large = 1 - 2 / (tl.exp(2 * x) + 1)
    return tl.where(tl.abs(x) < 0.25, small, large)


@triton.jit
def softcapped(z, softcap, CAPPED: tl.constexpr):
    """c(z) = softcap tanh(z / softcap) and c'(z); the identity and 1.0 where not CAPPED."""
    if CAPPED:
        t = _tanh(z / softcap)
        return softcap * t, 1 - t * t
    else:
        return z, 1.0


@triton.jit
def segment_sum_kernel(p_rows, p_cu_seqlens, p_out, P, N, B, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr):
    """out[k, i] = sum of rows[k, :, t] over the tokens t of example i: one program for each (i, k)."""
    i_b = tl.program_id(0)
    i_k = tl.program_id(1).to(tl.int64)
    begin = tl.load(p_cu_seqlens + i_b)
    end = tl.load(p_cu_seqlens + i_b + 1)
    p_rows += i_k * P * N
    acc = tl.zeros([BLOCK_P, BLOCK_T], dtype=tl.float32)
    for start_p in range(0, P, BLOCK_P):
        o_p = start_p + tl.arange(0, BLOCK_P)
        # Blocks start at the example's own first token: the order does not depend on its place in the batch.
        for start_t in range(begin, end, BLOCK_T):
            o_t = start_t + tl.arange(0, BLOCK_T)
            m_rows = (o_p < P)[:, None] & (o_t < end)[None, :]
            acc += tl.load(p_rows + o_p.to(tl.int64)[:, None] * N + o_t[None, :], mask=m_rows, other=0.0)
    tl.store(p_out + i_k * B + i_b, tl.sum(acc))


def segment_sum(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of partial row results over the parts P and each example's tokens, always in the same order.

    Shapes: rows (K, P, N) float32 contiguous, cu_seqlens (B + 1) int32 -> (K, B).
    """
    k, p, n = rows.shape
    b = cu_seqlens.shape[0] - 1
    out = torch.empty(k, b, dtype=torch.float32, device=rows.device)
    launch(
        segment_sum_kernel, (b, k), SEGMENT_SUM_CONFIG,
        p_rows=rows, p_cu_seqlens=cu_seqlens.contiguous(), p_out=out, P=p, N=n, B=b,
    )  # fmt: skip
    return out
